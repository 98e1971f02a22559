"""The demo end to end on a little text: every stage, the table, the page, and a second run with nothing to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.commands import LIBRARY, Run


@pytest.fixture(scope="session")
def run(installed: Run) -> Run:
    """Commands as processes: its stages are processes that write to its own streams."""
    return installed


@pytest.mark.slow
def test_the_demo_runs_to_its_table_and_resumes(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    names = sorted(LIBRARY.glob("[a-d]*.py"))[:12]
    text.write_text("".join(path.read_text(encoding="utf-8") for path in names)[:240_000], encoding="utf-8")
    out = tmp_path / "run"
    done = run("logit-cache", "demo", "--out", out, "--text", text)
    assert done.returncode == 0, done.stderr
    for words in ("bytes/token", "positions/s", "teacher llama", "teacher gpt2", "student, distilled", "held-out loss"):
        assert words in done.stdout
    assert re.search(r"distillation (is better|made no difference here)", done.stdout, flags=re.IGNORECASE)
    page = (out / "demo.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert not re.search(r"(?:src|href)=.(?:https?:)?//", page), "the page needs no network"
    held_out = re.findall(r"^(student, \S+(?: \S+)?) .*?(\d\.\d{4})", done.stdout, flags=re.MULTILINE)
    assert len(held_out) == 2

    before = {p: p.stat().st_mtime_ns for p in out.rglob("c/**/*") if p.is_file()}
    again = run("logit-cache", "demo", "--out", out, "--text", text)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
    assert {p: p.stat().st_mtime_ns for p in out.rglob("c/**/*") if p.is_file()} == before

    other = run("logit-cache", "demo", "--out", out)
    assert other.returncode == 2
    assert "of other text" in other.stderr


def test_a_folder_that_is_no_demo_is_not_touched(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    done = run("logit-cache", "demo", "--out", tmp_path)
    assert done.returncode == 2
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_missing_text_is_reported_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    done = run("logit-cache", "demo", "--out", tmp_path / "run", "--text", tmp_path / "none.txt")
    assert done.returncode == 2
    assert "none.txt" in done.stderr
    assert not (tmp_path / "run").exists()


def test_text_that_cannot_be_used_does_not_lock_the_folder(run: Run, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("one\ntwo\nthree\n")
    bad.write_bytes(b"caf\xe9\n" * 4)
    out = tmp_path / "run"
    done = run("logit-cache", "demo", "--out", out, "--text", good, "--text", bad)
    assert done.returncode == 2
    assert "bad.txt" in done.stderr
    assert not out.exists()
    done = run("logit-cache", "demo", "--out", good)
    assert done.returncode == 2
    assert "expected a folder of a recipe" in done.stderr
