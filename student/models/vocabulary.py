"""Whether a model and a cache agree on the ids that matter: those that the text has, that windows begin with, or that
targets can name.

Tokenizers and heads often differ elsewhere: a special token that no text contains and that has no column in the model,
added tokens, reserved ids. Such ids are named in one line, and left out. The text is read only where something differs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from storage import LogitCache
from storage.errors import IdentityMismatch, InputError
from storage.format.identity import contradicting_ids, differing_ids, few, id_strings, vocabulary_sha256
from storage.progress import Log
from student.models.tokenizer import tokenizer_of


def cache_vocabulary(cache: LogitCache) -> dict[str, int]:
    """Token string → id in a cache's tokenizer, added tokens included."""
    return dict(tokenizer_of(cache.tokenizer_files(), cache.url).get_vocab())


def check_vocabulary(
    cache: LogitCache,
    theirs: Mapping[str, int] | None,
    source: str,
    remedy: str,
    named: int,
    log: Log,
    begin_id: int | None = None,
) -> None:
    """Compare which id is which string for a model, and log the ids that differ where they do no harm.

    theirs: token string → id of the model's tokenizer; None is not checked. named: targets can name the ids below it.
    begin_id: the id put before windows, if any.
    Raises IdentityMismatch, with the ids, where two strings contradict each other at an id that targets can name, and
    where an id that differs is in the text or begins windows; CacheNotFound where the cache was shared without the text
    that would tell.
    """
    if theirs is None or vocabulary_sha256(theirs) == cache.record.tokenizer.vocabulary_sha256:
        return
    ours = cache_vocabulary(cache)
    differing = differing_ids(ours, theirs)
    if not differing:
        return
    where = f"{source}: its tokenizer is not the one of {cache.url}"
    contradicting = contradicting_ids(ours, theirs, named)
    if contradicting:
        raise IdentityMismatch(where, few(list(contradicting.values())), remedy)
    if begin_id in differing:
        raise IdentityMismatch(where, [differing[begin_id], "windows begin with this id (--bos-each-window)"], remedy)
    ids = np.fromiter(differing, dtype=np.int64)
    found = cache.tokens.first(lambda tokens: np.isin(tokens, ids))
    if found is not None:
        raise IdentityMismatch(
            where, [differing[found[1]], f"the text has this id first at position {found[0]}"], remedy
        )
    log(
        f"{source}: its tokenizer is the one of {cache.url} but for ids that the text does not have, which are left "
        f"out: {'; '.join(few(list(differing.values())))}"
    )


def ids_in_common(
    cache: LogitCache, columns: int, source: str, advice: str, log: Log, begin_id: int | None = None
) -> int:
    """V of a cache and a model with `columns` output columns: the smaller number of ids; logs the ids left out.

    advice: what to do about an id of the text without a column. begin_id: the id put before windows, if any.
    Raises InputError, with its string and first position, where the text has such an id or windows begin with one;
    CacheNotFound where the cache was shared without its text.
    """
    size = cache.vocabulary_size
    if columns >= size:
        return size
    where = f"{source}: its head has {columns} columns, the tokenizer of {cache.url} {size} ids"
    strings = id_strings(cache_vocabulary(cache))
    if begin_id is not None and begin_id >= columns:
        string = strings.get(begin_id, "no string")
        raise InputError(
            f"{where}, and windows begin with id {begin_id} ({string}): take a model with a column for it, or windows "
            f"without it (no --bos-each-window)"
        )
    found = cache.tokens.first(lambda tokens: tokens >= columns)
    if found is not None:
        string = strings.get(found[1], "no string")
        raise InputError(f"{where}, and the text has id {found[1]} ({string}) first at position {found[0]}: {advice}")
    shown = range(columns, min(size, columns + 5))
    left_out = ", ".join(f"id {index} ({strings.get(index, 'no string')})" for index in shown)
    more = f" and {size - shown.stop} more" if size > shown.stop else ""
    log(f"{where}; the text has none of those without a column, which are left out: {left_out}{more}")
    return columns
