"""What every exported format is made of: the windows of a teacher, each with its tokens and targets.

Legend: `L` tokens of a window, `K` stored ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logit_cache.caching.windows import windows
from storage.cache.reader import LogitCache, TeacherTargets
from storage.errors import IncompleteCache, InputError
from storage.format.targets import SparseTargets
from storage.text import ranges_in_words


@dataclass(frozen=True)
class Exported:
    """A window: ids uint32 [L], the targets of its L positions, and which of its tokens are trained on, bool [L], or
    None for all. Of the first one nobody says whether it is."""

    ids: NDArray[np.uint32]
    targets: SparseTargets
    trained: NDArray[np.bool_] | None

    @property
    def has_row(self) -> NDArray[np.bool_]:
        """Which positions have targets, bool [L]."""
        found: NDArray[np.bool_] = self.targets.kept > 0
        return found


def check_entry(url: str, entry: TeacherTargets, tail_needed: bool) -> None:
    """Raise InputError for an entry that no format can say, before anything is written."""
    record = entry.entry
    missing = entry.missing()
    if missing:
        raise IncompleteCache(f"{url}: {entry.name} lacks {ranges_in_words(missing)}: complete it first")
    if not record.targets.k:
        raise InputError(
            f"{url}: {entry.name} stores no ids, and every format is about those: export an entry of cache-logits "
            f"--targets topk"
        )
    if record.targets.method != "top-k":
        raise InputError(
            f"{url}: the ids of {entry.name} are a sample, and other trainers would take them for the most probable "
            f"ones: export an entry of cache-logits --targets topk"
        )
    if tail_needed and not record.targets.has("tail"):
        raise InputError(
            f"{url}: the mass outside the ids of {entry.name} is not known, and this format states log-probs over the "
            f"whole vocabulary: take --format parquet or axolotl"
        )
    if record.windowing.begin_id is not None:
        raise InputError(
            f"{url}: the teacher of {entry.name} read an id before each window that is not in the text, which no "
            f"format can say: export an entry that was made without --bos-each-window"
        )


def exported(url: str, cache: LogitCache, entry: TeacherTargets) -> Iterator[Exported]:
    """The windows of an entry, in the order of the stream. Raises InputError where they overlap."""
    record = entry.entry
    starts = cache.document_starts if record.windowing.isolate_documents else None
    mask: Any = cache.loss_mask
    for window in windows(0, record.positions, record.positions, record.windowing, starts):
        if window.first != window.start or window.last != window.stop:
            raise InputError(
                f"{url}: windows of {entry.name} overlap ({record.windowing.context_tokens} tokens every "
                f"{record.windowing.stride_tokens}), so that its targets know tokens before the window that they are "
                f"in: export an entry of windows that do not (--stride-tokens as large as the context)"
            )
        trained = None
        if mask is not None:
            # The mask is of the token that follows.
            trained = np.append(False, mask.read(window.start, window.stop)[:-1])
        yield Exported(
            cache.tokens.read(window.start, window.stop).astype(np.uint32),
            entry.read(window.start, window.stop),
            trained,
        )
