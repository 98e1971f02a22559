"""The reducer's Triton kernels, run by Triton's interpreter, against float64 and against torch's passes.

Whether kernels are interpreted or compiled is decided when triton is imported, which other tests may have done before.
So the classes of this file run in a process of their own, one for each; no class is collected elsewhere. That the
kernels compile for a GPU is tested too, which takes none; where there is one, they run on it as well.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.commands import ROOT
from support.references.reducer import (
    FLOOR,
    INVALID,
    assert_same_bits,
    check,
    far_logits,
    invalid_logits,
    masked_logits,
    spread_logits,
    tied_logits,
)
from support.references.varopt import check as check_sample
from support.references.varopt import check_systematic, sample
from torch import Tensor

import teachers.reduction.passes
from storage.errors import InputError
from teachers.reduction.reduce import InvalidLogits, ReducedRows, reduce_topk, reduce_varopt
from teachers.reduction.top_k import block_maxima
from teachers.reduction.varopt import Sampling, TensorMasses, random_bits, random_words

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton has no build for this system"
)

CLASS = "LOGIT_CACHE_TEST_CLASS"  # in the environment: which class a process is there for


@pytest.mark.parametrize(("name", "interpret"), [("TestInterpreted", "1"), ("TestCompiled", "0")])
def test_in_a_process_of_its_own(name: str, interpret: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {CLASS: name, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    line = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", f"{__file__}::{name}"]
    done = subprocess.run(
        line, env={**environment, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout


def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers.reduction.passes, "has_kernels", lambda device: False)


def assert_close(ours: ReducedRows, theirs: ReducedRows) -> None:
    """Equal ids, and floats within what is stated of each path."""
    assert torch.equal(ours.token_ids, theirs.token_ids)
    assert torch.equal(ours.certain, theirs.certain)
    for name in ("logprobs", "log_tail", "log_tail_half", "label_logprob", "entropy"):
        a, b = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-6, equal_nan=True, msg=lambda text, name=name: name + text)


def sampled(logits: Tensor, k: int, random: Tensor, temperature: float = 1.0) -> ReducedRows:
    rows, columns = logits.shape
    return reduce_varopt(logits, columns, k, torch.arange(rows) % columns, FLOOR, Sampling(temperature, 0, random))


# NumPy, which runs the kernels then, warns of operations that a GPU does in silence and that the reducer checks later.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
class TestInterpreted:
    __test__ = os.environ.get(CLASS) == "TestInterpreted"

    @pytest.fixture(autouse=True)
    def _kernels(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Every test takes the kernels, and did run some."""
        from teachers.reduction import triton_passes as ours

        ran = []
        run = ours._run
        monkeypatch.setattr(
            ours, "_run", lambda kernel, *rest, **sizes: (ran.append(kernel), run(kernel, *rest, **sizes))
        )
        monkeypatch.setattr(teachers.reduction.passes, "has_kernels", lambda device: True)
        yield
        assert ran

    @pytest.mark.parametrize(
        ("rows", "vocabulary_size", "k"),
        [
            (3, 507, 123),  # direct
            (2, 5, 5),  # K = V
            (2, 1, 1),  # one id
            (3, 333, 1),
            (2, 8_193, 2),  # one column in a segment
            (3, 16_000, 64),  # blocks, and blocks again among the candidates
            (3, 16_003, 64),  # a remainder shorter than a block
            (2, 50_257, 128),
            (1, 50_257, 6_000),
            (1, 131_073, 1),  # wide blocks
        ],
    )
    def test_random_rows_equal_the_float64_reference(self, rows: int, vocabulary_size: int, k: int) -> None:
        labels = torch.arange(rows) % vocabulary_size
        labels[0] = -1
        check(spread_logits(rows, vocabulary_size), vocabulary_size, k, labels)

    @pytest.mark.parametrize("vocabulary_size", [507, 9_003])
    @pytest.mark.parametrize("k", [1, 64])
    def test_equal_logits_come_by_ascending_id(self, vocabulary_size: int, k: int) -> None:
        check(tied_logits(vocabulary_size, k)[::3], vocabulary_size, k)

    @pytest.mark.parametrize("vocabulary_size", [300, 9_003])
    def test_masked_ids_are_floored_and_add_nothing(self, vocabulary_size: int) -> None:
        logits = masked_logits(vocabulary_size)
        found = check(logits, vocabulary_size, 64, torch.tensor([2, 11, 0, 200, -1]))
        assert [found.logprobs[1, 10], found.label_logprob[1], found.log_tail[3]] == [FLOOR] * 3
        assert [found.entropy[2], found.logprobs[2, 0]] == [0, 0]
        for pivotal in (False, True):
            check_sample(sample(logits, 64, pivotal=pivotal), logits, 64)

    def test_rows_far_from_flat(self) -> None:
        """Tails that underflow, heads that hold all but 1e-30, and logits at the ends of float32."""
        assert check(far_logits(4_100), 4_100, 64).log_tail[5] < -1_800
        sharp = spread_logits(3, 1_000, scale=0.5)
        sharp[:, 7] = torch.tensor([20.0, 76.0, 500.0])
        check(sharp, 1_000, 1, torch.full((3,), 7))
        ends = spread_logits(3, 507)
        ends[0, 3], ends[0, 4] = 3e38, -3e38
        ends[1] += 5e4
        ends[2] = 1e-41
        check(ends, 507, 9)

    @pytest.mark.parametrize("vocabulary_size", [100, 9_003])
    @pytest.mark.parametrize(("invalid", "found"), INVALID)
    @pytest.mark.parametrize("column", [0, -1])
    def test_rows_without_a_softmax_are_named(
        self, vocabulary_size: int, invalid: float, found: str, column: int
    ) -> None:
        logits = invalid_logits(5, vocabulary_size, invalid, column)
        with pytest.raises(InvalidLogits, match=f"row 1.*{found}") as caught:
            reduce_topk(logits, vocabulary_size, 4, torch.zeros(5, dtype=torch.int64), FLOOR)
        assert caught.value.row == 1

    @pytest.mark.parametrize(("columns", "width"), [(9_003, 32), (4_096, 8), (20_000, 8_192), (130, 64)])
    def test_block_maxima_are_torchs(self, columns: int, width: int) -> None:
        from teachers.reduction.triton_passes import TritonPasses

        logits = spread_logits(3, columns)
        logits[0, width - 1], logits[0, columns // width * width - 1] = math.nan, -math.nan
        logits[1, :width] = math.nan
        logits[1, width : 2 * width] = -math.inf
        logits[2, width : 2 * width - 1] = math.inf
        expected = block_maxima(logits, width)
        torch.testing.assert_close(
            TritonPasses(3).block_maxima(logits, width), expected, rtol=0, atol=0, equal_nan=True
        )

    def test_padded_columns_do_not_exist_and_no_address_matters(self) -> None:
        """Rows of a wider tensor, of one that is not aligned, and transposed ones give what whole ones give."""
        vocabulary_size, k = 5_003, 32
        logits = spread_logits(3, vocabulary_size + 40)
        logits[:, vocabulary_size] = 1e4
        logits[:, vocabulary_size + 1 :] = math.nan
        whole = logits[:, :vocabulary_size].contiguous()
        random, labels = torch.from_numpy(random_bits(0, 0, 3)), torch.arange(3)
        expected = sampled(whole, k, random)
        shifted = torch.full((3, vocabulary_size + 9), math.nan)
        shifted[:, 1 : 1 + vocabulary_size] = whole
        for same in (logits, shifted[:, 1:], whole.t().contiguous().t()):
            reduced = reduce_varopt(same, vocabulary_size, k, labels, FLOOR, Sampling(1.0, 0, random))
            assert_same_bits(reduced, expected)

    @pytest.mark.parametrize("method", ["topk", "varopt"])
    def test_a_row_does_not_depend_on_the_others(self, method: str) -> None:
        logits = spread_logits(5, 5_003)
        logits[3, 5] = 300.0  # summed again
        logits[4] = logits[0]
        random = torch.from_numpy(random_bits(0, 0, 5))
        random[4] = random[0]

        def reduce(rows: slice) -> ReducedRows:
            if method == "varopt":
                return sampled(logits[rows], 16, random[rows])
            return reduce_topk(logits[rows], 5_003, 16, torch.arange(5)[rows], FLOOR)

        whole = reduce(slice(0, 5))
        own_label = "" if method == "topk" else "label_logprob"  # which label it is follows from the row's number
        for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):
            assert_same_bits(reduce(rows), whole.each(lambda value, rows=rows: value[rows]), but=own_label)
        assert_same_bits(
            whole.each(lambda value, rows=slice(0, 1): value[rows]),
            whole.each(lambda value, rows=slice(4, 5): value[rows]),
            but="label_logprob",
        )

    @pytest.mark.parametrize(("vocabulary_size", "k"), [(507, 13), (16_003, 64)])
    def test_torchs_passes_give_the_same(self, vocabulary_size: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
        logits = torch.cat([spread_logits(3, vocabulary_size), spread_logits(1, vocabulary_size).bfloat16().float()])
        logits[2, 5] = 300.0
        labels = torch.arange(4)
        systematic, pivotal = torch.from_numpy(random_bits(0, 0, 4)), torch.from_numpy(random_words(0, 0, 4, k))
        ways = [(systematic, 1.0), (systematic, 2.0), (systematic, 3.0), (pivotal, 1.0)]
        ours = reduce_topk(logits, vocabulary_size, k, labels, FLOOR)
        ours_sampled = [sampled(logits, k, *way) for way in ways]
        by_torch(monkeypatch)
        assert_close(ours, reduce_topk(logits, vocabulary_size, k, labels, FLOOR))
        # The ids may differ where a point is at an id's end within rounding; in these rows none is.
        for found, way in zip(ours_sampled, ways, strict=True):
            assert_close(found, sampled(logits, k, *way))

    @pytest.mark.parametrize(
        ("rows", "vocabulary_size", "k", "head_ids", "temperature"),
        [
            (5, 507, 13, 0, 1.0),
            (5, 507, 13, 3, 2.0),
            (5, 507, 13, 0, 3.0),  # a temperature whose sums take a pass of their own
            (3, 16_003, 64, 0, 1.0),
            (1, 70_001, 4, 3, 2.0),
            (6, 40, 39, 0, 1.0),
            (6, 12, 4, 2, 1.0),
            (6, 5, 3, 0, 1.0),  # one block, of a width that is no power of two
            (2, 5_000, 1_000, 0, 1.0),
        ],
    )
    @pytest.mark.parametrize("scale", [0.01, 4.0])
    def test_varopt_rows_keep_the_rule(
        self, rows: int, vocabulary_size: int, k: int, head_ids: int, temperature: float, scale: float
    ) -> None:
        logits = spread_logits(rows, vocabulary_size, scale)
        found = sample(logits, k, head_ids=head_ids, temperature=temperature)
        check_sample(found, logits, k, head_ids, temperature)
        assert bool((found.certain >= head_ids).all())

    @pytest.mark.parametrize("vocabulary_size", [1, 5, 507])
    def test_all_ids_are_certain_at_k_equal_v(self, vocabulary_size: int) -> None:
        logits = spread_logits(2, vocabulary_size)
        found, top = sample(logits, vocabulary_size), check(logits, vocabulary_size, vocabulary_size)
        assert_same_bits(top, found, but="label_logprob")

    def test_ids_are_a_systematic_sample_in_id_order(self) -> None:
        logits = spread_logits(20, 2_000)
        check_systematic(sample(logits, 24, seed=9), logits, 9)

    @pytest.mark.parametrize("beta", [1.0, 0.5, 0.3])
    @pytest.mark.parametrize(("columns", "width"), [(9_003, 16), (5, 5), (4_096, 32)])
    def test_lengths_are_the_same_wherever_they_are_asked_for(self, columns: int, width: int, beta: float) -> None:
        """Summed by block, one by one, and floor(unit e^(beta z)) to within 3e-7 of its size."""
        from teachers.reduction.triton_passes import TritonPasses

        k, rows = 3, 2
        logits = spread_logits(rows, columns)
        top, ids = logits.topk(k)
        row_max, unit = top[:, 0], torch.tensor([2.0**30, 3e5])
        ours = TritonPasses(rows).tail(logits, row_max, top, ids).masses(beta)
        exact = (beta * (logits - row_max[:, None])).double().exp().scatter(1, ids, 0.0)
        torch.testing.assert_close(ours.total.double(), exact.sum(1), rtol=4e-7, atol=0.0)
        blocks = ours.block_lengths(unit, width)
        every = torch.arange(blocks.shape[1]).expand(rows, -1).flip(1)
        lengths = ours.lengths(every, ids, torch.zeros(rows, k, dtype=torch.int64))
        assert torch.equal(lengths.sum(2).flip(1), blocks)
        each = lengths.flip(1).flatten(1)
        assert not each[:, blocks.shape[1] * width :].any() or width == 5
        each = each[:, :columns].double()
        stated = exact * unit[:, None]
        assert bool(((each <= stated * (1 + 3e-7)) & (each > stated * (1 - 3e-7) - 1)).all())
        # The head's lengths are those that are handed in, in whichever block they lie, also when it is asked for twice.
        given = torch.tensor([[7, 0, 2**30], [1, 2, 3]])
        wanted = torch.cat([ids // width, ids // width], 1)
        within = ours.lengths(wanted, ids, given)
        plain = TensorMasses((exact.float()), torch.empty(rows, columns))
        plain.block_lengths(unit, width)
        theirs = plain.lengths(wanted, ids, given)
        assert bool(((within[:, :, :width] - theirs).abs() <= 1 + 1e-6 * theirs).all())
        for number in range(2 * k):
            column = ids[:, number % k] % width
            assert torch.equal(within[:, number].gather(1, column[:, None])[:, 0], given[:, number % k])

    @pytest.mark.parametrize(("rows", "columns"), [(3, 0), (5, 1), (70, 63), (2, 1_024), (3, 2_500)])
    def test_row_sums(self, rows: int, columns: int) -> None:
        from teachers.reduction.triton_passes import TritonPasses

        values = spread_logits(rows, columns + 1)[:, 1:]
        sums = TritonPasses(1).row_sums(values)
        torch.testing.assert_close(sums, values.sum(1), rtol=1e-6, atol=1e-3)
        assert torch.equal(sums[1:2], TritonPasses(1).row_sums(values[1:2]))


class TestCompiled:
    """The compiled kernels for a GPU, whether there is one or not."""

    __test__ = os.environ.get(CLASS) == "TestCompiled"

    types: ClassVar[dict[torch.dtype, str]] = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}

    @pytest.mark.parametrize("arch", [80, 90])
    @pytest.mark.parametrize(("vocabulary_size", "columns", "k"), [(16_000, 16_000, 64), (50_257, 50_257, 64)])
    def test_they_compile(
        self, arch: int, vocabulary_size: int, columns: int, k: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from teachers.reduction import triton_passes as ours

        found: dict[str, str] = {}

        def compile_only(kernel: Any, grid: Any, at_once: int, *arguments: Any, **sizes: int) -> None:
            found[kernel.__name__] = self.ptx(arch, kernel, arguments, sizes)

        monkeypatch.setattr(ours, "_run", compile_only)
        logits, ids = torch.zeros(2, columns)[:, :vocabulary_size], torch.arange(k).expand(2, -1)
        passes = ours.TritonPasses(2)
        passes.block_maxima(logits, 32)
        masses = passes.tail(logits, logits[:, 0].contiguous(), logits[:, :k], ids).masses(1.0)
        masses.block_lengths(torch.ones(2), 16)
        masses.lengths(torch.zeros(2, k, dtype=torch.int64), ids, ids)
        assert len(found) == 5
        for name, ptx in found.items():
            assert f"sm_{arch}" in ptx
            assert ".f64" not in ptx, f"{name}: floats are float32"
            assert not re.search(r"\b(atom|red)\.", ptx), f"{name}: no atomic operations"
            assert not re.search(r"\b(ex2|lg2)\.approx", ptx), f"{name}: its exponential is its own"
            if columns % 16 == 0 and name != "_row_sums_kernel":
                assert re.search(r"ld\.global\S*\.v4\.", ptx), f"{name}: 16 bytes at once"

    def ptx(self, arch: int, kernel: Any, arguments: tuple[Any, ...], sizes: dict[str, int]) -> str:
        """Compiled with the specialisation of a launch with these arguments."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        for number, name in enumerate(kernel.arg_names):
            value = sizes.get(name, arguments[number] if number < len(arguments) else None)
            if isinstance(value, Tensor):
                signature[name], aligned = self.types[value.dtype], value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                signature[name], aligned = "fp32", False
            elif name in sizes:
                signature[name], constants[name], aligned = "constexpr", value, False
            else:
                signature[name], aligned = "i32", value % 16 == 0
            if aligned:
                attributes[(number,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        options = {"num_warps": 8, "enable_fp_fusion": False}
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        assert binary.asm["cubin"]
        return str(binary.asm["ptx"])


# The choice of the passes.
def test_a_cpu_takes_torchs_passes_and_so_does_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    with monkeypatch.context() as patch:
        patch.setattr(teachers.reduction.passes, "_compile", lambda device: True)
        assert not teachers.reduction.passes.has_kernels(torch.device("cpu"))
        assert teachers.reduction.passes.has_kernels(gpu)
        patch.setenv("LOGIT_CACHE_KERNELS", "torch")
        assert not teachers.reduction.passes.has_kernels(gpu)
        patch.delenv("LOGIT_CACHE_KERNELS")
        patch.setitem(sys.modules, "triton", None)
        assert not teachers.reduction.passes.has_kernels(gpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels do compile where there is a GPU")
def test_kernels_that_do_not_compile_are_one_error_with_a_remedy() -> None:
    with pytest.raises(InputError, match=r"cannot be compiled for cuda:0 .*LOGIT_CACHE_KERNELS=torch"):
        teachers.reduction.passes.has_kernels(torch.device("cuda", 0))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("vocabulary_size", [5_003, 16_000, 131_073])
def test_on_a_gpu_a_row_does_not_depend_on_the_others(vocabulary_size: int) -> None:
    logits = spread_logits(200, vocabulary_size).cuda()
    logits[3::7, 5] = 300.0
    random, labels = torch.from_numpy(random_bits(0, 0, 200)).cuda(), torch.arange(200).cuda()

    def reduce(rows: slice) -> ReducedRows:
        sampling = Sampling(1.0, 0, random[rows])
        return reduce_varopt(logits[rows], vocabulary_size, 64, labels[rows], FLOOR, sampling)

    whole = reduce(slice(0, 200))
    for rows in (slice(0, 1), slice(1, 4), slice(3, 200), slice(199, 200)):
        assert_same_bits(reduce(rows), whole.each(lambda value, rows=rows: value[rows]))


@needs_gpu
def test_on_a_gpu_nothing_as_large_as_the_logits_is_allocated() -> None:
    rows, columns = 512, 128_000
    logits = torch.randn(rows, columns, device="cuda")
    random, labels = torch.from_numpy(random_bits(0, 0, rows)).cuda(), torch.arange(rows, device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        reduce_varopt(logits, columns, 64, labels, FLOOR, Sampling(1.0, 0, random))
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < logits.nbytes / 2
