"""The demo on a little text: its table and page, nothing to do when run again, and ended at each of its stages."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support.commands import LIBRARY, Run, command, environment, in_process, refused

from logit_cache.recipes.machine import Machine

MODELS = ("one", "two", "student", "control")


@pytest.fixture(scope="session")
def run(installed: Run) -> Run:
    """Commands as processes: its stages are processes that write to its own streams."""
    return installed


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((LIBRARY / "argparse.py").read_text(encoding="utf-8")[:48_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory, run: Run) -> tuple[Path, str]:
    """A demo that nothing disturbed, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "run"
    done = run("logit-cache", "demo", "--out", out, "--text", text)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def results(out: Path) -> dict[str, Any]:
    """Everything that a demo found, to all digits, and its weights."""
    found: dict[str, Any] = {}
    for name in MODELS:
        report = json.loads((out / "seed-0" / name / "report.json").read_text())
        found[name] = {key: report[key] for key in ("steps", "tokens_seen", "held_out", "eval_log")}
        for log in found[name]["eval_log"]:
            for timing in [key for key in log if key.endswith(("runtime", "per_second"))]:
                del log[timing]
        found[name]["weights"] = (out / "seed-0" / name / "model.safetensors").read_bytes()
    found["targets"] = {
        str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("*/teachers/*/*/c/**/*")) if p.is_file()
    }
    assert found["targets"]
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_its_table_and_its_page_and_nothing_to_do_again(whole: tuple[Path, str], run: Run, text: Path) -> None:
    out, printed = whole
    for name in ("teacher one", "teacher two", "student", "control"):
        assert re.search(rf"^{name} +\d\.\d\d M +\d\.\d{{4}} +\d\.\d +\d+$", printed, flags=re.MULTILINE), printed
    assert re.search(r"Distillation (lowers|raises) the student's held-out loss by", printed)
    assert re.search(r"the student (beats|does not beat) its best teacher", printed)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.index("Held-out loss, nats per token, against epochs") < page.index("Difference of held-out loss")
    assert not re.search(r"(?:src|href)=.(?:https?:)?//", page), "the page needs no network"

    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.suffix not in (".html", ".json")}
    again = run("logit-cache", "demo", "--out", out, "--text", text)
    assert again.returncode == 0, again.stderr
    assert again.stdout == printed
    assert {p: p.stat().st_mtime_ns for p in before} == before
    other = run("logit-cache", "demo", "--out", out)
    assert other.returncode == 2
    assert "of other text" in other.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
@pytest.mark.parametrize(
    "even", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.soak)], ids=lambda number: number.name
)
def test_ended_at_each_stage(whole: tuple[Path, str], text: Path, tmp_path: Path, even: signal.Signals) -> None:
    """No process is left, and the same command resumes to the same result."""
    odd = signal.SIGKILL if even == signal.SIGTERM else signal.SIGTERM
    out, log, chance = tmp_path / "run", tmp_path / "log", random.Random(even)
    ended: set[int] = set()
    while True:
        with log.open("w") as file:
            job = subprocess.Popen(
                command("logit-cache", "demo", "--out", out, "--text", text),
                env=environment(), stdout=subprocess.DEVNULL, stderr=file,
            )  # fmt: skip
        asked: int | None = None
        while job.poll() is None and asked is None:
            time.sleep(0.02)
            begun = {int(number) for number in re.findall(r"^\[(\d+)/11\]", log.read_text(), flags=re.MULTILINE)}
            if begun - ended:
                stage = min(begun - ended)
                time.sleep(chance.uniform(0, 5))
                asked = odd if stage % 2 else even
                job.send_signal(asked)
                ended.add(stage)
        status = job.wait()
        # Killed, it has nobody to wait for its stages.
        deadline = time.monotonic() + (30 if asked == signal.SIGKILL else 0)
        while (left := working_in(out)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert left == []
        if asked is None:
            assert status == 0, log.read_text()
            break
    assert len(ended) >= 10, ended
    assert results(out) == results(whole[0])


def working_in(folder: Path) -> list[str]:
    """Command lines of the running processes that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(folder) in words and int(path.parent.name) != os.getpid():
            found.append(words)
    return found


def test_a_folder_that_is_no_demo_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    done = in_process("logit-cache", "demo", "--out", tmp_path)
    assert done.returncode == 2
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_text_that_cannot_be_used_does_not_lock_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(device="cpu", name="a machine", memory_bytes=1 << 36, products_per_second=1e11)
    monkeypatch.setattr("logit_cache.recipes.run.probe", lambda: machine)
    good, bad = tmp_path / "good[1].txt", tmp_path / "bad.txt"
    good.write_text("one\n")
    bad.write_bytes(b"caf\xe9\n" * 4)
    out = tmp_path / "run"
    for text, words in ((tmp_path / "none.txt", "none.txt: expected files of text"), (bad, "bad.txt: not UTF-8")):
        refused(in_process("logit-cache", "demo", "--out", out, "--text", good, "--text", text), words)
        assert not out.exists()
    # Of too little text it is the same; and what was given may be given anew.
    for content in ("one\ntwo\nthree\n", "four\n" * 9):
        good.write_text(content)
        done = in_process("logit-cache", "demo", "--out", out, "--text", good)
        refused(done, "fewer than two steps of 8 windows (2,048): give more text")
    refused(in_process("logit-cache", "demo", "--out", good), "expected a folder of a recipe")
