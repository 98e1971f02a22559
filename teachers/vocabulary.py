"""The vocabulary of a cache and its teachers: the ids that all of them have, where those are the ids that matter."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from storage import LogitCache
from storage.errors import IdentityMismatch
from storage.format.identity import contradicting_ids, few, vocabulary_size
from storage.progress import silent
from student.models.vocabulary import check_vocabulary, ids_in_common
from teachers.huggingface.teacher import HuggingFaceTeacher


def common_vocabulary(
    cache: LogitCache,
    sources: Sequence[str],
    teachers: Sequence[HuggingFaceTeacher],
    begin_id: int | None,
    quiet: bool = False,
) -> int:
    """V of the teachers' targets on a cache: its tokenizer's, or the columns of the narrowest head.

    sources: the teachers as the user named them. begin_id: the id put before windows, if any. quiet: do not log the ids
    that are left out. A model without tokenizer files can only be checked by its head. Raises InputError and
    IdentityMismatch where the teachers, the tokenizer and the text do not agree on an id that the text has, that begins
    windows or that targets can name; see `student.models.vocabulary`.
    """
    first_rank = all(teacher.shard is None or teacher.shard.ranks.rank == 0 for teacher in teachers)
    # With the remarks of the teachers themselves: once in a job.
    log = logging.getLogger(__name__).warning if first_rank and not quiet else silent
    columns = [teacher.head_columns for teacher in teachers]
    narrow = columns.index(min(columns))
    vocabularies = [teacher.vocabulary() for teacher in teachers]
    named = min(cache.vocabulary_size, columns[narrow])
    check_members(list(zip(sources, vocabularies, strict=True)), named)
    for source, theirs in zip(sources, vocabularies, strict=True):
        remedy = f"Make a cache with this teacher's tokenizer: {_tokenize(source)}"
        check_vocabulary(cache, theirs, source, remedy, named, log, begin_id)
    own = vocabularies[narrow]
    advice = "take it out of the text and tokenize that again, or take a teacher with a column for it"
    if own is not None and vocabulary_size(own) <= columns[narrow]:
        advice = f"make a cache with this teacher's tokenizer: {_tokenize(sources[narrow])}"
    return ids_in_common(cache, columns[narrow], sources[narrow], advice, log, begin_id)


def check_members(named: Sequence[tuple[str, Mapping[str, int] | None]], below: int | None = None) -> None:
    """Raise IdentityMismatch where the tokenizers of an ensemble's members contradict each other at an id that counts.

    named: each member's source and its vocabulary, None where it is not known. Ids below `below` count, by default
    those of the first one's tokenizer.
    """
    known = [(source, vocabulary) for source, vocabulary in named if vocabulary is not None]
    for source, vocabulary in known[1:]:
        first, ours = known[0]
        contradicting = contradicting_ids(ours, vocabulary, vocabulary_size(ours) if below is None else below)
        if contradicting:
            raise IdentityMismatch(
                f"{source}: its tokenizer is not the one of {first}",
                few(list(contradicting.values())),
                "Members of an ensemble must share their tokenizer's ids.",
            )


def _tokenize(source: str) -> str:
    return f"logit-cache tokenize --tokenizer {source}"
