"""The measured cost of a step on this machine: the teacher's forward, and a student's step with and without the cache.

Legend: `B` windows of a step, `T` positions of a window, `P` = B·T positions.

A cost is per position, in paid seconds: processor time where the device is a CPU (a busy machine does not change it
much), and elapsed time where it is an accelerator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import InputError
from storage.format.layout import ArraySpec
from storage.format.manifest import TeacherEntry
from storage.format.shard import decode_chunk, encode_targets
from storage.format.targets import SparseTargets
from student.data.batches import as_read, collate
from student.loss.dense import DenseLoss
from student.loss.distillation import DistillationLoss
from student.loss.teacher_targets import Member
from student.models.configuration import stated_columns
from student.models.loading import load_student
from student.training.bound_forward import bind_loss, unbind_loss
from teachers.base import Teacher
from teachers.live import LiveTeacher, chunk_bytes

# The defaults of `train-student`.
_STEP_WINDOWS = 32
_ROUNDS = 3
_NAME = "probe"


@dataclass
class Meter:
    """Sums the time of its `running` blocks: elapsed seconds, and seconds of processor time over all threads."""

    device: torch.device
    seconds: float = field(default=0.0, init=False)
    cpu_seconds: float = field(default=0.0, init=False)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Times the body, the device's work included."""
        self._wait()
        began, used = time.perf_counter(), time.process_time()
        yield
        self._wait()
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - used

    @property
    def paid(self) -> float:
        """Paid seconds: processor time on a CPU, else elapsed time."""
        return self.cpu_seconds if self.device.type == "cpu" else self.seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class StepCost:
    """Cost of a student's step, per position: from the cache (without reading it), and with the teachers beside it."""

    model: str
    parameters: int
    windows: int
    cached: float
    live: float


class _Pieces:
    """A `LiveTeacher` with the chunk size that it has beside a student; the loss is slower with others (on a CPU)."""

    def __init__(self, teacher: Teacher) -> None:
        self._source = LiveTeacher(teacher)
        self.columns, self.provenance = self._source.columns, self._source.provenance
        self._rows = max(1, chunk_bytes(teacher.device) // (4 * self.columns))

    def __call__(self, windows: Tensor) -> Iterator[Tensor]:
        for chunk in self._source(windows):
            for start in range(0, len(chunk), self._rows):
                yield chunk[start : start + self._rows]


def forward_cost(teacher: Teacher, windows: NDArray[np.int64]) -> float:
    """Cost of the teacher alone, per position: all of `windows` int64 [B, T] are scored, as beside a student."""
    inputs = torch.from_numpy(windows)
    source = LiveTeacher(teacher)

    def run() -> None:
        with torch.no_grad():
            for _ in source(inputs):
                pass

    return _each(teacher.device, run) / windows.size


def reading_cost(specs: Mapping[str, ArraySpec], objects: Mapping[str, bytes], positions: int) -> float:
    """Processor seconds per position of decompressing the objects of one shard, as a student's reader does."""
    meter = Meter(torch.device("cpu"))
    with meter.running():
        for name, data in objects.items():
            table = np.frombuffer(data[-specs[name].index_bytes : -4], dtype="<u8").reshape(-1, 2)
            for offset, length in table[table[:, 1] < len(data)].tolist():
                decode_chunk(specs[name], data[offset : offset + length])
    return meter.cpu_seconds / positions


def ids_of_student(spec: str, entry: TeacherEntry) -> int:
    """V of a student and an entry: the smaller number of ids."""
    return min(entry.vocabulary_size, stated_columns(spec) or entry.vocabulary_size)


def new_student(spec: str, entry: TeacherEntry) -> Any:
    """A student with an entry's vocabulary and context length. Raises InputError as train-student does."""
    return load_student(
        spec,
        vocabulary_size=ids_of_student(spec, entry),
        special_ids={},
        window_tokens=entry.windowing.input_tokens,
        seed=0,
    )


def student_cost(
    spec: str, teacher: Teacher, entry: TeacherEntry, tokens: NDArray[np.int64], targets: SparseTargets
) -> StepCost:
    """Cost of a student's step (forward, backward, AdamW) on the windows of some targets.

    tokens: int64 [len(targets) + 1], from the first target's position on. Raises InputError for a model that
    train-student would refuse, or where the targets are less than a window.
    """
    t = entry.windowing.context_tokens
    b = min(_STEP_WINDOWS, (len(tokens) - 1) // t)
    if b < 1:
        raise InputError(
            f"--student needs text for a window of {t} tokens and one more, there are {len(tokens)} tokens"
        )
    model = new_student(spec, entry).to(teacher.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    stored = _stored(entry, targets.rows(targets.start, targets.start + b * t))
    of_cache = _batch(tokens, stored, entry, teacher.device)
    batch = {name: of_cache[name] for name in ("input_ids", "labels")}
    size = ids_of_student(spec, entry)
    valid = np.arange(stored.k) < stored.kept[:, None]
    most = int(stored.token_ids.max(where=valid, initial=0))
    if most >= size:
        raise InputError(
            f"--student {spec}: its head has {size} columns, and the teacher's targets name id {most}: give the model "
            "a column for it (resize_token_embeddings), or take another student"
        )
    member, tau = Member.of(_NAME, entry), entry.targets.temperature
    costs = {}
    for kind, loss, given in (
        ("cached", DistillationLoss(size, 0.0, tau, [member], window_tokens=t),
         {"targets": of_cache["targets"]}),
        ("live", DenseLoss(_Pieces(teacher), size, 0.0, tau, window_tokens=t), {}),
    ):  # fmt: skip
        bind_loss(model, loss)

        def step(given: dict[str, Any] = given) -> None:
            model(**batch, **given).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        costs[kind] = _each(teacher.device, step) / (b * t)
        unbind_loss(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return StepCost(spec, parameters, b, costs["cached"], costs["live"])


def _batch(
    tokens: NDArray[np.int64], stored: SparseTargets, entry: TeacherEntry, device: torch.device
) -> dict[str, Any]:
    """The windows of some targets, with the text from their first position on, as a student reads them on a device."""
    t, begin = entry.windowing.context_tokens, entry.windowing.begin_id
    windows = [
        as_read(
            tokens[start : start + t],
            tokens[start + 1 : start + t + 1],
            {_NAME: stored.rows(stored.start + start, stored.start + start + t)},
            t,
            begin,
        )
        for start in range(0, len(stored), t)
    ]
    batch = collate(windows)
    targets = {_NAME: batch["targets"][_NAME].to(device)}
    return {name: batch[name].to(device) for name in ("input_ids", "labels")} | {"targets": targets}


def _each(device: torch.device, run: Callable[[], None]) -> float:
    """Paid seconds of one run: the median of a few, after a warm-up."""
    run()
    costs = []
    for _ in range(_ROUNDS):
        meter = Meter(device)
        with meter.running():
            run()
        costs.append(meter.paid)
    return median(costs)


def _stored(entry: TeacherEntry, targets: SparseTargets) -> SparseTargets:
    """The targets as a reader of the entry gets them: after a round trip through its encoding."""
    values = encode_targets(entry, targets)
    return SparseTargets(
        start=targets.start,
        codes=values.pop("logprob_codes", None),
        exact_logprobs=values.pop("logprobs", None),
        step_nats=entry.encoding.step_nats,
        **values,
    )
