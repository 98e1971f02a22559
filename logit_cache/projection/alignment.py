"""Which position of the teacher's stream ends where a position of the student's does.

Legend: `N` tokens of a stream, `M` documents and replies.

Positions of equal keys (see `symbols`) have read the same text, so that the same may follow; where several tokens of a
stream have one key, the last one has read all of them. Keys lie in files, so memory does not grow with the streams, but
with their longest reply.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logit_cache.projection.spelling import Spelling
from logit_cache.projection.symbols import BLOCK_TOKENS, DOCUMENT, NO_MARKER, REPLY, Documents, Replies, Symbols
from storage.cache.reader import LogitCache
from storage.errors import InputError, StorageFull, is_out_of_space

_SHOWN = 24  # bytes around a difference
NOWHERE = -1


@dataclass
class Alignment:
    """The keys of both streams, int64 [N] each, in files without names.

    unlike: int64, ascending: after so many symbols both streams may spell what follows in other ways. replies: whether
    these are aligned, and nothing else; turn_ends: int64 [M, 2], the markers that end each of them in both streams.
    """

    teacher: NDArray[np.int64]
    student: NDArray[np.int64]
    unlike: NDArray[np.int64]
    replies: bool
    turn_ends: NDArray[np.int64]

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """The teacher's position for each of the student's `start .. stop`; `NOWHERE` where no boundary is shared, and
        where what may follow differs: only one stream has a token that ends the document there, or a space before its
        first word."""
        keys = np.asarray(self.student[start : stop + 1])
        after = np.append(keys[1:], NOWHERE) if stop == len(self.student) else keys[1:]
        keys = keys[: stop - start]
        low, high = np.searchsorted(self.teacher, [keys[0], keys[-1] + 1]) if len(keys) else (0, 0)
        theirs = np.append(np.asarray(self.teacher[low : high + 1]), NOWHERE)
        found = np.searchsorted(theirs[: high - low], keys, side="right") - 1
        shared = (found >= 0) & (theirs[found.clip(0)] == keys) & (after != keys)
        if self.replies:
            shared &= (keys & 1) == 0  # both are trained there, so the same reply goes on, or ends
        else:
            shared &= (theirs[found.clip(0) + 1] & 1) == (after & 1)
        shared &= ~np.isin(keys >> 1, self.unlike)
        return np.where(shared, low + found, NOWHERE)


def align(
    teacher: LogitCache, student: LogitCache, spellings: tuple[Spelling, Spelling], advance: Callable[[int], None]
) -> Alignment:
    """Raises InputError where the texts, or the order of their documents, differ, naming the first byte that does.

    Of conversations that two chat templates rendered, the replies are the text: markers and preambles differ.
    """
    both = list(zip((teacher, student), spellings, strict=True))
    keys = [_on_disk(cache.record.corpus.positions) for cache, _ in both]
    if _other_templates(teacher, student):
        replies = [Replies(cache, spelling) for cache, spelling in both]
        starts, marks = _compared(replies, keys, advance)
        blanks = sum(np.concatenate(each.blanks) for each in replies)
        turn_ends = np.stack([np.concatenate(each.ends) for each in replies], axis=1)
        of_reply = np.flatnonzero(marks == REPLY)
        # What is read of white space before a text, and what ends it where that is no marker, is not compared.
        begins, ends = starts[of_reply] + 1, starts[of_reply + 1]
        unlike = np.concatenate([begins[blanks > 0], ends[(turn_ends == NO_MARKER).any(axis=1)]])
        return Alignment(keys[0], keys[1], np.unique(unlike), True, turn_ends)
    strip = spellings[0].beginning != spellings[1].beginning
    starts, _ = _compared([Documents(cache, spelling, strip) for cache, spelling in both], keys, advance)
    unlike = np.unique(np.concatenate([starts[:-1], starts[:-1] + 1])) if strip else starts[:0]
    return Alignment(keys[0], keys[1], unlike, False, np.empty((0, 2), dtype=np.int64))


def _other_templates(teacher: LogitCache, student: LogitCache) -> bool:
    """Whether both streams are conversations, and not rendered alike."""
    one, other = teacher.record.corpus, student.record.corpus
    rendered = all(each.has_loss_mask and each.template_sha256 is not None for each in (one, other))
    return rendered and any(
        getattr(one, name) != getattr(other, name) for name in ("template_sha256", "template_variables", "date")
    )


def _on_disk(size: int) -> NDArray[np.int64]:
    """int64 [size] in a file that goes with its last reader, however the process ends.

    Raises StorageFull where the temporary folder has no room for it: a page that cannot be written ends the process.
    """
    with tempfile.TemporaryFile(prefix="logit-cache-") as file:
        try:
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, 8 * size)
            else:
                file.truncate(8 * size)
        except OSError as error:
            if is_out_of_space(error):
                raise StorageFull(
                    f"{tempfile.gettempdir()}: no room for the {8 * size:,} bytes by which two texts are aligned: free "
                    f"some, or set TMPDIR to a folder with more"
                ) from None
            raise
        return np.memmap(file, dtype=np.int64, mode="r+", shape=(size,))


def _compared(
    sides: Sequence[Symbols], keys: list[Any], advance: Callable[[int], None]
) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
    """Write the keys of both streams; returns the symbols before each mark, and in all, and which mark it is."""
    streams = [side.blocks() for side in sides]
    left = [np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.uint16)]  # of each, what was not compared yet
    written, done = [0, 0], [False, False]
    symbols, before = 0, left[0]
    starts, marks = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.uint16)]
    while not all(done):
        behind = int(done[0]) if any(done) else int(len(left[0]) > len(left[1]))
        block = next(streams[behind], None)
        if block is None:
            done[behind] = True
        else:
            left[behind] = np.concatenate([left[behind], block[0]])
            keys[behind][written[behind] : written[behind] + len(block[1])] = block[1]
            written[behind] += len(block[1])
            advance(len(block[1]) * behind)
        both = min(len(each) for each in left)
        differing = np.flatnonzero(left[0][:both] != left[1][:both])
        ended = any(done[i] and len(left[i]) == both < len(left[1 - i]) for i in (0, 1))
        same = left[0][: int(differing[0]) if len(differing) else both]
        starts.append(symbols + np.flatnonzero(same >= DOCUMENT))
        marks.append(same[same >= DOCUMENT])
        if len(differing) or ended:
            rest = [each[len(same) : len(same) + _SHOWN] for each in left]
            before = np.concatenate([before, same])[-_SHOWN:]
            place = _place(np.concatenate(starts), np.concatenate(marks), symbols + len(same))
            raise InputError(_difference(sides, before, rest, place))
        symbols += both
        before = np.concatenate([before, same])[-_SHOWN:]
        left = [each[both:] for each in left]
    return np.append(np.concatenate(starts), symbols), np.concatenate(marks)


def _place(starts: NDArray[np.int64], marks: NDArray[np.uint16], symbols: int) -> str:
    """In words: where so many symbols end, of which some are marks."""
    byte = symbols - int(starts[-1]) - 1 if len(starts) else 0
    documents = np.flatnonzero(marks == DOCUMENT)
    place = f"document {max(len(documents) - 1, 0):,}"
    reply = len(marks) - 1 - int(documents[-1]) if len(documents) else 0
    return f"byte {byte:,} of " + (f"reply {reply - 1:,} of {place}" if reply else place)


def _difference(
    sides: Sequence[Symbols], before: NDArray[np.uint16], rest: list[NDArray[np.uint16]], place: str
) -> str:
    """The first byte at which two streams differ."""
    one, other = (repr(_text(each)) if len(each) else "the end" for each in rest)
    what, causes = "texts", "keep their bytes (one that normalises, to lower case or by NFKC, changes them)"
    if isinstance(sides[0], Replies):
        what = "replies"
        causes += (
            ", and templates that write the same of each reply (some add or drop a reasoning, or join two replies)"
        )
    return (
        f"{sides[0].cache.url} and {sides[1].cache.url} have other {what}: they differ first at {place}, after "
        f"{_text(before)!r}: {one} and {other}. An entry can be projected into a cache of the same documents in the "
        f"same order, by tokenizers that {causes}"
    )


def _text(symbols: NDArray[np.uint16]) -> str:
    parts = np.split(symbols, np.flatnonzero(symbols >= DOCUMENT))
    said = []
    for part in parts:
        mark = {DOCUMENT: "⟨next document⟩", REPLY: "⟨reply⟩"}.get(int(part[0]), "") if len(part) else ""
        said.append(mark + part[part < DOCUMENT].astype(np.uint8).tobytes().decode(errors="backslashreplace"))
    return "".join(said)


def agreement(
    alignment: Alignment,
    teacher: LogitCache,
    student: LogitCache,
    first: NDArray[np.int64],
    uncertain: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """int64 [2, 2]: of the shared boundaries inside a document, where the teacher's next token is [certain, uncertain],
    how many there are and at how many its first token is the student's next one."""
    found = np.zeros((2, 2), dtype=np.int64)
    total = student.record.corpus.positions
    for start in range(0, total - 1, BLOCK_TOKENS):
        stop = min(start + BLOCK_TOKENS, total - 1)
        at = alignment.rows(start, stop)
        here = (at != NOWHERE) & (at < teacher.record.corpus.positions - 1)
        if not here.any():
            continue
        low, high = int(at[here].min()) + 1, int(at[here].max()) + 2
        theirs = teacher.tokens.read(low, high).astype(np.int64)[at[here] + 1 - low]
        ours = student.tokens.read(start + 1, stop + 1).astype(np.int64)[here]
        kind = uncertain[theirs].astype(np.int64)
        found[:, 0] += np.bincount(kind, minlength=2)
        found[:, 1] += np.bincount(kind[first[theirs] == ours], minlength=2)
    return found
