"""The windows that a job's teachers read, where it does not say: as its entry has them, else by the token stream.

A stream with a loss mask is of conversations: each is read by itself and, as far as the teachers allow, whole.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logit_cache.caching.job import CacheJob
from storage.cache.positions import document_lengths
from storage.cache.reader import LogitCache
from storage.errors import InputError
from storage.format.manifest.entry import TeacherEntry, Windowing
from storage.text import counted

CONTEXT_TOKENS = 128
"""Of a window, where documents are not read by themselves."""

MAX_CONTEXT = 1 << 24


def windowing_of(
    job: CacheJob,
    cache: LogitCache,
    recorded: TeacherEntry | None,
    begin: int | None = None,
    limit: int | None = None,
) -> tuple[Windowing, str | None]:
    """The windows of a job, and a line for the log where the stream decided them.

    recorded: the entry of the job's name, if there is one; it decides what is not given. begin: the id that is put
    before windows, if any. limit: the tokens of a window that all teachers read, None where it is not known or there is
    none. Raises InputError for a stride beyond the context, and for documents that are too long.
    """
    before = None if recorded is None else recorded.windowing
    masked = cache.record.corpus.has_loss_mask
    isolated, context, stride = job.isolate_documents, job.context_tokens, job.stride_tokens
    if isolated is None:
        isolated = masked if before is None else before.isolate_documents
    if context is None and before is not None:
        context, stride = before.context_tokens, stride or before.stride_tokens
    lengths = np.zeros(0, dtype=np.int64)
    if isolated:
        lengths = document_lengths(cache.document_starts, cache.record.corpus.positions)
    if context is None:
        context = CONTEXT_TOKENS
        if masked and isolated:
            context = min(int(lengths.max()), limit or MAX_CONTEXT)
    if stride is not None and stride > context:
        raise InputError(
            f"--stride-tokens {stride} is larger than the context of {context} tokens: positions between the windows "
            "would have no teacher"
        )
    windowing = Windowing(
        context_tokens=context, stride_tokens=stride or context, isolate_documents=isolated, begin_id=begin
    )
    return windowing, _of_lengths(job, lengths, context)


def _of_lengths(job: CacheJob, lengths: NDArray[np.int64], context: int) -> str | None:
    """The line about documents that are read by themselves, of these `lengths`; None where they are not."""
    if not len(lengths):
        if job.long_documents is not None:
            raise InputError(
                f"--long-documents {job.long_documents} is about documents that are read by themselves: give "
                "--isolate-documents too, or leave it out"
            )
        return None
    line = f"each of {counted(len(lengths), 'document')} is read by itself, in a context of {context:,} tokens: "
    longest, number = int(lengths.max()), int((lengths > context).sum())
    if not number:
        return line + f"the longest has {longest:,}"
    longer = f"{counted(number, 'longer one')} of up to {longest:,}"
    if job.long_documents == "refuse":
        raise InputError(
            f"{job.cache}: {longer} tokens than the context of {context:,}: give a larger --context-tokens, or "
            "--long-documents cut, truncate or drop"
        )
    said = {
        "truncate": f"have targets at their first {context:,} positions",
        "drop": "have no targets",
        "cut": "are cut into windows, of which later ones do not see the beginning",
    }
    return line + f"{longer} {said[job.long_documents or 'cut']}"
