"""The windows that a job's teachers read, where it does not say: as its entry has them, else by the token stream.

A stream with a loss mask is of conversations: each is read by itself and, as far as the teachers allow, whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from logit_cache.caching.job import CacheJob
from storage.cache.reader import LogitCache
from storage.errors import InputError
from storage.format.manifest import TeacherEntry, Windowing
from storage.text import counted

if TYPE_CHECKING:
    from teachers.huggingface.teacher import HuggingFaceTeacher

CONTEXT_TOKENS = 128
"""Of a window, where documents are not read by themselves."""


def windowing_of(
    job: CacheJob,
    cache: LogitCache,
    teachers: Sequence[HuggingFaceTeacher],
    begin: int | None,
    recorded: TeacherEntry | None,
) -> tuple[Windowing, str | None]:
    """The windows of a job, and a line for the log where the stream decided them.

    begin: the id that is put before windows, if any. recorded: the entry of the job's name, if there is one; it decides
    what is not given. Raises InputError for windows that a teacher cannot read.
    """
    before = None if recorded is None else recorded.windowing
    masked = cache.record.corpus.has_loss_mask
    isolated, context, stride, line = job.isolate_documents, job.context_tokens, job.stride_tokens, None
    if isolated is None:
        isolated = masked if before is None else before.isolate_documents
    if context is None and before is not None:
        context, stride = before.context_tokens, stride or before.stride_tokens
    if context is None:
        context = CONTEXT_TOKENS
        if masked and isolated:
            context, line = _longest(cache, teachers, begin is not None)
    if stride is not None and stride > context:
        raise InputError(
            f"--stride-tokens {stride} is larger than the context of {context} tokens: positions between the windows "
            "would have no teacher"
        )
    for teacher in teachers:
        teacher.check_context(context, begin is not None)  # a context that the job did not give
    windowing = Windowing(
        context_tokens=context, stride_tokens=stride or context, isolate_documents=isolated, begin_id=begin
    )
    return windowing, line


def _longest(cache: LogitCache, teachers: Sequence[HuggingFaceTeacher], begun: bool) -> tuple[int, str]:
    """The tokens of the longest document, or as many as all teachers read; and a line that says so."""
    lengths = np.diff(np.append(cache.document_starts.astype(np.int64), cache.record.corpus.positions))
    longest = int(lengths.max())
    limits = [teacher.max_positions - begun for teacher in teachers if teacher.max_positions is not None]
    context = min([longest, *limits])
    line = f"each of {counted(len(lengths), 'document')} is read by itself, in a context of {context:,} tokens: "
    if context == longest:
        return context, line + "the longest has as many"
    longer = int((lengths > context).sum())
    return (
        context,
        line + f"the teacher reads no more, and {counted(longer, 'longer one')} of up to {longest:,} are cut",
    )
