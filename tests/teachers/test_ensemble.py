"""Ensembles: logits against the members' own, side by side in chunks, and as one entry of a cache."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import transformers
from support.commands import Run, refused, succeeded
from support.jobs import cache_logits, refusal
from support.models.saved import load, own_logits
from support.models.short_heads import beside, swap_ids
from torch import Tensor

from storage import LogitCache
from storage.errors import InputError
from storage.format.encoding import logprob_floor
from storage.format.manifest.teacher import Teacher as TeacherRecord
from storage.format.manifest.teacher import TeacherIdentity
from teachers.ensemble import EnsembleTeacher
from teachers.reduction.reduce import InvalidLogits, reduce_topk

V = 400


class Table:
    """A teacher whose logits are a table [rows, columns]; it counts the rows that it has yielded."""

    def __init__(self, logits: Tensor, chunk: int, head: Literal["fast", "general"] = "fast") -> None:
        self.logits, self.chunk, self.given = logits, chunk, 0
        self.head_columns, self.device = logits.shape[1], torch.device("cpu")
        self.head: Literal["fast", "general"] = head
        self.attention = "sdpa" if head == "fast" else "eager"
        self.identity = TeacherRecord(
            members=(
                TeacherIdentity(
                    source=f"table-{chunk}",
                    architecture="Table",
                    weights_sha256="0" * 64,
                    config_sha256="0" * 64,
                    dtype="float32",
                    head_columns=self.head_columns,
                    parameters=0,
                ),
            )
        )

    def packs(self, length: int) -> bool:
        return True

    def score(self, windows: Tensor, rows: Tensor, positions: Tensor | None = None) -> Iterator[Tensor]:
        wanted = self.logits[rows]
        for start in range(0, len(rows), self.chunk):
            self.given = min(start + self.chunk, len(rows))
            yield wanted[start : start + self.chunk]


def table(columns: int, seed: int, rows: int = 50, scale: float = 5.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def score(teacher: EnsembleTeacher, rows: int = 50) -> list[Tensor]:
    return list(teacher.score(torch.zeros(1, rows, dtype=torch.int64), torch.arange(rows)))


@pytest.fixture(scope="session")
def models(make_teacher: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of one tokenizer: heads of exactly V columns, padded to 416, and a softcapped one on the general
    path, padded to 448. Softmax must not see the padding."""
    softcapped = transformers.Gemma2Config(
        vocab_size=448, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, max_position_embeddings=128, initializer_range=0.5, query_pre_attn_scalar=8,
        final_logit_softcapping=10.0, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("gemma") / "gemma2"
    transformers.AutoModelForCausalLM.from_config(softcapped).save_pretrained(path)
    return [make_teacher(0), make_teacher(1, vocabulary_size=416), path]


@pytest.mark.parametrize("budget_rows", [1, 7, 10_000])
def test_logit_mean_is_the_mean_of_the_members_logits(models: list[Path], budget_rows: int) -> None:
    """As BabyLlama averages, before truncation: torch.stack(logits).mean(0) within 1e-5, in the softmax as well."""
    windows = torch.randint(V, (3, 24), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([*range(24), *range(40, 48), 60, 71])
    members = torch.stack([own_logits(path, windows)[rows, :V] for path in models])
    loaded = [load(path, logit_budget_bytes=4 * 448 * budget_rows) for path in models]
    ensemble = EnsembleTeacher(loaded, "logit-mean", V)
    chunks = list(ensemble.score(windows, rows))
    assert max(map(len, chunks)) <= max(budget_rows, 24)
    found = torch.cat(chunks)
    assert found.shape == (len(rows), V)
    torch.testing.assert_close(found, members.mean(0), atol=1e-5, rtol=0)
    for temperature in (1, 2):
        mean = torch.log_softmax(members.mean(0) / temperature, 1)
        torch.testing.assert_close(torch.log_softmax(found / temperature, 1), mean, atol=1e-5, rtol=0)

    mixture = EnsembleTeacher(loaded, "mixture", V, [1, 2, 5])
    found = torch.cat(list(mixture.score(windows, rows)))
    shares = torch.tensor([1, 2, 5]).double()[:, None, None] / 8
    expected = (shares * torch.softmax(members.double(), 2)).sum(0)
    torch.testing.assert_close(found.double(), expected.log(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.double().exp().sum(1), torch.ones(len(rows)).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("combine", ["logit-mean", "mixture"])
def test_members_with_other_chunks_stay_aligned(combine: Literal["logit-mean", "mixture"]) -> None:
    tables = [table(columns, seed) for seed, columns in enumerate((10, 13, 10))]
    whole = torch.cat(score(EnsembleTeacher([Table(t, 50) for t in tables], combine, 10)))
    for sizes in ((1, 1, 1), (7, 50, 3), (8, 4, 2), (49, 50, 1)):
        cut = score(EnsembleTeacher([Table(t, n) for t, n in zip(tables, sizes, strict=True)], combine, 10))
        torch.testing.assert_close(torch.cat(cut), whole, atol=2e-6, rtol=0)
        assert max(map(len, cut)) <= min(sizes)


def test_members_run_side_by_side() -> None:
    """No member is a chunk ahead, so the logits of more than one chunk of each never exist."""
    members = [Table(table(10, seed), chunk) for seed, chunk in enumerate((8, 4))]
    done = 0
    for chunk in EnsembleTeacher(members, "mixture", 10).score(torch.zeros(1, 50), torch.arange(50)):
        done += len(chunk)
        assert [done <= member.given <= done + member.chunk for member in members] == [True, True]
    assert done == 50


def test_masked_and_broken_members() -> None:
    a, b = table(30, 0), table(30, 1)
    a[:, 5] = -math.inf
    mean = torch.cat(score(EnsembleTeacher([Table(a, 50), Table(b, 50)], "logit-mean", 30)))
    mixture = torch.cat(score(EnsembleTeacher([Table(a, 50), Table(b, 50)], "mixture", 30)))
    assert bool((mean[:, 5] == -math.inf).all()), "an id that one member rules out has no mass in the mean of logits"
    torch.testing.assert_close(mixture[:, 5], torch.log_softmax(b, 1)[:, 5] - math.log(2))
    a[3] = math.nan
    for combine in ("logit-mean", "mixture"):
        logits = torch.cat(score(EnsembleTeacher([Table(a, 50), Table(b, 50)], combine, 30)))
        with pytest.raises(InvalidLogits, match="row 3"):
            reduce_topk(logits, 30, 4, torch.zeros(50, dtype=torch.int64), logprob_floor(1 / 32))


def test_the_attributes_of_an_ensemble() -> None:
    members = [Table(table(12, 0), 3), Table(table(10, 1), 4, head="general")]
    found = EnsembleTeacher(members, "mixture", 10, [1, 3])
    assert found.identity.combine == "mixture"
    assert [member.source for member in found.identity.members] == ["table-3", "table-4"]
    assert found.identity.weights == (0.25, 0.75)
    assert (found.head, found.attention, found.head_columns) == ("general", "sdpa, eager", 10)
    assert EnsembleTeacher(members, "logit-mean", 10).identity.weights == (0.5, 0.5)
    with pytest.raises(InputError, match="table-4: its head has 10 columns, the vocabulary 11"):
        EnsembleTeacher(members, "mixture", 11)


def test_a_cached_logit_mean(cache: Path, models: list[Path], run: Run) -> None:
    """Stored values, record and resume of an ensemble with differently padded heads."""
    members = [word for path in models for word in ("--teacher", path)]
    done = succeeded(run(
        "cache-logits", "--cache", cache, "--name", "mean", *members, "--combine", "logit-mean",
        "--context-tokens", 64, "-k", 20, "--targets", "topk", "--encoding", "float32", "--json",
    ))  # fmt: skip
    assert json.loads(done.stdout)["combine"] == "logit-mean"
    opened = LogitCache.open(str(cache))
    record = opened.teacher("mean").entry.teacher
    assert [member.head_columns for member in record.members] == [400, 416, 448]
    assert record.weights == pytest.approx((1 / 3,) * 3)
    stored = opened.teacher("mean").read(0, 256)
    windows = torch.from_numpy(opened.tokens.read(0, 256).astype(np.int64)).view(4, 64)
    dense = torch.log_softmax(torch.stack([own_logits(path, windows)[:, :V] for path in models]).mean(0).double(), 1)
    expected = dense.gather(1, torch.from_numpy(stored.token_ids.astype(np.int64))).numpy()
    np.testing.assert_allclose(stored.logprobs, expected, atol=2e-5)
    assert (stored.token_ids == dense.topk(20).indices.numpy()).mean() > 0.999

    same = {"k": 20, "targets": "topk", "encoding": "float32"}
    for members, changed, field in (
        (models, {"combine": "mixture"}, "teacher.combine"),
        (models[::-1], {"combine": "logit-mean"}, "teacher.members.0.source"),
        (models[:2], {"combine": "logit-mean"}, "teacher.members.2"),
        (models, {"combine": "logit-mean", "weight": [1, 1, 2]}, "teacher.weights"),
        (models[:1], {}, "teacher.combine"),
    ):
        assert field in refusal(cache, "mean", *members, **same, **changed)


def test_members_of_other_vocabularies_are_refused(cache: Path, models: list[Path], run: Run, tmp_path: Path) -> None:
    same = beside(models[0], cache / "tokenizer", tmp_path / "same")
    other = beside(models[1], cache / "tokenizer", tmp_path / "other")
    swap_ids(other)
    both = {"k": 20, "combine": "logit-mean"}
    line = refusal(cache, "a", same, other, **both)
    assert all(word in line for word in (str(other), str(same), "id 300", "id 301"))
    # Without tokenizer files beside the first member, the second is compared with the cache's own.
    line = refusal(cache, "a", models[0], other, **both)
    assert all(word in line for word in (str(other), str(cache), "id 300"))
    assert not (cache / "teachers" / "a").exists()
    cache_logits(cache, "a", same, models[1], **both)


def test_wrong_ensembles_are_one_line(
    cache: Path, models: list[Path], make_teacher: Callable[..., Path], run: Run
) -> None:
    two = models[:2]
    done = run("cache-logits", "--cache", cache, "--name", "a", *(f"--teacher={path}" for path in two))
    refused(done, "--combine", "2 times --teacher")
    narrow = make_teacher(2, vocabulary_size=399)
    for members, fields, words in (
        (two, {"combine": "sum"}, ("--combine", "logit-mean")),
        (two, {"combine": "mixture", "weight": [1]}, ("--weight", "1 times")),
        (two, {"combine": "mixture", "weight": [1, 0]}, ("--weight", "greater than 0")),
        (two, {"combine": "mixture", "revision": "main"}, ("--revision", "1 times")),
        (two[:1], {"combine": "mixture"}, ("--combine", "several teachers")),
        (two[:1], {"weight": [1]}, ("--weight", "several teachers")),
        ([two[0], narrow], {"combine": "mixture"}, (narrow.name, "399", "400")),
    ):
        line = refusal(cache, "a", *members, **fields)
        assert all(word in line for word in words), line
    assert not (cache / "teachers" / "a").exists()
