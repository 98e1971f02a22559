"""Plants the bugs of `planted_bugs.yaml` one after the other in a copy of the checkout: each is found by its test.

    python tests/support/programs/planted_bugs.py [NAME...]

A test that no longer fails where its bug is planted has lost its property, whatever its coverage says. Takes about a
quarter of a minute for each bug; ends with status 1 where one is not found, or where its text is no longer in its file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[3]
BUGS = Path(__file__).with_suffix(".yaml")


def found(bug: dict[str, str], checkout: Path) -> str:
    """What came of one bug: `found`, or what is wrong."""
    path = checkout / bug["file"]
    text = path.read_text(encoding="utf-8")
    if text.count(bug["old"]) != 1:
        return "its text is not there once: adapt it"
    path.write_text(text.replace(bug["old"], bug["new"]), encoding="utf-8")
    paths = os.pathsep.join((str(checkout), str(checkout / "tests")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not ceph and not slurm", bug["test"]],
        cwd=checkout, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    path.write_text(text, encoding="utf-8")
    return {0: "NOT FOUND", 1: "found"}.get(
        done.returncode, f"pytest ended with {done.returncode}: {done.stdout[-400:]}"
    )


def main() -> None:
    bugs = yaml.safe_load(BUGS.read_text(encoding="utf-8"))
    chosen = {name: bug for name, bug in bugs.items() if name in sys.argv[1:] or not sys.argv[1:]}
    with tempfile.TemporaryDirectory() as folder:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        outcomes = {}
        for name, bug in chosen.items():
            outcomes[name] = found(bug, Path(folder))
            print(f"{name}: {outcomes[name]}  ({bug['file']}: {bug['fault']}) by {bug['test']}", flush=True)
    missed = [name for name, outcome in outcomes.items() if outcome != "found"]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} planted bugs are found", *missed)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
