"""What the studies share: commands run, text shortened, students trained some at a time, intervals over seeds."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


def command(*arguments: object, threads: int = 2) -> None:
    print("$", *arguments, file=sys.stderr, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([script(str(arguments[0])), *map(str, arguments[1:])], check=True, env=environment)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def excerpt(files: Sequence[str], out: Path, share: float) -> None:
    """About a share of every file, in evenly spread blocks of 50 lines."""
    out.mkdir(parents=True, exist_ok=True)
    for name in files:
        lines = Path(name).read_text(encoding="utf-8").splitlines(keepends=True)
        blocks = [lines[start : start + 50] for start in range(0, len(lines), 50)]
        wanted = max(1, round(share * len(blocks)))
        chosen = sorted({index * len(blocks) // wanted for index in range(wanted)})
        text = "".join(line for index in chosen for line in blocks[index])
        (out / Path(name).name).write_text(text, encoding="utf-8")


def positions(url: Path) -> int:
    from storage import LogitCache

    return LogitCache.open(str(url)).record.corpus.positions


def interval(values: Sequence[float]) -> str:
    """Mean and the half-width of its 95 % interval (Student's t)."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
    if len(values) < 2:
        return f"{values[0]:+.4f} (one seed)"
    half = t.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):+.4f} ± {half:.4f}"


def optimizer_of(student: Any, learning_rate: float, steps: int) -> tuple[Any, Any]:
    """AdamW and its schedule: up over the first twentieth of the steps, then down as a cosine."""
    import torch

    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    return optimizer, schedule


def run_all(run: Path, study: Path, jobs: Mapping[str, Sequence[str]], workers: int) -> None:
    """`study RUN one ARGUMENTS` for every job without a result, `workers` at a time, one thread each."""
    waiting = [name for name in jobs if not (run / "results" / f"{name}.json").exists()]
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    failed = []
    (run / "results").mkdir(exist_ok=True)
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            with (run / "results" / f"{name}.log").open("wb") as log:
                child = subprocess.Popen(
                    [sys.executable, str(study), str(run), "one", *jobs[name]],
                    env={**os.environ, "OMP_NUM_THREADS": "1", "LOGIT_CACHE_QUIET": "1"},
                    stdout=log,
                    stderr=log,
                )
            running.append((name, child))
        time.sleep(0.2)
        for pair in list(running):
            if pair[1].poll() is not None:
                running.remove(pair)
                if pair[1].returncode:
                    failed.append(pair[0])
                print(
                    f"{time.strftime('%H:%M:%S')} {pair[0]}: {_said(run / 'results' / f'{pair[0]}.json')}", flush=True
                )
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; their logs are in {run / 'results'}")


def _said(path: Path) -> str:
    """A result in a line: its numbers."""
    if not path.exists():
        return "failed"
    found = json.loads(path.read_text())
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float))


def results(run: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((run / "results").glob("*.json")):
        yield json.loads(path.read_text())


def study_parser(about: str | None) -> tuple[argparse.ArgumentParser, Any]:
    """A parser with the stage that prepares a run, and what further stages are added to."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    stages = parser.add_subparsers(dest="stage", required=True)
    preparation = stages.add_parser("prepare")
    preparation.add_argument("--text", nargs="+", required=True)
    preparation.add_argument("--eval-text", nargs="+", required=True)
    return parser, stages
