"""The Triton kernels of the fused loss, run by Triton's interpreter, against float64 and against torch's passes.

Legend: `R` rows, `K` stored ids, `V` vocabulary, `W` columns of the head (W >= V), `P` positions, `H` hidden size.

Whether kernels are compiled or interpreted is decided when triton is imported, which other tests may have done before.
So kernels run in functions of this file, in a process of their own, which return numbers. That all of them compile for
a GPU is tested too, which needs none; where there is one, the kernels run on it as well.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support.references.dense_targets import dense, labels_for, member, normal, stored
from torch import Tensor

from student.labels import NOT_TRAINED
from student.loss import fused
from student.loss.chunk.logit_chunk import LogitChunk
from student.loss.distillation import DistillationLoss
from student.loss.fused import fused_loss

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton has no build for this system"
)

Run = Callable[..., Any]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BLOCK = 128


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ProcessPoolExecutor]]:
    """By device, a process in which kernels run on it; "compiler": one where they are not interpreted."""
    spawn = multiprocessing.get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, mp_context=spawn) for name in {*DEVICES, "compiler"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        for name, pool in pools.items():
            patch.setenv("TRITON_INTERPRET", "1" if name == "cpu" else "0")
            assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == ("1" if name == "cpu" else "0")
    yield pools
    for pool in pools.values():
        pool.shutdown()


@pytest.fixture(params=DEVICES)
def run(request: pytest.FixtureRequest, processes: dict[str, ProcessPoolExecutor]) -> Run:
    """Calls a function of this file in such a process, with the device first."""

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        return processes[request.param].submit(function, request.param, *arguments).result(timeout=300)

    return call


@dataclass(frozen=True)
class Case:
    """A chunk and the gradient of its loss by its log-probs, all from a seed."""

    vocabulary_size: int
    width: int
    stored_ids: tuple[int, ...] = (9,)
    tau: float = 1.0
    softcap: float | None = None
    scale: float = 3.0
    labelled: bool = True
    hidden: str = (
        ""  # which logits of some rows are -inf: "columns", the "first" ones, all "padding", all of the "tail"
    )
    rows: int = 7
    seed: int = 0
    sizes: tuple[int, ...] = ()  # the teachers' own, where they differ

    def size_of(self, teacher: int) -> int:
        return self.sizes[teacher] if self.sizes else self.vocabulary_size

    def z(self) -> Tensor:
        """Logits [R, W], float32."""
        z = normal(self.seed, self.rows, self.width, scale=self.scale)
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        z, vocabulary_size = z.float(), self.vocabulary_size
        if self.hidden == "columns":
            z[::2, 5:60] = -math.inf
            z[:, -1] = -math.inf
        if self.hidden == "first":
            z[::2, :70] = -math.inf
        if self.hidden == "padding":
            z[1::2, vocabulary_size:] = -math.inf
        if self.hidden == "tail":
            outside = torch.ones(self.rows, vocabulary_size, dtype=torch.bool)
            for support in self.supports():
                outside.scatter_(1, support.clamp(min=0).long(), False)
            z[1::2, :vocabulary_size].masked_fill_(outside[1::2], -math.inf)
        return z

    def labels(self) -> Tensor:
        labels = torch.randint(70, self.vocabulary_size - 1, (self.rows,), generator=self._generator())
        if self.hidden == "tail":
            labels = self.supports()[0][:, 0].long()
        labels[3] = NOT_TRAINED
        return labels

    def supports(self) -> list[Tensor]:
        """By teacher, ids int32 [R, K]; in some rows the first teacher has fewer."""
        found = []
        for number, k in enumerate(self.stored_ids):
            generator = self._generator(number + 1)
            size = min(self.size_of(number), self.width)
            ids = [torch.randperm(size, generator=generator)[:k] for _ in range(self.rows)]
            found.append(torch.stack(ids).to(torch.int32))
        if found and 1 < self.stored_ids[0] < self.vocabulary_size:
            found[0][2::3, self.stored_ids[0] // 2 :] = -1
        return found

    def gradients(self) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
        """Of a loss: by the cross-entropy [R], and by teacher by ell [R, K] and theta [R]."""
        by_label = torch.rand(self.rows, generator=self._generator(11)) + 0.1 if self.labelled else None
        by_bucket = []
        for number, k in enumerate(self.stored_ids):
            g = torch.randn(self.rows, k, generator=self._generator(21 + number))
            h = torch.randn(self.rows, generator=self._generator(31 + number))
            # No loss depends on the log of an empty tail.
            empty = k == self.vocabulary_size or self.hidden == "tail"
            by_bucket.append((g, torch.zeros_like(h) if empty else h))
        return by_label, by_bucket

    def _generator(self, stream: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(100 * self.seed + stream)


def through(case: Case, kind: type[LogitChunk], device: str = "cpu") -> list[np.ndarray[Any, Any]]:
    """Cross-entropy, each teacher's ell and theta, and the gradient [R, W], of one kind of chunk."""
    z, labels = case.z().to(device), case.labels().to(device)
    supports = [support.to(device) for support in case.supports()]
    sizes = [case.size_of(number) for number in range(len(supports))]
    chunk = kind(z, labels, labels != NOT_TRAINED, supports, sizes, case.tau, case.softcap)
    numbers = [chunk.cross_entropy, *(tensor for pair in chunk.buckets for tensor in pair)]
    by_label, by_bucket = case.gradients()
    pairs = [(g.to(device), h.to(device)) for g, h in by_bucket]
    chunk.to_gradient(None if by_label is None else by_label.to(device), pairs)
    return [each.cpu().numpy() for each in (*numbers, z)]


def kernels(device: str, case: Case, block: int | None = BLOCK) -> list[np.ndarray[Any, Any]]:
    from student.loss.chunk import triton_chunk

    with pytest.MonkeyPatch.context() as patch:
        if block is not None:
            patch.setattr(triton_chunk, "_BLOCK", block)
        return through(case, triton_chunk.TritonChunk, device)


def truth(case: Case) -> list[Tensor]:
    """The same of the same logits in float64, by plain autograd."""
    z, labels = case.z().double().requires_grad_(), case.labels()
    trained = labels != NOT_TRAINED
    log_q = torch.log_softmax(z / case.tau, 1)
    picked = torch.log_softmax(z, 1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    cross_entropy = torch.where(trained, -picked, 0.0)
    by_label, by_bucket = case.gradients()
    numbers, loss = [cross_entropy], torch.zeros((), dtype=torch.float64)
    if by_label is not None:
        loss = loss + (by_label * cross_entropy).sum()
    for number, (support, (g, h)) in enumerate(zip(case.supports(), by_bucket, strict=True)):
        size = min(case.size_of(number), case.width)
        valid, ids = support >= 0, support.clamp(min=0).long()
        ell = torch.where(valid, log_q.gather(1, ids), 0.0)
        inside = torch.zeros(case.rows, size).scatter_add_(1, ids, valid.float()) > 0
        theta = log_q[:, :size].masked_fill(inside, -math.inf).logsumexp(1)
        numbers += [ell, theta]
        loss = loss + (g * ell * trained[:, None]).sum()
        if h.any():
            loss = loss + (h * torch.where(trained, theta, 0.0)).sum()
    (gradient,) = torch.autograd.grad(loss, z)
    slope = 1.0 if case.softcap is None else 1.0 - (z.detach() / case.softcap) ** 2
    return [each.detach() for each in (*numbers, gradient * slope)]


def assert_exact(found: list[np.ndarray[Any, Any]], case: Case) -> None:
    """Close to the truth, each number for itself, and as close to it as torch's passes."""
    expected, by_torch = truth(case), through(case, LogitChunk)
    assert len(found) == len(by_torch) == len(expected)
    for ours, theirs, true in zip(found, by_torch, expected, strict=True):
        a, b = torch.from_numpy(ours), torch.from_numpy(theirs)
        assert a.dtype == b.dtype == torch.float32
        # A log-prob near 0 is a difference of numbers of some nats.
        unit = max(1.0, float(true.abs().masked_fill(true.isinf(), 0.0).max()))
        torch.testing.assert_close(a.double(), true, rtol=1e-5, atol=5e-7 * unit)
        finite = true.isfinite()
        error = [float((each.double() - true)[finite].norm()) for each in (a, b)]
        assert error[0] <= 2 * error[1] + 2**-23 * float(true[finite].norm()), error
    assert float(expected[-1].abs().max()) > 0
    assert not found[-1][case.labels().numpy() == NOT_TRAINED].any()


# V = W and W > V; two blocks of columns and some, whole blocks, and less than one.
SHAPES = [(251, 251), (251, 264), (2 * BLOCK, 3 * BLOCK), (99, 100)]
TEACHERS = [(), (9,), (5, 40)]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("stored_ids", TEACHERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_and_gradients_are_those_of_float64(
    run: Run, shape: tuple[int, int], stored_ids: tuple[int, ...], tau: float, softcap: float | None
) -> None:
    case = Case(*shape, stored_ids, tau, softcap, seed=1)
    assert_exact(run(kernels, case), case)


OTHERS = {
    "a temperature that is no power of two": Case(251, 264, (9, 4), tau=1.7, seed=14),
    "the same, capped": Case(251, 264, (9, 4), tau=1.7, softcap=5.0, seed=15),
    "no cross-entropy": Case(251, 264, tau=2.0, labelled=False, seed=2),
    "all ids stored": Case(251, 251, (251,), tau=2.0, seed=3),
    "all ids stored, and padding": Case(251, 300, (251, 7), tau=1.0, seed=4),
    "logits of 1e4": Case(251, 264, (9, 4), tau=2.0, scale=5e3, seed=5),
    "logits of 1e4, tau 1": Case(251, 264, (9,), scale=5e3, seed=6),
    "logits at the cap": Case(251, 264, tau=2.0, softcap=30.0, scale=60.0, seed=7),
    "columns of -inf": Case(251, 264, (9, 4), tau=2.0, hidden="columns", seed=8),
    "columns of -inf, tau 1": Case(251, 264, (9, 4), hidden="columns", seed=8),
    "padding of -inf": Case(251, 264, tau=2.0, hidden="padding", seed=9),
    "a tail of -inf": Case(251, 264, (60,), tau=2.0, hidden="tail", seed=10),
    "blocks of -inf before all others": Case(251, 251, (3,), tau=2.0, hidden="first", seed=11),
    "one column of padding": Case(251, 252, tau=2.0, seed=12),
    "teachers of other sizes": Case(251, 264, (9, 4, 40), tau=2.0, softcap=5.0, seed=16, sizes=(251, 250, 200)),
    "a teacher with more ids than columns": Case(251, 251, (9, 4), tau=2.0, seed=17, sizes=(255, 250)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_rows_that_are_hard(run: Run, name: str) -> None:
    block = 32 if OTHERS[name].hidden == "first" else BLOCK
    assert_exact(run(kernels, OTHERS[name], block), OTHERS[name])


def test_the_block_of_a_gpu(run: Run) -> None:
    """Its own size, for more columns than it has."""
    case = Case(9_001, 9_064, (64,), tau=2.0, rows=4, seed=13)
    assert_exact(run(kernels, case, None), case)


def rising(device: str, step: float) -> list[np.ndarray[Any, Any]]:
    from student.loss.chunk import triton_chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_chunk, "_BLOCK", 16)
        z = (step * torch.arange(300.0) / 16).repeat(2, 1)
        z[1] = z[1].flip(0)
        labels, trained = torch.tensor([299, 0]), torch.ones(2, dtype=torch.bool)
        chunk = triton_chunk.TritonChunk(*(t.to(device) for t in (z, labels, trained)), [], [], 2.0)
        return [chunk.cross_entropy.cpu().numpy()]


@pytest.mark.parametrize("step", [0.5, 20.0, 1000.0])
def test_a_largest_logit_that_moves_with_every_block(run: Run, step: float) -> None:
    (found,) = run(rising, step)
    z = step * torch.arange(300.0, dtype=torch.float64) / 16
    torch.testing.assert_close(torch.from_numpy(found).double(), (z.logsumexp(0) - z[-1]).repeat(2), rtol=1e-5, atol=0)


def spoiled(device: str) -> list[np.ndarray[Any, Any]]:
    from student.loss.chunk.triton_chunk import TritonChunk

    z = torch.zeros(3, 40, device=device)
    z[1, 7], z[2, 7] = math.nan, math.inf
    labels, trained = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
    chunk = TritonChunk(z, labels.to(device), trained.to(device), [], [], 2.0)
    return [chunk.cross_entropy.cpu().numpy()]


def test_a_logit_that_is_no_number_is_not_hidden(run: Run) -> None:
    (found,) = run(spoiled)
    assert np.isfinite(found[0])
    assert np.isnan(found[1:]).all()


def no_rows(device: str) -> tuple[tuple[int, ...], ...]:
    from student.loss.chunk.triton_chunk import TritonChunk

    z, nothing = torch.empty(0, 40, device=device), torch.empty(0, dtype=torch.int64, device=device)
    support = nothing.reshape(0, 4)
    chunk = TritonChunk(z, nothing, nothing > 0, [support], [30], 2.0)
    chunk.to_gradient(chunk.cross_entropy, chunk.buckets)
    return tuple(tuple(each.shape) for each in (chunk.cross_entropy, *chunk.buckets[0]))


def test_a_chunk_without_rows(run: Run) -> None:
    assert run(no_rows) == ((0,), (0, 4), (0,))


# The whole loss. Positions, hidden size, vocabulary.
P, H, V = 36, 19, 251
HEADS = [(V, 1.0, None), (V + 13, 0.3, None), (V + 1, 2.0, 5.0)]


def whole(device: str, head: tuple[int, float, float | None], tau: float, alpha: float, kernels: bool) -> list[Any]:
    """loss_sum, and its gradients by hidden states, weights and bias; with kernels in float32, without in float64."""
    width, scale, softcap = head
    dtype = torch.float32 if kernels else torch.float64
    made = [normal(1, P, H), normal(2, width, H, scale=0.5), normal(3, width)]
    tensors = [tensor.float().to(device, dtype).requires_grad_() for tensor in made]
    loss = DistillationLoss(V, alpha, tau, [member("a"), member("b", 2.0)])
    targets = {name: stored(dense(4 + k, P), k) for name, k in (("a", 8), ("b", 30))}
    labels = labels_for(7, P).to(device)
    if not kernels:
        z = scale * torch.nn.functional.linear(*tensors)
        loss_sum = loss(z if softcap is None else softcap * torch.tanh(z / softcap), labels, targets).loss_sum
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "_TRITON_DEVICES", {device})
            patch.setitem(fused._BUFFER_LOGITS, "cpu", 10 * width)
            # Tested here, and not below, where the passes that the kernels are compared with are removed.
            assert fused._chunk_kind(tensors[0].device, dtype, loss.temperature, softcap).__name__ == "TritonChunk"
            # The kernels, with no fallback.
            patch.setattr("student.loss.chunk.logit_chunk._Exponentials.of", None)
            loss_sum = fused_loss(*tensors, loss.prepare(labels, targets), logit_scale=scale, softcap=softcap).loss_sum
    gradients = torch.autograd.grad(3 * loss_sum, tensors)
    return [each.detach().cpu().numpy() for each in (loss_sum, *gradients)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_the_fused_loss_through_them(run: Run, head: tuple[int, float, float | None], tau: float, alpha: float) -> None:
    found, expected = run(whole, head, tau, alpha, True), whole("cpu", head, tau, alpha, False)
    for ours, true in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, true, rtol=1e-5, atol=5e-6 * np.abs(true).max())


def compiled(arch: int) -> dict[str, str]:
    """The kernels' PTX by name and choices."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from student.loss.chunk import triton_chunk

    types = {"z": "*fp32", "stride": "i32", "columns": "i32", "scale": "fp32", "scale_one": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(("largest", "total", "total_one", "a", "b"), "*fp32")
    choices = {triton_chunk._sums_kernel: ("TEMPERED",), triton_chunk._gradient_kernel: ("TWO_TERMS", "CAPPED")}
    found = {}
    for kernel, names in choices.items():
        for chosen in itertools.product((False, True), repeat=len(names)):
            constants = {"BLOCK": triton_chunk._BLOCK, **dict(zip(names, chosen, strict=True))}
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            source = ASTSource(kernel, signature, constants)
            binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8})
            assert binary.asm["cubin"]
            found[f"{kernel.__name__} {chosen}"] = binary.asm["ptx"]
    return found


@pytest.mark.parametrize("arch", [80, 90])
def test_they_compile_for_a_gpu(processes: dict[str, ProcessPoolExecutor], arch: int) -> None:
    found = processes["compiler"].submit(compiled, arch).result(timeout=300)
    assert len(found) == 6
    for name, ptx in found.items():
        assert f"sm_{arch}" in ptx
        assert "ex2.approx" in ptx, name
        assert ".f64" not in ptx, f"{name}: all of it is float32"


# Who chooses.
def test_a_cpu_and_float64_take_torchs_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_triton_runs", None)
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float64), ("cpu", torch.float64)):
        assert fused._chunk_kind(torch.device(device), dtype, 1.0, None) is LogitChunk


def test_without_triton_a_gpu_takes_torchs_passes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    fused._triton_runs.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert fused._chunk_kind(torch.device("cuda", 0), torch.float32, 1.0, None) is LogitChunk
    fused._triton_runs.cache_clear()
    assert not caplog.records, "nothing is wrong with that"


def broken(device: str, how: str) -> tuple[str, list[str]]:
    from student.loss.chunk import triton_chunk

    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    fused._triton_runs.cache_clear()
    original = triton_chunk._Logits.to_gradient
    logger = logging.getLogger("student.loss.fused")
    logger.addHandler(handler)

    def fails(*_: object) -> None:
        raise RuntimeError("no C compiler")

    def differs(part: Any, a: Tensor, b: Tensor | None, softcap: float | None) -> None:
        original(part, a * 1.001, b, softcap)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_TRITON_DEVICES", {device})
        patch.setattr(triton_chunk._Logits, "to_gradient", {"fails": fails, "differs": differs}[how])
        kinds = [fused._chunk_kind(torch.device(device), torch.float32, 2.0, None) for _ in range(2)]
    logger.removeHandler(handler)
    fused._triton_runs.cache_clear()
    assert kinds[0] is kinds[1]
    return kinds[0].__name__, logged


@pytest.mark.parametrize(("how", "reason"), [("fails", "no C compiler"), ("differs", "its results differ by")])
def test_kernels_that_fail_or_differ_are_not_used_and_log_one_warning(run: Run, how: str, reason: str) -> None:
    kind, logged = run(broken, how)
    assert kind == "LogitChunk"
    assert len(logged) == 1
    assert "without its Triton kernels" in logged[0]
    assert reason in logged[0]
