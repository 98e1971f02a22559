"""The benchmarks' page says "not measured" where nothing was, and the command fails then."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.commands import ROOT

_CODE = """
import sys, types
import harness, run
fine, broken = types.ModuleType("bench_fine"), types.ModuleType("bench_broken")
fine.tables = lambda: iter([harness.Table("A", ("way", "ratio"), [("one", harness.spread([2.0, 1.0, 4.0]))])])
def half():
    yield harness.Table("B", ("way", "ratio"), [("one", harness.spread([]))])
    raise SystemExit("the disk is full")
broken.tables = half
sys.modules |= {"bench_fine": fine, "bench_broken": broken}
run.PARTS = {"fine": "Fine", "broken": "Broken"}
run.main()
"""


def test_a_part_that_fails_is_not_measured_and_the_rest_goes_on(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for only, status in (["broken", "fine"], 1), (["fine"], 0):
        done = subprocess.run(
            [sys.executable, "-c", _CODE, "--out", page, "--only", *only],
            env={"PYTHONPATH": str(ROOT / "tests/benchmarks"), "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        text = page.read_text()
        assert "| one | 2.00 (1.00, 4.00) |" in text
        assert (
            ("| one | not measured |" in text) == ("not measured: SystemExit: the disk is full" in text) == bool(status)
        )


def test_memory_of_a_child_is_its_own() -> None:
    """Linux starts a child's peak at its parent's."""
    code = (
        "import json, sys, harness; fat = bytearray(600 << 20); fat[::4096] = b'x' * len(fat[::4096]); "
        "print(json.dumps(harness.command([sys.executable, '-c', 'pass']).peak_bytes))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "tests/benchmarks")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) < 100 << 20
