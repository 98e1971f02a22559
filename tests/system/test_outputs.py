"""A file or folder that cannot be written is found before the work, by every command that writes one."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import Run, refused

from storage import files
from storage.errors import InputError
from storage.files import check_output, check_writable, write_output

# Nobody makes files here, not even root, for whom permissions are no obstacle.
NOWHERE = "/proc"
# Each command with an output there, and the work that must not begin.
COMMANDS: dict[str, tuple[str, str]] = {
    "evaluate": (
        "logit-cache evaluate TEACHER --cache CACHE --out /proc/x.json",
        "student.evaluation.evaluate.evaluate",
    ),
    "evaluate, tasks": (
        "logit-cache evaluate TEACHER --pairs PAIRS --lm-eval-tasks /proc/new/tasks",
        "student.evaluation.evaluate._load",
    ),
    "clean": ("logit-cache clean --text TEXT --out /proc/new", "logit_cache.corpus.cleaning._clean_file"),
    "tokenize": (
        "logit-cache tokenize --text TEXT --train-tokenizer 400 --out /proc/new",
        "logit_cache.corpus.tokenize.train_tokenizer",
    ),
    "cache-logits from text": (
        "cache-logits --text TEXT --train-tokenizer 400 --out /proc/new --teacher TEACHER --name a",
        "logit_cache.engines.command.load_teachers",
    ),
    "push": ("logit-cache push CACHE /proc/new", "storage.transfer.copy.gather"),
    "pull": ("logit-cache pull CACHE /proc/new", "storage.transfer.copy.gather"),
    "train-student": (
        "train-student --cache CACHE --model llama-tiny --output-dir /proc/new",
        "student.training.run.job_inputs",
    ),
    "train-teacher": (
        "train-teacher --cache CACHE --model llama-tiny --output-dir /proc/new",
        "student.training.run.job_inputs",
    ),
    "recipe": (
        "logit-cache recipe baby-llama --scale tiny --text TEXT --eval-text OTHER --out /proc/new",
        "logit_cache.recipes.stages.Pipeline.run",
    ),
}


@pytest.fixture
def places(small_cache: Path, teacher: Path, text_file: Path, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "pairs").mkdir()
    pair = {"sentence_good": "a b", "sentence_bad": "b a", "field": "syntax", "linguistics_term": "x", "UID": "y"}
    (tmp_path / "pairs" / "y.jsonl").write_text(json.dumps(pair) + "\n")
    shutil.copy(text_file, tmp_path / "other.txt")
    with (tmp_path / "other.txt").open("a") as file:
        file.write("another\n")
    return {
        "CACHE": str(small_cache), "TEACHER": str(teacher), "TEXT": str(text_file), "PAIRS": str(tmp_path / "pairs"),
        "OTHER": str(tmp_path / "other.txt"),
    }  # fmt: skip


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the work began")


@pytest.mark.parametrize("case", COMMANDS)
def test_it_is_found_before_the_work(
    case: str, places: dict[str, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, work = COMMANDS[case]
    monkeypatch.setattr(work, never)
    refused(run(*(places.get(word, word) for word in line.split())), "/proc")


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a mount that is for reading only."""

    def refuse(**_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("storage.files.tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)


def test_an_entry_in_a_cache_for_reading_only(
    places: dict[str, str], run: Run, monkeypatch: pytest.MonkeyPatch, read_only: None
) -> None:
    words = ("cache-logits", "--cache", places["CACHE"], "--teacher", places["TEACHER"], "--name", "a")
    monkeypatch.setattr("logit_cache.engines.run.run_here", never)
    refused(run(*words), places["CACHE"], "Read-only file system")
    refused(run("logit-cache", "verify", places["CACHE"], "--repair"), "Read-only file system")
    assert run("logit-cache", "verify", places["CACHE"]).returncode == 0


def test_what_is_complete_needs_no_writing(
    source: Path, run: Run, monkeypatch: pytest.MonkeyPatch, read_only: None
) -> None:
    from storage.cache.writer import check_destination

    check_destination(source, "a")
    with pytest.raises(InputError, match="Read-only"):
        check_destination(source, "new")


def test_the_page_of_a_report(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.report_folders import recipe_folder

    folder = recipe_folder(tmp_path / "recipe")
    monkeypatch.setattr("logit_cache.report.page.gather_recipe", never)
    refused(run("logit-cache", "report", folder, "-o", "/proc/page.html"), "--out /proc/page.html", "cannot write")


def test_outputs_that_are_no_files(tmp_path: Path) -> None:
    """A pipe or device receives the bytes, and stays; a link stays a link."""
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_output(check_output(pipe, "--out"), b"piped")
    assert os.read(descriptor, 9) == b"piped"
    os.close(descriptor)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_output(check_output(str(link), "--out"), b"linked")
    assert link.is_symlink()
    assert target.read_bytes() == b"linked"
    write_output(check_output("/dev/null", "--out"), b"gone")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_another_users_file_in_a_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In /tmp, a new name can be made, and what is another's cannot be replaced."""
    tmp_path.chmod(0o1777)
    (tmp_path / "theirs").touch()
    monkeypatch.setattr(os, "geteuid", lambda: 4_242)
    with pytest.raises(InputError, match="another user"):
        check_output(tmp_path / "theirs", "--out")
    assert check_output(tmp_path / "mine", "--out") == tmp_path / "mine"


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_file_on_the_way_to_a_folder(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "file")
    with pytest.raises(InputError, match="here: cannot write in"):
        check_writable(tmp_path / "file" / "new", "here")
    check_writable(tmp_path / "new" / "folder", "here")
    assert os.listdir(tmp_path) == ["file"], "a check leaves nothing"
    assert files.local_path(tmp_path) == tmp_path
