"""An order to draw in: a permutation with like ids beside each other, teachers whose logits come in it, and what it
gains."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers
from support.clusters.thread_ranks import ThreadRanks, on_ranks
from support.models.families import families
from support.models.saved import load, saver
from support.references.reducer import FLOOR
from support.references.varopt import sampling_of
from torch import Tensor

from storage.errors import InputError
from student.models.model_files import find_model
from teachers.base import Teacher
from teachers.ensemble import EnsembleTeacher
from teachers.huggingface.device_map import DeviceMap
from teachers.huggingface.output_layer import OffloadedHead
from teachers.huggingface.scoring import FastPath
from teachers.huggingface.sharded_head import ShardedHead
from teachers.huggingface.teacher import HuggingFaceTeacher
from teachers.ranks import ColumnShard
from teachers.reduction.reduce import reduce_varopt
from teachers.reduction.sampling_order import sampling_order

V, HEAD = 400, 403
FAMILIES = families(HEAD)
CONFIGS = {name: FAMILIES[name] for name in ("llama", "phi", "gemma2")}
CONFIGS["tied"] = lambda: FAMILIES["llama"](tie_word_embeddings=True)
OFFLOADED = DeviceMap("sequential", ("cpu=60KB",), "disk")


def embeddings(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


# ---- the order


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 257, 1_001])
@pytest.mark.parametrize("width", [1, 5])
def test_an_order_is_a_permutation_that_is_repeated(rows: int, width: int) -> None:
    given = embeddings(rows, width)
    order = sampling_order(given)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(rows))
    assert torch.equal(sampling_order(given.clone()), order)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("rows", [5, 300, 600])
def test_a_line_is_sorted(rows: int, scale: float) -> None:
    """Embeddings on a line, far from the origin, come as they lie on it: halves join as their parent was sorted."""
    along = embeddings(rows, 1).exp()
    steps = along[sampling_order((along * embeddings(1, 40, 1) + 10) * scale), 0].diff()
    assert bool((steps >= 0).all() or (steps <= 0).all())


def test_clusters_are_runs() -> None:
    """Halves of equal count, down to single clusters: each is one run of the order."""
    cluster = torch.arange(1_024)[torch.randperm(1_024, generator=torch.Generator().manual_seed(2))] % 16
    corners = torch.tensor([[16.0, 8.0, 4.0, 2.0]]) * (2.0 * ((torch.arange(16)[:, None] >> torch.arange(4)) & 1) - 1)
    found = cluster[sampling_order(corners[cluster] + 0.1 * embeddings(1_024, 4))]
    assert int((found.diff() != 0).sum()) == 15


def test_equal_embeddings_keep_their_ids_order() -> None:
    for rows in (3, 10, 600):
        assert sampling_order(torch.zeros(rows, 8)).tolist() == list(range(rows))
        assert sampling_order(embeddings(1, 8).expand(rows, 8)).tolist() == list(range(rows))
    outlier = torch.ones(9, 4)
    outlier[4] = 2.0
    order = sampling_order(outlier).tolist()
    assert sorted(order) == list(range(9))
    assert [id_ for id_ in order if id_ != 4] == [0, 1, 2, 3, 5, 6, 7, 8]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(value: float) -> None:
    given = embeddings(9, 4)
    given[6, 2] = value
    with pytest.raises(InputError, match="that of id 6 is not finite"):
        sampling_order(given)


# ---- what it gains


@pytest.mark.parametrize(("pivotal", "most"), [(False, 0.5), (True, 0.6)])
def test_the_error_that_reaches_a_student_is_smaller(pivotal: bool, most: float) -> None:
    """E |W^T (w - p)|^2 of embeddings in clusters, over seeds, relative to the order of ids."""
    columns, k, rows, seeds = 512, 16, 40, 40
    weight = (2 * embeddings(32, 12, 1)).repeat(16, 1) + 0.5 * embeddings(columns, 12, 2)
    logits = embeddings(rows, 12, 3) @ weight.T * 0.2 + embeddings(rows, columns, 4)

    def error(order: Tensor) -> float:
        total = 0.0
        for seed in range(seeds):
            named = sampling_of(rows, seed, pivotal=k if pivotal else 0, order=order)
            found = reduce_varopt(logits[:, order], columns, k, torch.arange(rows), FLOOR, named)
            each = found.log_tail.double().exp() / (k - found.certain)
            certain = torch.arange(k) < found.certain[:, None]
            sampled = torch.where(certain, found.logprobs.double().exp(), each[:, None])
            difference = -torch.softmax(logits.double(), 1)
            difference.scatter_add_(1, found.token_ids, sampled)
            total += float((difference @ weight.double()).square().sum())
        return total

    assert error(sampling_order(weight)) < most * error(torch.arange(columns))


# ---- teachers in an order


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return saver(tmp_path_factory.mktemp("ordered"), CONFIGS)


def scored(teacher: Teacher) -> Tensor:
    windows = torch.randint(V, (3, 24), generator=torch.Generator().manual_seed(3))
    return torch.cat(list(teacher.score(windows, torch.tensor([*range(24), *range(40, 48), 71]))))


def an_order() -> Tensor:
    return torch.randperm(V, generator=torch.Generator().manual_seed(7))


def of_head(order: Tensor, columns: int = HEAD) -> Tensor:
    return torch.cat([order, torch.arange(V, columns)])


def own_embeddings(directory: Path) -> Tensor:
    return transformers.AutoModelForCausalLM.from_pretrained(directory).get_output_embeddings().weight.detach()


@pytest.mark.parametrize("device_map", [None, OFFLOADED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_come_in_an_order(
    family: str, dtype: str, device_map: DeviceMap | None, save: Callable[[str], Path]
) -> None:
    teacher = load(save(family), dtype=dtype, device_map=device_map)
    before, order = scored(teacher), an_order()
    ordered = teacher.in_order(order)
    torch.testing.assert_close(scored(ordered), before[:, of_head(order)], atol=1e-5, rtol=1e-5)
    assert torch.equal(scored(teacher), before), "the teacher itself keeps its own"
    torch.testing.assert_close(scored(ordered.in_order(torch.arange(V))), before, atol=1e-5, rtol=1e-5)
    assert (ordered.identity, ordered.head_columns, ordered.head) == (teacher.identity, HEAD, teacher.head)
    path = ordered._path
    assert isinstance(path, FastPath) == (family != "gemma2")
    if device_map is not None and isinstance(path, FastPath) and family != "tied":
        assert isinstance(path.head, OffloadedHead)
    found = ordered.output_embeddings()
    assert (found.dtype, found.device.type) == (torch.float32, "cpu")
    assert torch.equal(found, own_embeddings(save(family)).to(getattr(torch, dtype)).float())


def test_members_of_an_ensemble_come_in_one_order(save: Callable[[str], Path]) -> None:
    members = [load(save(family)) for family in ("llama", "gemma2")]
    ensemble = EnsembleTeacher(members, "mixture", V, [1, 3])
    order = an_order()
    torch.testing.assert_close(scored(ensemble.in_order(order)), scored(ensemble)[:, order], atol=1e-5, rtol=1e-5)

    found = ensemble.output_embeddings()
    assert found.shape == (V, 64)
    for part, family, weight in ((found[:, :32], "llama", 0.25), (found[:, 32:], "gemma2", 0.75)):
        own = own_embeddings(save(family))[:V]
        centred = own - own.mean(0)
        assert float(part.square().sum(1).mean()) == pytest.approx(weight**2, rel=1e-5)
        torch.testing.assert_close(part / part.norm(), centred / centred.norm(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
def test_ranks_exchange_their_columns(family: str, save: Callable[[str], Path]) -> None:
    """Sharded over ranks, each has its run of the columns in order, on the fast path and the model's own forward."""
    directory, order = save(family), an_order()
    whole = scored(load(directory))

    def work(ranks: ThreadRanks) -> tuple[Tensor, Tensor]:
        model = models[ranks.rank]
        teacher = HuggingFaceTeacher(
            model, find_model(str(directory)), "float32", False, 1 << 20, messages.append, ranks
        )
        ordered = teacher.in_order(order)
        assert ordered.head == ("general" if family == "gemma2" else "fast")
        assert ordered.shard is not None
        assert scored(ordered).shape[1] == 202 - ranks.rank
        torch.testing.assert_close(ordered.shard.whole(scored(teacher)), whole, atol=1e-5, rtol=1e-5)
        return ordered.shard.whole(scored(ordered)), teacher.output_embeddings()

    messages: list[str] = []
    models = [transformers.AutoModelForCausalLM.from_pretrained(directory).eval() for _ in range(2)]
    for model in models:
        model.requires_grad_(False)
    for logits, found in on_ranks(2, work):
        torch.testing.assert_close(logits, whole[:, of_head(order)], atol=1e-5, rtol=1e-5)
        assert torch.equal(found, own_embeddings(directory))


@pytest.mark.parametrize("runs", [((0, 0), (0, 150), (150, 200)), ((0, 199), (199, 199), (199, 200))])
def test_ranks_of_any_width_exchange_their_columns(runs: Sequence[tuple[int, int]]) -> None:
    weight, bias, hidden = embeddings(200, 70), embeddings(200, 1, 1)[:, 0], embeddings(5, 70, 2)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))

    def work(ranks: ThreadRanks) -> Tensor:
        shard = ColumnShard(ranks, tuple(runs))
        head = ShardedHead(weight[shard.own], bias[shard.own], shard)
        assert torch.equal(head.embeddings(), weight)
        return head.in_order(order)(hidden)

    found = torch.cat(on_ranks(3, work), dim=1)
    torch.testing.assert_close(found, (hidden @ weight.T + bias)[:, order], atol=1e-5, rtol=1e-5)


def test_a_teacher_without_a_linear_output_layer_has_no_embeddings(
    save: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Path(shutil.copytree(save("llama"), tmp_path / "llama"))
    for layer, found in (
        (lambda self: None, "is a NoneType, not a plain Linear of 403"),
        (lambda self: self.model.layers[0].mlp.up_proj, "is a Linear of 64 columns, not a plain Linear of 403"),
    ):
        monkeypatch.setattr(transformers.LlamaForCausalLM, "get_output_embeddings", layer)
        with pytest.raises(InputError, match=f"llama: its output layer {found}"):
            load(directory).output_embeddings()
