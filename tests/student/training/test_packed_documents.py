"""Runs whose windows are shared by documents that must not see each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from support.caches.small import dense_targets, make_corpus, make_entry, write_entry
from support.caches.streams import chat_lengths
from support.models.students import GPT
from support.runs import GPT2, KILLED, LLAMA, NOTED, V, arguments, have_equal_weights, job_in, ranks

from storage.errors import IdentityMismatch, InputError
from storage.format.manifest.entry import Windowing
from student.data.windows import DistillationWindows
from student.evaluation.held_out import held_out
from student.job import StudentJob
from student.models.loading import load_student
from student.training.defaults import open_fields
from student.training.run import train

SHARDED = "from support.programs import fsdp_ranks; fsdp_ranks.on_cpus()\n" + NOTED
ISOLATED = Windowing(context_tokens=40, stride_tokens=40, isolate_documents=True)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches `train` and `held` of short documents, each read by itself, whose last part is trained; configurations."""
    folder = tmp_path_factory.mktemp("chats")
    for name, documents in (("train", 150), ("held", 40)):
        lengths = chat_lengths(documents, 9, 40)
        starts = np.cumsum(lengths) - lengths
        tokens = np.random.default_rng(documents).integers(0, V, int(lengths.sum())).astype(np.uint16)
        mask = (np.arange(len(tokens)) - np.repeat(starts, lengths)) * 2 >= np.repeat(lengths, lengths)
        record = make_corpus(str(folder / name), tokens, V, document_starts=starts, loss_mask=mask)
        labels = np.append(tokens[1:], -1).astype(np.int64)
        labels[starts[1:] - 1] = -1
        targets = dense_targets(np.random.default_rng(4).normal(size=(V, V))[tokens], 9, labels)
        write_entry(str(folder / name), "a", make_entry(record, 9, windowing=ISOLATED), targets)
    opt = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for family, config in {"llama": LLAMA, "gpt2": GPT2 | GPT, "opt": opt | {"dropout": 0.0}}.items():
        (folder / f"{family}.json").write_text(json.dumps({k: v for k, v in config.items() if k != "vocab_size"}))
    return folder


def job_of(chats: Path, output: Path, **changes: Any) -> StudentJob:
    training = {"per_device_train_batch_size": 4, "max_steps": 12, "save_steps": 4, **changes.pop("training", {})}
    return job_in(chats, output, teachers=["a"], temperature=1, eval_cache=str(chats / "held"), training=training,
                  **changes)  # fmt: skip


def held(chats: Path) -> DistillationWindows:
    return DistillationWindows(str(chats / "held"), ["a"], 16, pack_documents=False)


@pytest.mark.parametrize(("family", "how"), [("llama", "packed"), ("opt", "not packed")])
def test_a_run_packs_and_measures_what_windows_of_one_document_each_do(
    chats: Path, tmp_path: Path, family: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    report = train(job_of(chats, tmp_path / "out", model=str(chats / f"{family}.json")))
    assert report.isolated_documents
    assert (how in caplog.text) == (family == "opt")
    alone = held(chats)
    assert report.tokens_trained / report.tokens_seen == pytest.approx(0.5, abs=0.1)
    assert report.tokens_seen > 12 * 4 * 16 * 0.85, "rows are nearly full"
    model = load_student(str(tmp_path / "out"), vocabulary_size=V, special_ids={}, window_tokens=16, seed=0).eval()
    found = held_out(model, alone)
    assert found.tokens == report.held_out.tokens == alone.trained_positions(range(len(alone)))
    assert found.cross_entropy == pytest.approx(report.held_out.cross_entropy, abs=1e-5)
    assert found.kl["a"].nats == pytest.approx(report.held_out.kl["a"].nats, abs=1e-5)
    assert held_out(model, DistillationWindows(str(chats / "held"), ["a"], 16)).cross_entropy == pytest.approx(
        found.cross_entropy, abs=1e-5
    )


def test_a_run_that_was_begun_with_padded_windows_ends_so(chats: Path, tmp_path: Path) -> None:
    """As one of an earlier version, whose record does not name them."""
    padded = train(job_of(chats, tmp_path / "out", pack_documents=False))
    record = json.loads((tmp_path / "out/run.json").read_text())
    del record["identity"]["pack_documents"]
    (tmp_path / "out/run.json").write_text(json.dumps(record))
    assert train(job_of(chats, tmp_path / "out")) == padded
    assert padded.tokens_seen < 12 * 4 * 16 * 0.7
    with pytest.raises(IdentityMismatch, match="pack_documents: the run has None, this job True"):
        train(job_of(chats, tmp_path / "out", pack_documents=True))


def test_who_decides_whether_a_job_packs(chats: Path, tmp_path: Path) -> None:
    def packs(record: dict[str, Any], *swept: str, **changes: Any) -> bool | None:
        found: bool | None = open_fields(job_of(chats, tmp_path / "out", **changes), record, swept)["pack_documents"]
        return found

    assert packs({}) is True
    assert packs({}, loss_scale="babyllama") is False
    assert packs({}, "loss_scale") is None, "each trial follows its own"
    assert packs({"identity": {}, "launch": {"pack_documents": None}}, "loss_scale") is None
    assert packs({"identity": {"pack_documents": True}}) is True
    assert packs({"identity": {}, "launch": {"processes": 1}}) is False, "of an earlier version"
    with pytest.raises(ValidationError, match="loss_scale babyllama sums over windows, which packed documents share"):
        job_of(chats, tmp_path / "out", loss_scale="babyllama", pack_documents=True)
    job = job_of(chats, tmp_path / "out", pack_documents=True)
    with pytest.raises(InputError, match="--pack-documents is about windows that stay inside documents"):
        train(job.model_copy(update={"teachers": (), "alpha": 1.0}))


@pytest.mark.slow
def test_a_sharded_student_packs_as_one_process_does_or_is_refused(chats: Path, tmp_path: Path) -> None:
    """The model is tried out inside its own forward, where its weights are gathered."""

    def sharded(family: str, name: str) -> tuple[StudentJob, list[str]]:
        fields = {"model": str(chats / f"{family}.json"), "training": {"per_device_train_batch_size": 2}}
        job = job_of(chats, tmp_path / name, windows_per_step=4, **fields)
        return job, [*arguments(job), "--windows-per-step", "4", "--set", "fsdp=true"]

    alone, line = sharded("llama", "alone")
    train(alone)
    _, line = sharded("llama", "sharded")
    ended = ranks(2, SHARDED, *line, NOTES=str(tmp_path / "notes"))
    assert [one.returncode for one in ended] == [0, 0], ended[0].stderr
    assert have_equal_weights(tmp_path / "alone", tmp_path / "sharded", atol=1e-4)
    _, line = sharded("opt", "refused")
    refused = ranks(2, SHARDED, *line, NOTES=str(tmp_path / "others"))
    assert [one.returncode for one in refused] == [2, 2]
    assert "give --pad-documents" in refused[0].stderr + refused[1].stderr


@pytest.mark.slow
def test_processes_kills_and_restarts_leave_the_same_run(chats: Path, tmp_path: Path) -> None:
    jobs = [
        job_of(chats, tmp_path / name, training={"per_device_train_batch_size": at_once, "ddp_backend": "gloo"})
        for name, at_once in (("alone", 4), ("two", 2))
    ]
    train(jobs[0])
    killed = ranks(2, KILLED.replace("{step}", "6"), *arguments(jobs[1]))
    assert {one.returncode for one in killed} & {9}
    ended = ranks(2, None, "train-student", *arguments(jobs[1]))
    assert [one.returncode for one in ended] == [0, 0], ended[0].stderr
    assert have_equal_weights(tmp_path / "alone", tmp_path / "two", atol=1e-4)
    shutil.rmtree(tmp_path / "two")
