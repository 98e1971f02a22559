"""Audits with a teacher behind a server, and of entries that one made."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import Run, refused
from support.jobs import cache_logits
from support.servers.engine import StandIn

from logit_cache.fidelity.audit import Audit, AuditJob, audit
from logit_cache.fidelity.plausibility import plausibility
from logit_cache.fidelity.rescore import stored_values
from logit_cache.fidelity.stated_errors import stated_error
from storage import LogitCache
from storage.format.manifest.entry import TeacherEntry

FIELDS = {"k": 12, "targets": "topk", "fidelity_positions": 0, "context_tokens": 64}


@pytest.fixture(scope="module")
def engine(teacher: Path, small_cache: Path) -> Iterator[StandIn]:
    with StandIn("vllm", teacher, small_cache / "tokenizer", "m", 64, 128) as running:
        yield running


@pytest.fixture(scope="module")
def audited(
    engine: StandIn,
    teacher: Path,
    small_cache: Path,
    run: Run,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A small stream with an entry of a served teacher in codes, one in float32, and one of the model in process."""
    folder = tmp_path_factory.mktemp("audited")
    (folder / "text.txt").write_text(text_file.read_text(encoding="utf-8")[:3_000], encoding="utf-8")
    line = ("--text", folder / "text.txt", "--tokenizer", small_cache, "--out", folder / "cache")
    assert run("logit-cache", "tokenize", *line).returncode == 0
    cache_logits(folder / "cache", "codes", engine.url, **FIELDS)  # type: ignore[arg-type]
    cache_logits(folder / "cache", "exact", engine.url, **FIELDS, encoding="float32")  # type: ignore[arg-type]
    cache_logits(folder / "cache", "local", teacher, **FIELDS)
    no_ids = {"targets": "none", "context_tokens": 64}
    cache_logits(folder / "cache", "labels", engine.url, **no_ids)  # type: ignore[arg-type]
    return folder / "cache"


def audit_of(cache: Path, name: str, *teachers: object, **fields: Any) -> Audit:
    return audit(AuditJob(str(cache), tuple(map(str, teachers)), name, windows=8, seed=1, **fields))


@pytest.mark.parametrize("name", ["codes", "exact", "local", "labels"])
def test_an_entry_is_consistent_with_server_and_files(audited: Path, engine: StandIn, teacher: Path, name: str) -> None:
    for live in (engine.url, teacher):
        found = audit_of(audited, name, live)
        assert found.consistent, (found.problems, found.differing)
        there = {"label_logprob"} if name == "labels" else {"logprobs", "token_ids", "log_tail"}
        assert there <= found.fields.keys()
    assert len(found.identity) == (name != "local")
    assert all("its weights not verified" in line for line in found.identity)


@pytest.mark.parametrize("name", ["codes", "exact", "local"])
def test_rows_are_possible_ones(audited: Path, name: str) -> None:
    """Of a model that knows nothing of the text, which is all that an audit without a teacher has against it."""
    found = plausibility(str(audited), name, windows=100)
    assert {"distinct", "outside"} <= found.checks.keys()
    assert all(check.broken == 0 for check in found.checks.values())
    assert ["mean log-prob" in problem for problem in found.problems] == [True]


@pytest.mark.parametrize("name", ["codes", "exact", "labels"])
def test_another_model_is_not_consistent(
    audited: Path, engine: StandIn, teacher: Path, make_teacher: Callable[..., Path], name: str
) -> None:
    other = make_teacher(5)
    assert not audit_of(audited, name, other).consistent
    engine.serve(other)
    found = audit_of(audited, name, engine.url)
    engine.serve(teacher)
    assert not found.consistent
    assert any(line.startswith("probe: the entry has") for line in found.identity)


def test_the_tolerance_is_what_asking_twice_differs_by(audited: Path, engine: StandIn) -> None:
    """A server whose answers to one prompt differ by 2e-3 from each other is consistent with itself."""
    answer, asked, one_at_a_time = engine.answer, Counter[str](), threading.Lock()

    def noisy(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with one_at_a_time:
            asked[str(body)] += 1
            engine.shift = -2e-3 * (asked[str(body)] % 2)
            return answer(path, body)

    engine.answer = noisy  # type: ignore[method-assign]
    found = audit_of(audited, "exact", engine.url)
    engine.answer, engine.shift = answer, 0.0  # type: ignore[method-assign]
    assert found.consistent
    assert found.fields["logprobs"].noise_mean > 1e-4
    assert found.fields["logprobs"].largest_beyond > 1e-4


def test_sampled_ids_are_for_a_teacher_in_process(audited: Path, engine: StandIn, teacher: Path, run: Run) -> None:
    cache_logits(audited, "sampled", teacher, **{**FIELDS, "targets": "varopt"})
    line = ("logit-cache", "audit", audited, "--name", "sampled", "--teacher", engine.url)
    refused(run(*line), "holds sampled ids, and a server gives its likeliest alone")


@pytest.mark.parametrize("name", ["codes", "exact"])
def test_the_mass_outside_has_the_server_s_error(audited: Path, name: str) -> None:
    """3e-5 of mass: 3e-3 nats of a mass of a hundredth, beside what the encoding states; less is not told from it."""
    teacher = LogitCache.open(str(audited)).teacher(name)
    entry: TeacherEntry = teacher.entry
    row = teacher.read(0, 1)
    sure = [replace(row, log_tail=np.log([mass])) for mass in (1e-9, 1e-6)]
    assert stored_values(entry, sure[0])["log_tail"] == stored_values(entry, sure[1])["log_tail"]
    log_tail = np.log(0.01 / 0.99) if name == "codes" else np.log(0.01)
    half = (entry.encoding.step_nats or 0.0) / 2
    (error,) = stated_error(entry, "log_tail", np.array([log_tail])) - half
    assert error == pytest.approx(2.0**-15 / 0.01, rel=0.01)
    assert stated_error(entry, "label_logprob", np.array([-1.0])) < 1e-3 + (entry.encoding.value_step_nats or 0)
