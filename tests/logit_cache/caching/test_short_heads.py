"""Heads and tokenizers that differ where it does no harm, through the commands: text, teachers, students, evaluation.

The tokenizer has 401 ids; the last one, `<extra>`, is in no text unless asked for, and short heads have 400 columns.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import Run, refused, succeeded
from support.jobs import cache_logits, copy_of, whole
from support.models.short_heads import EXTRA, add_tokens, beside
from transformers import AutoModelForCausalLM

from storage import LogitCache
from storage.cache.reader import Stream, TeacherTargets
from student.data.windows import DistillationWindows

V = 401
WINDOWS = ("--context-tokens", 64, "--fidelity-positions", 128)
STUDENT = ("--window-tokens", 64, "--set", "max_steps=2")


@dataclass(frozen=True)
class World:
    """A cache of that tokenizer, the same text with `<extra>` after each document, and models with the tokenizer."""

    folder: Path
    cache: Path
    with_extra: Path
    tokenizer: Path
    teacher: Path  # 400 columns
    padded: Path  # 416
    student: Path  # 400


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    small_cache: Path,
    text_file: Path,
    make_teacher: Callable[..., Path],
    run: Run,
) -> World:
    folder = tmp_path_factory.mktemp("short")
    tokenizer = add_tokens(small_cache / "tokenizer", folder / "tokenizer", EXTRA, pad=True)
    line = ("logit-cache", "tokenize", "--text", text_file, "--tokenizer", tokenizer)
    for name, options in (("cache", ()), ("with-extra", ("--append-token", EXTRA))):
        succeeded(run(*line, *options, "--out", folder / name))
    models = {
        name: beside(make_teacher(seed, vocabulary_size=size), tokenizer, folder / name)
        for seed, (name, size) in enumerate({"teacher": 400, "padded": 416, "student": 400}.items())
    }
    found = World(folder, folder / "cache", folder / "with-extra", tokenizer, *models.values())
    assert LogitCache.open(str(found.cache)).vocabulary_size == V
    for name, model in (("short", found.teacher), ("padded", found.padded)):
        succeeded(run("cache-logits", "--cache", found.cache, "--teacher", model, "--name", name, "-k", 16,
                   "--fields", "all", *WINDOWS))  # fmt: skip
    cache_logits(found.cache, "all", found.teacher, targets="topk", k=400, encoding="float32")
    return found


def log_probs(model: Path, cache: Path, positions: int = 256) -> torch.Tensor:
    """log softmax [positions, columns] of a model over the first windows of 64 tokens of a cache, float64."""
    windows = torch.from_numpy(LogitCache.open(str(cache)).tokens.read(0, positions).astype(np.int64)).view(-1, 64)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model).eval()(windows).logits.flatten(0, 1)
    return torch.log_softmax(logits.double(), 1)


def test_a_short_head_is_cached_over_its_own_columns(world: World) -> None:
    """Its entry has its own V, at which all ids stored leave no tail; the padded teacher's has the tokenizer's."""
    dense = log_probs(world.teacher, world.cache).numpy()
    for name in ("short", "all"):
        targets, stored = whole(world.cache, name)
        assert targets.entry.vocabulary_size == 400
        ids = stored.token_ids[:256].astype(np.int64)
        # Codes of the certain ids are within a step and a half, and of drawn ids within one of theirs.
        tolerance = np.where(stored.is_certain[:256], 3 / 64, 0.52) if name == "short" else 1e-5
        assert (np.abs(stored.logprobs[:256] - np.take_along_axis(dense, ids, 1)) <= tolerance).all()
    assert np.isneginf(stored.log_tail).all()
    assert whole(world.cache, "padded")[0].entry.vocabulary_size == V


def test_everything_that_reads_an_entry_reads_one_of_a_short_head(world: World, run: Run, tmp_path: Path) -> None:
    cache = copy_of(world.cache, tmp_path / "cache")
    for line, words in (
        (("verify", cache, "--deep"), ""),
        (("inspect", cache), ", of 400 ids"),
        (("status", cache), "teacher short: complete"),
        (("audit", cache, "--name", "short", "--teacher", world.teacher, "--windows", 4), "consistent"),
        (("recompress", cache, "--name", "all", "--to", "less", "-k", 8), "less"),
        (("push", cache, tmp_path / "pushed"), ""),
        (("verify", tmp_path / "pushed", "--deep"), ""),
        (("plan", "--cache", cache, "--teacher", world.teacher, "--student", world.student, *WINDOWS[:2]), "objects"),
    ):
        done = succeeded(run("logit-cache", *line))
        assert words in done.stdout
    assert whole(tmp_path / "pushed", "less")[0].entry.vocabulary_size == 400


def test_a_text_is_tokenized_and_cached_by_one_command(world: World, text_file: Path, run: Run, tmp_path: Path) -> None:
    """With the teacher's own tokenizer, which is what the refusal of a short head once advised."""
    line = ("cache-logits", "--text", text_file, "--out", tmp_path / "c", "--teacher", world.teacher, "--name", "a")
    succeeded(run(*line, "-k", 16, *WINDOWS))
    assert whole(tmp_path / "c", "a")[0].entry.vocabulary_size == 400
    refused(run(*line[:-1], "b", "-k", V, *WINDOWS), f"--k {V}", "400 columns")


def test_nothing_is_searched_where_nothing_differs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, name in ((Stream, "first"), (TeacherTargets, "first_beyond")):
        monkeypatch.delattr(kind, name)
    cache = copy_of(world.cache, tmp_path / "cache")
    cache_logits(cache, "again", world.padded, k=16)
    DistillationWindows(str(cache), ["again", "short"]).within(416, "a student", print)


def test_the_ids_left_out_are_named_once_and_the_job_resumes(
    world: World, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = copy_of(world.cache, tmp_path / "cache")
    line = ("cache-logits", "--cache", cache, "--teacher", world.teacher, "--name", "again", "-k", 16, *WINDOWS)
    assert run(*line).returncode == 0
    assert [f"id 400 ({EXTRA!r})" in record.message for record in caplog.records] == [True]
    before = (cache / "teachers/again/zarr.json").read_bytes()
    assert run(*line).returncode == 0
    assert (cache / "teachers/again/zarr.json").read_bytes() == before


def test_an_ensemble_has_the_ids_of_all_members(world: World, tmp_path: Path) -> None:
    cache = copy_of(world.cache, tmp_path / "cache")
    models = (world.padded, world.teacher)
    targets, stored = cache_logits(cache, "both", *models, combine="mixture", targets="topk", k=400, encoding="float32")
    assert targets.entry.vocabulary_size == 400
    both = torch.stack([torch.log_softmax(log_probs(model, cache)[:, :400], 1) for model in models])
    dense = (both.exp().mean(0)).log().numpy()
    ids = stored.token_ids[:256].astype(np.int64)
    np.testing.assert_allclose(stored.logprobs[:256], np.take_along_axis(dense, ids, 1), atol=2e-5)


def test_a_student_with_a_short_head_learns_from_it(world: World, run: Run, tmp_path: Path) -> None:
    """Its KL is the dense one, in training and in `evaluate`; the saved model is without the pad id, and loads."""
    cache, out = world.cache, tmp_path / "out"
    line = ("--cache", cache, "--teacher", "all", "--model", world.student, "--eval-cache", cache, *STUDENT)
    done = succeeded(run("train-student", *line, "--output-dir", out, "--json"))
    assert done.stderr.count(f"id 400 ({EXTRA!r})") == 1
    assert json.loads((out / "config.json").read_text())["pad_token_id"] is None
    found = json.loads(done.stdout)["held_out"]["kl"]["all"]
    assert not found["lower_bound"]
    done = succeeded(
        run("logit-cache", "evaluate", out, "--cache", cache, "--teacher", "all", "--window-tokens", 64, "--json")
    )
    assert done.stderr.count(f"id 400 ({EXTRA!r})") == 1
    kl = json.loads(done.stdout)["held_out"]["kl"]["all"]["nats"]
    positions = len(LogitCache.open(str(cache)).tokens) // 64 * 64
    p, q = log_probs(world.teacher, cache, positions), log_probs(out, cache, positions)
    assert (
        kl
        == pytest.approx(found["nats"], rel=1e-5)
        == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    )


@pytest.mark.parametrize("fused", ["on", "off"])
def test_teachers_of_different_sizes_are_mixed(world: World, run: Run, tmp_path: Path, fused: str) -> None:
    """For a new student, which has all ids of the tokenizer."""
    line = ("--cache", world.cache, "--teacher", "short", "--teacher", "padded:2", "--model", "llama-tiny", *STUDENT)
    succeeded(run("train-student", *line, "--fused-head", fused, "--output-dir", tmp_path / "out"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == V


def test_live_teachers_and_students_with_short_heads(world: World, run: Run, tmp_path: Path) -> None:
    line = ("train-teacher", "--cache", world.cache, *STUDENT, "--combine", "logit-mean")
    for number, model in enumerate((world.student, "llama-tiny")):
        teachers = ("--live-teacher", world.teacher, "--live-teacher", world.padded)
        succeeded(run(*line, *teachers, "--model", model, "--output-dir", tmp_path / str(number)))


def test_a_text_with_the_id_is_refused(world: World, run: Run, tmp_path: Path) -> None:
    """With its first position and string, and advice that leads out: this is the teacher's own tokenizer."""
    tokens = LogitCache.open(str(world.with_extra)).tokens
    position = int(np.flatnonzero(tokens.read(0, len(tokens)) == 400)[0])
    words = ("400 columns", "401 ids", f"id 400 ({EXTRA!r}) first at position {position}", "column for it")
    on_text, output = ("--cache", world.with_extra), ("--output-dir", tmp_path / "out")
    for line in (
        ("cache-logits", *on_text, "--teacher", world.teacher, "--name", "a", *WINDOWS),
        ("train-student", *on_text, "--model", world.student, "--alpha", 1, *STUDENT, *output),
        ("train-teacher", *on_text, "--model", "llama-tiny", "--live-teacher", world.teacher, *STUDENT, *output),
        ("logit-cache", "evaluate", world.student, *on_text),
        ("logit-cache", "plan", *on_text, "--teacher", world.padded, "--student", world.student, *WINDOWS[:2]),
    ):
        done = run(*line)
        refused(done, *words)
        assert "--tokenizer" not in done.stderr
    held_out = ("--cache", world.cache, "--eval-cache", world.with_extra, *STUDENT, *output)
    refused(run("train-student", *held_out, "--teacher", "all", "--model", world.student), *words)
    refused(run("train-teacher", *held_out, "--live-teacher", world.teacher, "--model", "llama-tiny"), *words)
    assert not (world.with_extra / "teachers" / "a").exists()
    assert not (tmp_path / "out").exists()


def test_windows_that_begin_with_the_id_are_refused(world: World, text_file: Path, run: Run, tmp_path: Path) -> None:
    """Though no text has it: before a job, and before a job on held-out text, of a model of any command."""
    tokenizer = Path(shutil.copytree(world.tokenizer, tmp_path / "tokenizer"))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_bytes())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": EXTRA}))
    cache, out = ("--cache", tmp_path / "cache", "--bos-each-window"), ("--output-dir", tmp_path / "out")
    succeeded(
        run("logit-cache", "tokenize", "--text", text_file, "--tokenizer", tokenizer, "--no-bos", "--out", cache[1])
    )
    before = {path: path.stat().st_mtime_ns for path in cache[1].rglob("*")}
    live = ("train-teacher", *cache, *STUDENT, *out, "--live-teacher")
    words = ("400 columns", f"windows begin with id 400 ({EXTRA!r})", "--bos-each-window")
    for line in (
        ("cache-logits", *cache, "--teacher", world.teacher, "--name", "a", *WINDOWS),
        ("train-student", *cache, "--model", world.student, "--alpha", 1, *STUDENT, *out),
        (*live, world.teacher, "--model", "llama-tiny"),
        (*live, world.padded, "--model", world.student),
        ("logit-cache", "evaluate", world.student, *cache),
        ("logit-cache", "plan", *cache, "--teacher", world.padded, "--student", world.student, *WINDOWS[:2]),
    ):
        refused(run(*line), *words)
    other = beside(world.teacher, add_tokens(world.tokenizer, tmp_path / "renamed"), tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace(EXTRA, "<other>"))
    for line in (
        ("cache-logits", *cache, "--teacher", other, "--name", "a", *WINDOWS),
        ("train-student", *cache, "--model", other, "--alpha", 1, *STUDENT, *out),
        ("logit-cache", "evaluate", other, *cache),
    ):
        refused(run(*line), "its tokenizer is not the one", "windows begin with this id")
    assert before == {path: path.stat().st_mtime_ns for path in cache[1].rglob("*")}
    assert not (tmp_path / "out").exists()


def test_a_teacher_whose_own_tokenizer_fits_is_advised_to_use_it(
    world: World, small_cache: Path, make_teacher: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    own = beside(make_teacher(7), small_cache / "tokenizer", tmp_path / "own")
    done = run("cache-logits", "--cache", world.with_extra, "--teacher", own, "--name", "a", *WINDOWS)
    refused(done, "id 400", "first at position", f"logit-cache tokenize --tokenizer {own}")


def test_targets_that_name_an_id_without_a_column_are_refused(world: World, run: Run, tmp_path: Path) -> None:
    stored = whole(world.cache, "padded")[1]
    position = int(np.flatnonzero((stored.token_ids == 400).any(axis=1))[0])
    words = ("400 columns", "teacher padded", "id 400", f"first at position {position}")
    line = ("--cache", world.cache, "--teacher", "padded", *STUDENT[:2])
    output = ("--output-dir", tmp_path / "out")
    refused(run("train-student", *line, "--model", world.student, *output), *words)
    refused(run("logit-cache", "evaluate", world.student, *line), *words)
    assert not (tmp_path / "out").exists()


def test_a_student_lacks_an_id_that_no_target_names(world: World, run: Run, tmp_path: Path) -> None:
    """The teacher has a column for it, with a logit below the ones that are stored."""
    model = AutoModelForCausalLM.from_pretrained(world.padded)
    with torch.no_grad():
        model.get_output_embeddings().weight[400:] = 0.0
    model.save_pretrained(tmp_path / "teacher")
    cache = copy_of(world.cache, tmp_path / "cache")
    targets, _ = cache_logits(cache, "mute", tmp_path / "teacher", targets="topk", k=8)
    assert targets.entry.vocabulary_size == V
    line = ("--cache", cache, "--teacher", "mute", "--teacher", "short", "--model", world.student, *STUDENT)
    succeeded(run("train-student", *line, "--eval-cache", cache, "--output-dir", tmp_path / "out"))


def test_a_row_that_leaves_only_ids_without_a_column_names_them(world: World, tmp_path: Path) -> None:
    """All ids but the last are stored: the mass outside is that of the last, which no tail of a student can match."""
    cache = copy_of(world.cache, tmp_path / "cache")
    targets, stored = cache_logits(cache, "most", world.padded, targets="topk", k=400)
    assert targets.first_beyond(400) == (0, 400)
    assert targets.first_beyond(V) is None
    one, few = cache_logits(cache, "one", world.padded, targets="topk", k=1)
    named = np.flatnonzero(few.token_ids[:, 0] == few.token_ids.max())
    assert one.first_beyond(int(few.token_ids.max())) == (named[0], few.token_ids.max())
    assert len(stored) == len(few)


# ---- strings


def with_strings(world: World, folder: Path, model: Path, *added: str, **renamed: str) -> Path:
    """A copy of a model whose tokenizer has further tokens, or other strings for added ones."""
    add_tokens(world.tokenizer, folder / "tokenizer", EXTRA, *added)
    for file in (folder / "tokenizer").glob("*.json"):
        text = file.read_text()
        for old, new in renamed.items():
            text = text.replace(f"<{old}>", f"<{new}>")
        file.write_text(text)
    return beside(model, folder / "tokenizer", folder / "model")


@pytest.fixture(scope="module")
def wide_cache(world: World, text_file: Path, run: Run) -> Path:
    """A stream of a tokenizer of 402 ids, where all models of 416 columns have a column for each."""
    tokenizer = add_tokens(world.tokenizer, world.folder / "two", EXTRA, "<second>")
    succeeded(
        run("logit-cache", "tokenize", "--text", text_file, "--tokenizer", tokenizer, "--out", world.folder / "wide")
    )
    return world.folder / "wide"


def test_ids_that_only_one_side_has_are_named(
    world: World, wide_cache: Path, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fewer or more added tokens, as chat models have, for teacher, student and evaluation."""
    more = with_strings(world, tmp_path / "more", world.padded, "<second>", "<third>")
    for name, model, differing in (
        ("fewer", world.padded, "id 401: '<second>' here, nothing in the model's"),
        ("more", more, "id 402: nothing here, '<third>' in the model's"),
    ):
        succeeded(run("cache-logits", "--cache", wide_cache, "--teacher", model, "--name", name, "-k", 16,
                   "--fields", "all", *WINDOWS))  # fmt: skip
        assert [differing in record.message for record in caplog.records] == [True]
        caplog.clear()
        line = ("--cache", wide_cache, "--teacher", name)
        done = succeeded(
            run("train-student", *line, "--model", model, *STUDENT, "--output-dir", tmp_path / name / "out")
        )
        assert done.stderr.count(differing) == 1
        done = succeeded(run("logit-cache", "evaluate", model, *line, *STUDENT[:2]))
        assert done.stderr.count(differing) == 1
        done = succeeded(run("logit-cache", "audit", wide_cache, "--name", name, "--teacher", model, "--windows", 4))
        assert differing in done.stdout


def test_an_id_of_the_text_that_the_model_has_no_string_for_is_refused(
    world: World, small_cache: Path, make_teacher: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    """Though its head has a column, as padded heads do."""
    padded = beside(make_teacher(1, vocabulary_size=416), small_cache / "tokenizer", tmp_path / "model")
    words = (f"id 400: {EXTRA!r} here, nothing in the model's", "first at position", f"--tokenizer {padded}")
    on_text, output = ("--cache", world.with_extra), ("--output-dir", tmp_path / "out")
    refused(run("cache-logits", *on_text, "--teacher", padded, "--name", "a", *WINDOWS), *words)
    refused(run("train-student", *on_text, "--model", padded, "--alpha", 1, *STUDENT, *output), *words)
    assert not (world.with_extra / "teachers" / "a").exists()
    assert not (tmp_path / "out").exists()


def test_strings_that_contradict_each_other_are_refused_where_targets_can_name_the_id(
    world: World, wide_cache: Path, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = with_strings(world, tmp_path / "other", world.padded, "<second>", second="tool")
    words = ("id 401: '<second>' here, '<tool>' in the model's",)
    line = ("cache-logits", "--cache", wide_cache, "--name", "b", "-k", 16, *WINDOWS)
    refused(run(*line, "--teacher", other), *words)
    # No target of a teacher of 400 columns is about that id.
    short = with_strings(world, tmp_path / "short", world.teacher, "<second>", second="tool")
    caplog.clear()
    succeeded(run(*line, "--teacher", short))
    assert any(words[0] in record.message for record in caplog.records)
    shutil.rmtree(wide_cache / "teachers" / "b")


def test_members_may_contradict_each_other_where_the_cache_has_no_id(
    world: World, wide_cache: Path, run: Run, tmp_path: Path
) -> None:
    """Their columns for it are dropped; where the cache has the id, they are refused."""
    second = with_strings(world, tmp_path / "second", world.padded, "<second>")
    tool = with_strings(world, tmp_path / "tool", world.padded, "<second>", second="tool")
    members = ("--teacher", second, "--teacher", tool, "--combine", "mixture", "--name", "c", "-k", 16, *WINDOWS)
    refused(run("cache-logits", "--cache", wide_cache, *members), f"{tool}: its tokenizer is not the one of {second}")
    succeeded(run("cache-logits", "--cache", copy_of(world.cache, tmp_path / "cache"), *members))


def test_a_cache_shared_without_its_text_is_refused_where_the_text_would_tell(
    world: World, wide_cache: Path, run: Run, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    succeeded(run("logit-cache", "push", wide_cache, shared, "--without-tokens"))
    words = ("shared without its tokens",)
    refused(run("cache-logits", "--cache", shared, "--teacher", world.padded, "--name", "a", *WINDOWS), *words)
    output = ("--output-dir", tmp_path / "out")
    line = ("--cache", shared, "--alpha", 1, "--model", world.padded)
    refused(run("train-student", *line, *STUDENT, *output), *words)
    assert not (tmp_path / "out").exists()
