"""Audits of imported entries with a live model: a real Llama's own distributions in somebody's files, and what is not
its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.caches.imported import K, Known, V, columns, imported, tokenizer_folder, write
from support.caches.small import dense_targets, entry_2
from support.commands import Run, refused
from support.servers.engine import StandIn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from logit_cache.fidelity.audit import Audit, AuditJob, audit
from logit_cache.fidelity.plausibility import plausibility
from logit_cache.fidelity.rescore import FIELDS, stored_values
from logit_cache.fidelity.stated_errors import mass_error, stated_error
from storage.format.manifest.entry import TeacherEntry
from storage.format.stored import StoredTargets
from storage.format.targets import SparseTargets

LENGTHS = (23, 40, 9, 31, 48, 17, 36, 28, 44, 12)
Columns = dict[str, list[Any]]


def llama(folder: Path, seed: int) -> Path:
    """A random Llama whose distributions are neither sharp nor flat, with its tokenizer."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=V, max_position_embeddings=64, initializer_range=0.5, bos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(tokenizer_folder(folder))
    return (folder / "tokenizer").rename(folder / f"llama-{seed}")


def read_by(model: Path, tokens: list[np.ndarray], begin: tuple[int, ...] = (), dtype: Any = torch.float32) -> Known:
    """Documents and the model's own log-probs after each of their tokens, which it reads behind `begin`."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    logprobs = []
    with torch.inference_mode():
        for ids in tokens:
            logits = loaded(torch.tensor([[*begin, *ids.tolist()]])).logits[0, len(begin) :]
            logprobs.append(torch.log_softmax(logits.double(), -1).numpy())
    return Known(tokens, logprobs)


def written_by(model: Path) -> list[np.ndarray]:
    """Documents that the model wrote: their tokens are likely, as in the text that a teacher was trained on."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    torch.manual_seed(0)
    found = []
    for length in LENGTHS:
        ids = torch.tensor([[2 + length]])
        with torch.inference_mode():
            for _ in range(length - 1):
                ids = torch.cat([ids, loaded(ids).logits[:, -1].softmax(-1).multinomial(1)], dim=1)
        found.append(ids[0].numpy())
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("models"), 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("models"), 1)


@pytest.fixture(scope="module")
def data(model: Path) -> Known:
    return read_by(model, written_by(model))


def audit_of(cache: Path, teacher: object, **fields: Any) -> Audit:
    return audit(AuditJob(str(cache), (str(teacher),), **{"windows": 24, "seed": 1, "device": "cpu", **fields}))


def as_logits(found: Columns) -> None:
    found["logprobs"] = [[[value + 7.5 for value in row] for row in rows] for rows in found["logprobs"]]


def by_id(found: Columns) -> None:
    """Ids ascending, of each row another number of them, and none in some rows."""
    for ids, values in zip(found["token_ids"], found["logprobs"], strict=True):
        for row in range(len(ids)):
            kept = sorted(zip(ids[row], values[row], strict=True))[: K if row % 3 else 0]
            best = sorted(kept, key=lambda pair: -pair[1])[: K - row % 5]
            ids[row], values[row] = [pair[0] for pair in sorted(best)], [pair[1] for pair in sorted(best)]


def as_they_are(found: Columns) -> None:
    del found


HONEST: dict[str, tuple[Callable[[Columns], None], tuple[object, ...]]] = {
    "codes": (as_they_are, ()),
    "float32": (as_they_are, ("--encoding", "float32")),
    "fewer ids": (as_they_are, ("-k", 3)),
    "ids of any order and number": (by_id, ("--encoding", "float32")),
    "logits": (as_logits, ()),
    "logits in float32": (as_logits, ("--encoding", "float32")),
    "logits of fewer ids": (as_logits, ("--encoding", "float32", "-k", 3)),
}


@pytest.mark.parametrize("name", HONEST)
def test_its_own_distributions_are_consistent_and_another_s_are_not(
    name: str, data: Known, model: Path, other: Path, tmp_path: Path
) -> None:
    change, options = HONEST[name]
    found = columns(data)
    change(found)
    entry = imported(tmp_path, write(tmp_path / "d.parquet", found), "parquet", *options)
    targets = entry.entry.targets
    assert targets.has("tail") == (not name.startswith("logits"))
    audited = audit_of(tmp_path / "cache", model)
    assert audited.consistent, (audited.problems, audited.fields)
    assert set(audited.fields) == {"logprobs", "token_ids"} | ({"log_tail"} if targets.has("tail") else set())
    assert "made what was imported, its weights not verified" in audited.identity[0]
    assert "dtype: not recorded, now 'float32'" in audited.execution
    assert any("not known: log-probs are compared with each other" in line for line in audited.uncompared) == (
        not targets.has("tail")
    )
    assert plausibility(str(tmp_path / "cache"), windows=24).plausible
    found_other = audit_of(tmp_path / "cache", other)
    assert len(found_other.differing) == found_other.windows
    assert found_other.controls[-1] == "the same weights in bfloat16"


@pytest.mark.parametrize("values", ["logprobs", "logits"])
def test_numbers_of_a_half_precision_are_explained_by_it(values: str, model: Path, data: Known, tmp_path: Path) -> None:
    """No dtype is recorded: what bfloat16 rounds is allowed for, and no more."""
    found = columns(read_by(model, data.tokens, dtype=torch.bfloat16))
    if values == "logits":
        as_logits(found)
    imported(tmp_path, write(tmp_path / "d.parquet", found), "parquet", "--encoding", "float32")
    audited = audit_of(tmp_path / "cache", model)
    assert audited.consistent, audited.fields
    assert audited.controls[-1] == "the same weights in bfloat16"
    assert audited.fields["logprobs"].largest_beyond > 1e-3


def two_on(data: Known, model: Path) -> Columns:
    del model
    found = columns(data)
    return {**found, **{name: [rows[1:] for rows in found[name]] for name in ("token_ids", "logprobs")}}


def behind_bos(data: Known, model: Path) -> Columns:
    return columns(read_by(model, data.tokens, begin=(1,)))


def sharper(data: Known, model: Path) -> Columns:
    """Logits over a temperature of 1/2: without a normaliser, only their distances tell."""
    del model
    found = columns(data)
    found["logprobs"] = [[[2 * value for value in row] for row in rows] for rows in found["logprobs"]]
    as_logits(found)
    return found


@pytest.mark.parametrize("lie", [two_on, behind_bos, sharper])
@pytest.mark.parametrize("encoding", ["codes", "float32"])
def test_what_the_model_does_not_say_is_found(
    lie: Callable[[Known, Path], Columns], encoding: str, data: Known, model: Path, tmp_path: Path, run: Run
) -> None:
    given = ("--alignment", "after") if lie is not sharper else ()
    path = write(tmp_path / "d.parquet", lie(data, model))
    imported(tmp_path, path, "parquet", "--encoding", encoding, *given)
    done = run("logit-cache", "audit", tmp_path / "cache", "--teacher", model, "--device", "cpu", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["consistent"]) == (1, False)
    assert len(found["differing"]) == found["windows"]
    # Without the model only rows of other tokens show.
    assert plausibility(str(tmp_path / "cache"), windows=24).plausible == (lie is not two_on)


def test_a_model_that_reads_less_than_the_documents_is_refused(
    data: Known, model: Path, tmp_path: Path, run: Run
) -> None:
    imported(tmp_path, write(tmp_path / "d.parquet", columns(data)), "parquet")
    short = tmp_path / "short"
    shorter = LlamaConfig.from_pretrained(model, max_position_embeddings=40)
    LlamaForCausalLM(shorter).save_pretrained(short)
    done = run("logit-cache", "audit", tmp_path / "cache", "--teacher", short, "--device", "cpu")
    refused(done, "reads at most 40 tokens at once", "read 48")


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[StandIn]:
    with StandIn("vllm", model, None, "m", 64, 64) as running:
        yield running


@pytest.mark.parametrize("name", ["codes", "logits in float32"])
def test_against_a_server(name: str, data: Known, model: Path, other: Path, engine: StandIn, tmp_path: Path) -> None:
    change, options = HONEST[name]
    found = columns(data)
    change(found)
    imported(tmp_path, write(tmp_path / "d.parquet", found), "parquet", *options)
    audited = audit_of(tmp_path / "cache", engine.url)
    assert audited.consistent, (audited.problems, audited.fields)
    assert "the entry was not made by a server" in audited.identity[0]
    engine.serve(other)
    try:
        assert not audit_of(tmp_path / "cache", engine.url).consistent
    finally:
        engine.serve(model)


def off_by(logprobs: np.ndarray, most: float) -> np.ndarray:
    """Log-probs that a format rounded, by at most so much."""
    return logprobs + np.random.default_rng(3).uniform(-most, most, logprobs.shape)


@pytest.mark.parametrize("encoding", ["codes", "float32"])
@pytest.mark.parametrize("values", ["dense", "logprobs"])
def test_the_rounding_of_a_source_is_part_of_the_stated_error(
    values: str, encoding: str, data: Known, tmp_path: Path
) -> None:
    """Of whole distributions, which are normalised again, and of log-probs whose sum gives the mass outside them."""
    error = 0.02
    path = write(tmp_path / "d.parquet", columns(data))
    entry = imported(tmp_path, path, "parquet", "--encoding", encoding).entry
    source = entry.imported_from
    assert source is not None
    rounded = source.model_copy(update={"error_nats": error, "values": values})
    fields = ("entropy", "half-tail", "label") if values == "dense" else ()
    entry = TeacherEntry.model_validate(
        dict(entry_2(entry, *fields, encoding=encoding, made="imported")) | {"imported_from": rounded}
    )
    labels = np.concatenate([np.append(tokens[1:], -1) for tokens in data.tokens])
    exact = np.concatenate(data.logprobs)
    theirs = off_by(exact, error)
    if values == "dense":
        given = dense_targets(theirs, K, labels)
    else:
        # Of an id whose rank changed the number is another's: ranks are those of the file.
        order = np.argsort(-theirs, axis=1)[:, :K]
        of_ids = np.take_along_axis(theirs, order, axis=1)
        tail = np.log(1 - np.exp(of_ids).sum(axis=1))
        given = replace(dense_targets(theirs, K, labels), logprobs=of_ids.astype(np.float32), log_tail=tail)
    found = stored_values(entry, StoredTargets.of(entry, given).decoded())
    expected = stored_values(entry, at_ids(exact, given, labels))
    for name in FIELDS:
        off, stated = np.abs(found[name] - expected[name]), stated_error(entry, name, found[name])
        assert not (off > stated + 1e-4).any(), name
    assert (mass_error(entry) > error) == (values == "logprobs")
    assert np.nanmax(np.abs(found["logprobs"] - expected["logprobs"])) > error / 2


def at_ids(logprobs: np.ndarray, given: SparseTargets, labels: np.ndarray) -> SparseTargets:
    """Targets of whole distributions [T, V] at the ids of others, in their order."""
    ids = given.token_ids.astype(np.int64)
    outside = logprobs.copy()
    np.put_along_axis(outside, ids, -np.inf, axis=1)
    return replace(
        dense_targets(logprobs, given.k, labels),
        token_ids=given.token_ids,
        logprobs=np.take_along_axis(logprobs, ids, axis=1).astype(np.float32),
        log_tail=np.logaddexp.reduce(outside, axis=1),
        log_tail_half=np.logaddexp.reduce(outside / 2, axis=1),
    )
