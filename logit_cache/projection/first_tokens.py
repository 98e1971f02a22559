"""Which id of the student each id of the teacher begins with.

Legend: `V_t` ids of the teacher, `V_s` of the student.

Where both tokenizers have a boundary, the teacher's next token `i` spells bytes ``b_i``, and the student's next token
is the first one of these bytes and what follows them: ``f(i)``, the first token of ``b_i``, unless what follows changes
it. It may where a token of the student spells ``b_i`` and more, and the teacher would begin that token's bytes with
`i`: if it has a token of its own for them, it says so by another id. Such an `i` is uncertain, and so is one whose
bytes are no whole UTF-8. Between equal tokenizers every id is its own first token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logit_cache.projection.spelling import Spelling, is_text
from logit_cache.projection.symbols import NO_MARKER
from storage.errors import InputError


@dataclass(frozen=True)
class FirstTokens:
    """ids: int64 [V_t], the student's first token of each of the teacher's; uncertain: bool [V_t]."""

    ids: NDArray[np.int64]
    uncertain: NDArray[np.bool_]

    def with_turn_ends(self, pairs: NDArray[np.int64]) -> FirstTokens:
        """The same, but an id that ends the teacher's replies is the one that ends most of these in the other stream.

        pairs: int64 [replies, 2], the ids that end each in both streams, or NO_MARKER. An id that is paired with
        several is uncertain.
        """
        some, count = np.unique(pairs[(pairs != NO_MARKER).all(axis=1)], axis=0, return_counts=True)
        ids, uncertain = self.ids.copy(), self.uncertain.copy()
        for theirs in np.unique(some[:, 0]):
            here = some[:, 0] == theirs
            ids[theirs] = some[here, 1][count[here].argmax()]
            uncertain[theirs] = here.sum() > 1
        return FirstTokens(ids, uncertain)


def first_tokens(teacher: Spelling, student: Spelling) -> FirstTokens:
    """Raises InputError where the student has no id at all for bytes of the teacher's."""
    if teacher.file == student.file and teacher.size == student.size:
        return FirstTokens(np.arange(teacher.size), np.zeros(teacher.size, dtype=bool))
    spelled = [teacher[token] for token in range(teacher.size)]
    ids = student.first(spelled)
    for data, token in teacher.added.items():
        ids[token] = student.added.get(data, ids[token])
    for ours, theirs in ((teacher.bos, student.bos), (teacher.eos, student.eos)):
        if ours is not None and theirs is not None:
            ids[ours] = theirs
    uncertain = np.array([not is_text(data) for data in spelled])
    # Ids that are no token get no mass from a trained teacher; any id of the student is as good.
    none = ids < 0
    unspelled = np.flatnonzero(none & (teacher.lengths > 0))
    if len(unspelled):
        raise InputError(
            f"the tokenizer that is projected to has no id for {teacher.string(int(unspelled[0]))} of the teacher's, "
            f"nor for its bytes: it needs all 256 bytes (byte-level BPE, or byte fallback)"
        )
    fallback = next(id for id in (student.eos, student.bos, 0) if id is not None)
    return FirstTokens(np.where(none, fallback, ids), uncertain | none | _extended(teacher, student))


def _extended(teacher: Spelling, student: Spelling) -> NDArray[np.bool_]:
    """bool [V_t]: the ids with which the teacher begins the bytes of a student's token, and that are not all of it."""
    begun = teacher.first([student[token] for token in range(student.size)])
    found = np.zeros(teacher.size, dtype=bool)
    longer = (begun >= 0) & (student.lengths > teacher.lengths[begun.clip(0)])
    found[begun[longer]] = True
    return found
