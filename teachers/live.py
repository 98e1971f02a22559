"""Live teachers beside a student, for comparison with a cache: the same loss without one, and its cost.

`train-teacher --live-teacher` uses them. They read the student's own windows, in evaluation mode and without gradients,
in float32 on a CPU and bfloat16 on a GPU, as `cache-logits` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from storage import LogitCache
from student.job import StudentJob
from student.models.tokenizer import begin_id
from teachers.base import Teacher
from teachers.ensemble import EnsembleTeacher
from teachers.huggingface.teacher import DEFAULT_LOGIT_BUDGET_BYTES, HuggingFaceTeacher
from teachers.vocabulary import common_vocabulary

# Of one chunk of the teachers' logits: on a CPU small enough to be in the CPU's cache when the loss reads them.
_CHUNK_BYTES = {"cpu": 16 << 20}


def chunk_bytes(device: torch.device, teachers: int = 1) -> int:
    """The byte budget of one chunk of a live teacher's logits, where `teachers` of them run."""
    return _CHUNK_BYTES.get(device.type, DEFAULT_LOGIT_BUDGET_BYTES // teachers)


class LiveTeacher:
    """One teacher, or several combined, as a `student.loss.dense.LogitSource`.

    Its chunks are at most `chunk_bytes` large, whatever the teacher's own are: the loss is slower with others.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self.columns = teacher.head_columns
        self._rows = max(1, chunk_bytes(teacher.device) // (4 * self.columns))
        identity = teacher.identity
        self.provenance: Mapping[str, str] = {"combine": identity.combine} | {
            f"{number}/{name}": str(getattr(member, name))
            for number, member in enumerate(identity.loaded)
            for name in (*member.digest_fields, "dtype")
        }

    def packs(self, length: int) -> bool:
        return self._teacher.packs(length)

    def __call__(self, windows: Tensor, positions: Tensor | None = None) -> Iterator[Tensor]:
        """See `student.loss.dense.LogitSource`."""
        windows = windows.to(self._teacher.device)
        rows = torch.arange(windows.numel(), device=windows.device)
        chunks = self._teacher.score(windows, rows, positions)
        while True:
            # The student's mixed precision is not the teachers'. Entered per chunk, as a mode held across a yield
            # would leak into the caller's code.
            with torch.autocast(windows.device.type, enabled=False):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield from torch.split(chunk, self._rows)


def load_live(job: StudentJob, device: torch.device) -> LiveTeacher:
    """Load the `live_teachers` of a job on a device, combined as the job states.

    Raises InputError for a model that cannot be loaded or whose context is shorter than the job's windows, and
    IdentityMismatch for a teacher of another tokenizer.
    """
    cache = LogitCache.open(job.cache)
    begin = begin_id(job.cache) if job.bos_each_window else None
    teachers = []
    for source in job.live_teachers:
        teacher = HuggingFaceTeacher.load(
            source,
            dtype="float32" if device.type == "cpu" else "bfloat16",
            device=str(device),
            logit_budget_bytes=chunk_bytes(device, len(job.live_teachers)),
        )
        teacher.check_context(job.window_tokens, bool(job.bos_each_window))
        teachers.append(teacher)
    size = common_vocabulary(cache, job.live_teachers, teachers, begin)
    if job.eval_cache is not None:  # they read the held-out text, too
        common_vocabulary(LogitCache.open(job.eval_cache), job.live_teachers, teachers, begin, quiet=True)
    if len(teachers) == 1:
        return LiveTeacher(teachers[0])
    assert job.combine is not None
    return LiveTeacher(EnsembleTeacher(teachers, job.combine, size))
