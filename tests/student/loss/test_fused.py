"""The fused head and loss against the unfused one and against plain autograd, in chunks of every size.

Legend: `P` positions, `H` hidden size, `K` stored ids, `V` vocabulary, `W` columns of the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bench_fused import compare
from support.references.dense_targets import V, dense, labels_for, member, normal, spoiled, stored, varopt, with_c
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from storage.errors import InputError
from student.labels import NOT_TRAINED
from student.loss import fused
from student.loss.chunk import logit_chunk as chunk_module
from student.loss.distillation import DistillationLoss, LossSums, PreparedLoss
from student.loss.fused import fused_loss
from student.loss.objective import SAMPLED_TAILS
from student.target_batch import TargetBatch

P, H = 36, 19

# (columns of the head, logit_scale, softcap, bias)
HEADS = [(V, 1.0, None, False), (V + 13, 1.0, None, True), (V, 0.3, None, True), (V + 1, 2.0, 5.0, True)]


# Five rows of V columns, and one row at the end.
@pytest.fixture(params=[1 << 24, 5 * V], ids=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused._BUFFER_LOGITS, "cpu", request.param)
    monkeypatch.setitem(chunk_module._TILE_LOGITS, "cpu", request.param // 2)


def inputs(width: int = V, bias: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """hidden, weight and bias that ask for gradients; logits of a few nats."""
    made = [normal(1, P, H), normal(2, width, H, scale=0.5), normal(3, width) if bias else None]
    return [None if tensor is None else tensor.to(dtype).requires_grad_() for tensor in made]


def naive_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    z = scale * torch.nn.functional.linear(hidden, weight, bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def by_autograd(loss: Tensor, tensors: list[Tensor | None]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [tensor for tensor in tensors if tensor is not None]))


def assert_same(
    ours: LossSums, theirs: LossSums, tensors: list[Tensor | None], value: float = 1e-12, gradient: float = 1e-10
) -> None:
    """Equal sums and equal gradients, relative to their size."""
    assert int(ours.count) == int(theirs.count)
    assert ours.divergence.keys() == theirs.divergence.keys()
    pairs = [(ours.loss_sum.detach(), theirs.loss_sum.detach()), (ours.cross_entropy, theirs.cross_entropy)]
    pairs += [(ours.divergence[name], each) for name, each in theirs.divergence.items()]
    pairs += [(ours.control, theirs.control)]
    for a, b in pairs:
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=value, atol=value)
    # Not 1 upstream, which would hide a gradient that is not multiplied by it.
    for a, b in zip(by_autograd(3 * ours.loss_sum, tensors), by_autograd(3 * theirs.loss_sum, tensors), strict=True):
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(a, b, rtol=gradient, atol=gradient * float(b.abs().max()))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("ks", [(9,), (V,), (5, 40), (7, V, 1)], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_it_is_the_loss_of_the_logits(
    head: tuple[int, float, float | None, bool], tau: float, alpha: float, ks: tuple[int, ...]
) -> None:
    width, scale, softcap, bias = head
    tensors = inputs(width, bias)
    names = "abc"[: len(ks)]
    loss = DistillationLoss(V, alpha, tau, [member(name, 1.0 + i) for i, name in enumerate(names)])
    targets = {
        name: stored(dense(4 + i, P), k, dtype=torch.float64) for i, (name, k) in enumerate(zip(names, ks, strict=True))
    }
    labels = labels_for(7, P)
    ours = fused_loss(*tensors, loss.prepare(labels, targets), logit_scale=scale, softcap=softcap)
    assert_same(ours, loss(naive_logits(*tensors, scale, softcap), labels, targets), tensors)


OBJECTIVES: list[dict[str, Any]] = [
    {"tail": "sampled"},
    {"tail": "controlled"},
    {"tail": "blend", "blend": 0.6},
    {"tail": "bucket"},
    {"tail": "renormalise"},
    {"tail": "none"},
    {"loss": "reverse-kl"},
    {"loss": "jsd", "mix": 0.3},
    {"loss": "skew-forward-kl"},
    {"loss": "skew-reverse-kl", "mix": 0.7},
    {"loss": "tail-aware-kl", "head_ids": 5, "tail_weight": 3.0},
    {"loss_scale": "babyllama", "window_tokens": 6},
    {"min_entropy": 3.0, "temperature": 1.7, "interpolate_tail": True},
]


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("options", OBJECTIVES, ids=str)
@pytest.mark.parametrize(("columns", "size"), [(V + 2, V), (V - 1, V), (V + 13, V - 1)])
def test_every_loss_of_the_family_goes_through(columns: int, size: int, options: dict[str, Any]) -> None:
    """Also where the teacher has another number of ids than the student."""
    tensors, shared = inputs(columns), min(columns, size)
    # Next to no mass where the student has no column.
    logp = torch.log_softmax(normal(10, P, size).index_fill(1, torch.arange(shared, size), -30.0), 1)
    labels = labels_for(11, P, shared)
    sampled = options.get("tail") in SAMPLED_TAILS
    targets = {"t": varopt(logp, 16, 12, dtype=torch.float64) if sampled else stored(logp, 16, dtype=torch.float64)}
    arguments = {"alpha": 0.2, "temperature": 1.0 if sampled else 2.0, **options}
    teacher = member(size=size, sampled_at=1.0 if sampled else None)
    loss = with_c(DistillationLoss(shared, members=[teacher], **arguments), 0.8)
    weights = torch.rand(P, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    ours = fused_loss(*tensors, loss.prepare(labels, targets, weights), softcap=8.0)
    assert_same(ours, loss(naive_logits(*tensors, softcap=8.0), labels, targets, weights), tensors)


# Positions, columns, hidden size: no multiples of a kernel's block sizes.
HOSTILE = (252, 507, 123)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-10)])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_our_error_is_at_most_the_naive_one(
    scale: float, dtype: torch.dtype, tolerance: float, tau: float, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ways: float64 on the same inputs for truth, logits of the dtype and the unfused loss, and ours."""
    positions, columns, size = HOSTILE
    monkeypatch.setitem(fused._BUFFER_LOGITS, "cpu", 100 * columns)
    vocabulary = columns - 5
    leaves = [normal(22, positions, size), normal(23, columns, size, scale=scale / size**0.5)]
    leaves = [tensor.to(dtype).requires_grad_() for tensor in leaves]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    logp, labels = dense(24, positions, vocabulary_size=vocabulary), labels_for(25, positions, vocabulary)
    loss = DistillationLoss(vocabulary, alpha, tau, [member(size=vocabulary)])

    def results(tensors: list[Tensor], call: Callable[[], Tensor]) -> list[Tensor]:
        value = call()
        return [value.detach(), *torch.autograd.grad(value / positions, tensors)]

    targets = {"t": stored(logp, 30, dtype=torch.float64)}
    truth = results(exact, lambda: loss(exact[0] @ exact[1].T, labels, targets).loss_sum)
    # The targets are as stored in all three ways; the difference is the student's arithmetic.
    naive = results(leaves, lambda: loss(leaves[0] @ leaves[1].T, labels, targets).loss_sum)
    ours = results(leaves, lambda: fused_loss(*leaves, None, loss.prepare(labels, targets)).loss_sum)
    for a, b, true in zip(ours, naive, truth, strict=True):
        assert a.dtype == (b.dtype if a.ndim else torch.promote_types(a.dtype, torch.float32))
        assert (a.double() - true).norm() <= (b.double() - true).norm() + tolerance * true.norm()


def test_where_the_product_is_widened_half_precision_rounds_its_inputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's product with float32 output, emulated: sums as exact as those of float32 weights of these values."""
    monkeypatch.setattr(fused, "_product", lambda a, b: a.float() @ b.float())
    monkeypatch.setattr(fused, "_WEIGHT_ROWS", 100)
    loss, prepared, labels, targets = simple()
    half = [normal(38, P, H).bfloat16().requires_grad_(), normal(39, V, H, scale=0.5).bfloat16().requires_grad_()]
    exact = [tensor.detach().double().requires_grad_() for tensor in half]
    truth, naive = (loss(a @ b.T, labels, targets).loss_sum for a, b in (exact, half))
    ours = fused_loss(*half, None, prepared).loss_sum
    error = [float((each.detach().double() - truth.detach()).abs() / truth.detach()) for each in (ours, naive)]
    assert error[0] < 1e-6 < 1e-5 < error[1]
    found, by_naive, expected = (by_autograd(each, t) for each, t in ((ours, half), (naive, half), (truth, exact)))
    for a, b, true in zip(found, by_naive, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - true).norm() <= (b.double() - true).norm()


class _Largest(TorchDispatchMode):
    """Records the largest tensor that any operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_all_positions_are_never_there(
    dtype: torch.dtype, tau: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fused._BUFFER_LOGITS, "cpu", 4 * V)
    positions = 200
    hidden, weight = (normal(i, n, H).to(dtype).requires_grad_() for i, n in ((26, positions), (27, V)))
    loss = DistillationLoss(V, 0.5, tau, [member()])
    prepared = loss.prepare(labels_for(28, positions), {"t": stored(dense(29, positions), 10)})
    with _Largest() as largest:
        fused_loss(hidden, weight, None, prepared, softcap=9.0).loss_sum.backward()
    assert largest.elements == max(V, positions) * H
    with _Largest() as largest:
        loss(hidden @ weight.T, labels_for(28, positions), {"t": stored(dense(29, positions), 10)})
    assert largest.elements >= positions * V, "the control detects the logits"


@pytest.mark.slow
def test_a_fused_step_holds_no_more_than_plain_cross_entropy() -> None:
    """By the kernel's count, a whole step with AdamW; the benchmark has the figures."""
    ways = ("plain cross-entropy", "distilled, fused")
    found = compare("step", 30_000, 1, ("--positions", "1024", "--threads", "1"), ways)
    plain, ours = (found[way].peak_bytes for way in ways)
    assert plain > 1024 * 30_000 * 4, "at least its logits are there"
    assert ours <= plain


def simple() -> tuple[DistillationLoss, PreparedLoss, Tensor, dict[str, TargetBatch]]:
    labels, targets = labels_for(30, P), {"t": stored(dense(31, P), 10, dtype=torch.float64)}
    loss = DistillationLoss(V, 0.5, 2.0, [member()])
    return loss, loss.prepare(labels, targets), labels, targets


def test_a_tied_weight_gets_both_of_its_gradients() -> None:
    loss, prepared, labels, targets = simple()
    weight = normal(32, V, H, scale=0.5).requires_grad_()
    tokens = torch.arange(P) * 5 % V

    def gradient(sums: Callable[[Tensor], LossSums]) -> Tensor:
        return torch.autograd.grad(sums(torch.tanh(weight[tokens])).loss_sum, weight)[0]

    ours = gradient(lambda hidden: fused_loss(hidden, weight, None, prepared))
    head_alone = gradient(lambda hidden: fused_loss(hidden.detach(), weight, None, prepared))
    torch.testing.assert_close(ours, gradient(lambda h: loss(h @ weight.T, labels, targets)), rtol=1e-10, atol=1e-11)
    assert not torch.allclose(ours, head_alone, rtol=0.01)


@pytest.mark.parametrize("asks", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_frozen_tensors_cost_nothing(asks: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    loss, prepared, labels, targets = simple()
    tensors = [tensor.detach().requires_grad_(asked) for tensor, asked in zip(inputs(), asks, strict=True)]
    asked = [tensor for tensor in tensors if tensor.requires_grad]
    expected = torch.autograd.grad(loss(naive_logits(*tensors), labels, targets).loss_sum, asked)
    if not asks[1]:
        monkeypatch.setattr(fused, "_add_product", None)
    if not asks[0]:
        monkeypatch.setattr(fused, "_product", None)
    fused_loss(*tensors, prepared).loss_sum.backward()
    torch.testing.assert_close(asked[0].grad, expected[0], rtol=1e-10, atol=1e-10)
    assert [tensor.grad is not None for tensor in tensors] == list(asks)


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, prepared, labels, targets = simple()
    tensors = inputs()
    expected = loss(naive_logits(*tensors), labels, targets)
    monkeypatch.setattr(chunk_module.LogitChunk, "to_gradient", None)
    with torch.no_grad():
        ours = fused_loss(*tensors, prepared)
    frozen = fused_loss(*(tensor.detach() for tensor in tensors), prepared)
    for sums in (ours, frozen):
        torch.testing.assert_close(sums.loss_sum, expected.loss_sum.detach(), rtol=1e-12, atol=0)
        assert not sums.loss_sum.requires_grad


def test_a_retained_graph_gives_its_gradient_again() -> None:
    _, prepared, _, _ = simple()
    tensors = inputs()
    loss_sum = fused_loss(*tensors, prepared).loss_sum
    first = torch.autograd.grad(loss_sum, tensors, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(2 * loss_sum, tensors)
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(2 * a, c)


def test_a_batch_without_a_trained_position_gives_zeros() -> None:
    loss = DistillationLoss(V, 0.5, 1.0, [member()])
    targets = spoiled(stored(dense(33, P), 5), torch.ones(P, dtype=torch.bool))
    for positions in (P, 0):
        tensors = [inputs()[0].detach()[:positions].requires_grad_(), *inputs()[1:]]
        labels = torch.full((positions,), NOT_TRAINED)
        few = {"t": targets[:positions]}
        unfused = loss(naive_logits(*tensors), labels, few)
        for sums in (fused_loss(*tensors, loss.prepare(labels, few)), unfused):
            assert (float(sums.loss_sum.detach()), int(sums.count), float(sums.cross_entropy)) == (0.0, 0, 0.0)
            assert not any(gradient.any() for gradient in torch.autograd.grad(sums.loss_sum, tensors))


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("distance", [150.0, 1000.0])
def test_no_part_of_a_row_underflows_beside_another(distance: float, tau: float) -> None:
    """Stored ids, the other ids and padding, each the largest of a row by far: float32 against float64."""
    k, width = 6, V + 4
    logp = dense(34, 3)
    ids = logp.argsort(1, descending=True)[:, :k]
    z = normal(35, 3, width, scale=1.0)
    z[0].scatter_add_(0, ids[0], torch.full((k,), distance, dtype=torch.float64))
    z[1, :V].add_(distance).scatter_add_(0, ids[1], torch.full((k,), -distance, dtype=torch.float64))
    z[2, V:] += distance
    loss = DistillationLoss(V, 0.5, tau, [member()])
    targets, labels = {"t": stored(logp, k)}, torch.tensor([int(logp[0].argmin()), int(ids[1, 0]), 3])
    # Hidden states that are the logits themselves, through a head that hands them on.
    single = z.float()
    exact = single.double().requires_grad_()
    truth = loss(exact, labels, targets)
    (expected,) = torch.autograd.grad(truth.loss_sum, exact)
    hidden = single.clone().requires_grad_()
    ours = fused_loss(hidden, torch.eye(width), None, loss.prepare(labels, targets))
    (found,) = torch.autograd.grad(ours.loss_sum, hidden)
    assert truth.loss_sum.isfinite()
    torch.testing.assert_close(ours.loss_sum.double(), truth.loss_sum, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_under_autocast_the_product_takes_its_dtype() -> None:
    loss, prepared, labels, targets = simple()
    tensors = [normal(36, P, H).float().requires_grad_(), normal(37, V, H, scale=0.5).float().requires_grad_()]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    truth = torch.autograd.grad(loss(exact[0] @ exact[1].T, labels, targets).loss_sum, exact)
    with torch.autocast("cpu", torch.bfloat16):
        naive = torch.autograd.grad(loss(tensors[0] @ tensors[1].T, labels, targets).loss_sum, tensors)
        ours = torch.autograd.grad(fused_loss(*tensors, None, prepared).loss_sum, tensors)
    outside = torch.autograd.grad(fused_loss(*tensors, None, prepared).loss_sum, tensors)
    for a, b, c, true in zip(ours, naive, outside, truth, strict=True):
        assert a.dtype == torch.float32
        error = [float((each.double() - true).norm() / true.norm()) for each in (a, b, c)]
        assert error[2] < 1e-5 < error[0] <= error[1] + 2**-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, P, H)}, r"hidden states are \[positions, H\]"),
        ({"weight": torch.zeros(V, H + 1)}, r"\[36, 19\] and \[251, 20\]"),
        ({"weight": torch.zeros(V - 1, H)}, "250 columns, fewer than the 251"),
        ({"bias": torch.zeros(V + 1)}, r"bias must be \[251\]; got \[252\]"),
        ({"hidden": torch.zeros(P - 1, H)}, "prepared for 36 positions, there are 35"),
        ({"logit_scale": 0.0}, "logit_scale is a positive number"),
        ({"logit_scale": math.nan}, "logit_scale is a positive number"),
        ({"softcap": math.inf}, "softcap is a positive number"),
        ({"softcap": -3.0}, "softcap is a positive number"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    _, prepared, _, _ = simple()
    arguments = {"hidden": torch.zeros(P, H), "weight": torch.zeros(V, H), "bias": None, "prepared": prepared}
    with pytest.raises(InputError, match=message):
        fused_loss(**{**arguments, **change})


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_weights_are_refused_by_name() -> None:
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    _, prepared, _, _ = simple()
    weight = DTensor.from_local(torch.zeros(V, H), init_device_mesh("cpu", (1,)), [Replicate()])
    with pytest.raises(InputError, match="sharded"):
        fused_loss(torch.zeros(P, H), weight, None, prepared)
