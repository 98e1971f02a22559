"""The measured cost of a step on this machine: the teacher's forward, and a student's step with and without the cache.

A cost is per position of the text (padding is paid for and not counted), in paid seconds: processor time where the
device is a CPU (a busy machine does not change it much), and elapsed time where it is an accelerator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from storage.errors import InputError
from storage.format.layout import ArraySpec
from storage.format.manifest.entry import TeacherEntry
from storage.format.shard import decode_chunk
from storage.format.stored import StoredTargets
from storage.format.targets import SparseTargets
from student.data.batches import Piece, Window, as_read, collate
from student.data.blocks import Blocks
from student.data.packing import Packing
from student.loss.dense import DenseLoss
from student.loss.distillation import DistillationLoss
from student.loss.teacher_targets import Member
from student.models.configuration import stated_columns
from student.models.loading import load_student
from student.training.bound_forward import bind_loss, unbind_loss
from teachers.base import Teacher
from teachers.live import LiveTeacher

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


def student_windows(
    entry: TeacherEntry, tokens: NDArray[np.int64], targets: SparseTargets, document_starts: NDArray[np.uint64] | None
) -> list[Window]:
    """The windows of some targets as a student of the entry reads them: documents that are isolated share them.

    tokens: int64 [n], from the first target's position on. document_starts: where documents are isolated, the places
    in `tokens` where one starts, the first of them 0.
    """
    windowing, stored = entry.windowing, StoredTargets.of(entry, targets)
    size = windowing.context_tokens
    if document_starts is None:
        size = min(size, max(1, len(tokens) - 1))
    blocks = Blocks.of(len(tokens), document_starts, size, "fixed", seed=0)
    following = np.append(tokens[1:], tokens[-1])
    # A piece of documents of one token has no window; the first of them stands for one.
    spans = blocks.spans(range(len(blocks))) or [(0, 1)]
    pieces = [
        Piece(
            tokens[start : start + count],
            following[start : start + count],
            {_NAME: stored.rows(stored.start + start, stored.start + start + count)},
        )
        for start, count in spans
    ]
    if document_starts is None:
        return [as_read([piece], size, windowing.begin_id) for piece in pieces]
    sizes = np.array([len(piece.tokens) + windowing.input_tokens - size for piece in pieces])
    packing = Packing.of(sizes, windowing.input_tokens, group_tokens=len(tokens))
    rows = np.split(packing.windows, packing.first[1:-1])
    return [as_read([pieces[i] for i in row], size, windowing.begin_id, packed=True) for row in rows]


def forward_cost(teacher: Teacher, windows: Sequence[Window]) -> float:
    """Cost of the teacher alone, per position: it scores the windows whole, padding included, as beside a student."""
    batch, source = collate(windows), LiveTeacher(teacher)

    def run() -> None:
        with torch.no_grad():
            for _ in source(batch["input_ids"], batch.get("position_ids")):
                pass

    return _each(teacher.device, run) / _positions(windows)


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


def student_cost(spec: str, teacher: Teacher, entry: TeacherEntry, windows: Sequence[Window]) -> dict[str, Any]:
    """Cost of a student's step (forward, backward, AdamW) on windows of at most `context_tokens` positions, per
    position, as JSON data: `cached`, from the cache without reading it, and `live`, with the teachers beside it.

    Raises InputError for a model that train-student would refuse.
    """
    t, windows = entry.windowing.context_tokens, windows[:_STEP_WINDOWS]
    positions = _positions(windows)
    model = new_student(spec, entry).to(teacher.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    whole = collate(windows)
    read = {name: whole[name] for name in ("input_ids", "labels", "position_ids") if name in whole}
    batch = {name: values.to(teacher.device) for name, values in read.items()}
    stored = {_NAME: whole["targets"][_NAME].to(teacher.device)}
    size = ids_of_student(spec, entry)
    most = max(int(each.decoded().largest_ids.max()) for window in windows for each in window["targets"][_NAME])
    if most >= size:
        raise InputError(
            f"--student {spec}: its head has {size} columns, and the teacher's targets name id {most}: give the model "
            "a column for it (resize_token_embeddings), or take another student"
        )
    member, tau = Member.of(_NAME, entry), entry.targets.temperature
    costs = {}
    for kind, loss, given in (
        ("cached", DistillationLoss(size, 0.0, tau, [member], window_tokens=t), {"targets": stored}),
        ("live", DenseLoss(LiveTeacher(teacher), size, 0.0, tau, window_tokens=t), {}),
    ):  # fmt: skip
        bind_loss(model, loss)

        def step(given: dict[str, Any] = given) -> None:
            model(**batch, **given).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        costs[kind] = _each(teacher.device, step) / positions
        unbind_loss(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"model": spec, "parameters": parameters, "windows": len(windows), **costs}


def _positions(windows: Sequence[Window]) -> int:
    return sum(len(each) for window in windows for each in window["targets"][_NAME])


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
