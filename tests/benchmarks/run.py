"""`make bench`: every benchmark in turn, written to docs/benchmarks.md with the machine, the versions and the command.

    python tests/benchmarks/run.py [--out docs/benchmarks.md] [--only caching reducer …]

A part that fails is reported as not measured, with its reason, and the rest goes on; the exit status is then 1. Each
part is a module `bench_<part>` of this folder with `tables()`, and takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from harness import NOT_MEASURED, ROOT, Table

PARTS = {
    "caching": "Caching against the teacher's bare forward",
    "workers": "Several workers",
    "reducer": "The reducer",
    "sizes": "Stored bytes",
    "reading": "Reading",
    "student": "The student's step",
    "fused": "Head and loss in one walk",
    "conversations": "Conversations",
    "scaling": "What grows with the corpus",
    "startup": "Start-up",
}
_LIBRARIES = ("torch", "transformers", "numpy", "numcodecs", "zarr", "pyarrow", "datasets", "triton")


def main() -> None:
    """Run the parts and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks.md")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    sys.path[1:1] = [str(ROOT), str(ROOT / "tests")]  # the tests' own helpers; tests/storage must not hide `storage`
    began, failed, sections = time.perf_counter(), [], []
    for part in options.only:
        print(f"== {part}", flush=True)
        started = time.perf_counter()
        tables = list(_tables(part, failed))
        for table in tables:
            print(table, flush=True)
        sections.append("\n".join([f"## {PARTS[part]}\n", *tables]))
        print(f"== {part}: {time.perf_counter() - started:.0f} s", flush=True)
    page = "\n".join([_head(time.perf_counter() - began, options.only), *sections])
    options.out.write_text(page.rstrip("\n") + "\n")
    raise SystemExit(1 if failed else 0)


def _tables(part: str, failed: list[str]) -> Iterator[str]:
    try:
        found: Iterator[Table] = importlib.import_module(f"bench_{part}").tables()
        for table in found:
            yield table.markdown()
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        failed.append(part)
        said = " ".join(str(error).split())[:300]
        yield f"{NOT_MEASURED}: {type(error).__name__}: {said}\n"


def _head(seconds: float, parts: list[str]) -> str:
    made = "`make bench`" if parts == list(PARTS) else f"`python tests/benchmarks/run.py --only {' '.join(parts)}`"
    versions = ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES)
    return f"""# Benchmarks

Made by {made} in {seconds / 60:.0f} minutes, and not by hand.

- Machine: {_processor()}, {len(os.sched_getaffinity(0))} cores, {_memory()} of memory, {_device()}; {platform.system()}
- Versions: Python {platform.python_version()}, {versions}
- Date: {datetime.now(UTC):%Y-%m-%d}

Ways that are compared take turns in one run; a figure is the median of its rounds, in parentheses the lowest and the
highest. A ratio is taken round by round. Memory is the operating system's count of a process's peak.
"""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


if __name__ == "__main__":
    main()
