"""Positions of a cache described for people: the tokens, and what each teacher expects next, as JSON data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logit_cache.passage.token_text import TokenTexts
from storage.cache.reader import LogitCache
from storage.errors import InputError
from storage.format.layout import VALUES
from storage.format.targets import SparseTargets

MOST_POSITIONS = 2000
MOST_IDS = 10
_CONTEXT = 24


def describe_positions(
    cache: LogitCache, texts: TokenTexts, start: int, stop: int, teachers: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Each of the positions `start .. stop` (exclusive): its token, the text of some tokens up to it, the next token,
    and what each of some teachers (None: all) stored of it, None where that is missing.

    Raises InputError for a range that is empty, too long or not inside the stream.
    """
    total = cache.record.corpus.positions
    at = f"{start}:{stop}" if stop - start != 1 else f"{start}"
    if not 0 <= start < stop <= total:
        raise InputError(
            f"--at {at}: the cache holds the positions 0..{total - 1}, and A:B is those from A on and before B"
        )
    if stop - start > MOST_POSITIONS:
        raise InputError(f"--at {at}: {stop - start:,} positions, at most {MOST_POSITIONS:,} are shown: take fewer")
    first = max(0, start + 1 - _CONTEXT)
    tokens = cache.tokens.read(first, min(stop + 1, total)).tolist()

    def token(position: int) -> dict[str, Any] | None:
        if position == total:
            return None
        number = tokens[position - first]
        return {"id": number, "text": texts.text(number)}

    names = cache.teachers if teachers is None else teachers
    rows = {name: _rows(cache, name, start, stop, texts) for name in names}
    return [
        {
            "position": position,
            "token": token(position),
            "context": texts.joined(tokens[max(0, position + 1 - _CONTEXT - first) : position + 1 - first]),
            "next": token(position + 1),
            "teachers": {name: found[position - start] for name, found in rows.items()},
        }
        for position in range(start, stop)
    ]


def _rows(cache: LogitCache, name: str, start: int, stop: int, texts: TokenTexts) -> list[dict[str, Any] | None]:
    targets = cache.teacher(name)
    missing = {p for a, b in targets.missing() for p in range(max(a, start), min(b, stop))}
    sampled_at = targets.entry.targets.temperature
    return [
        None if position in missing else _describe_row(targets.read(position, position + 1), sampled_at, texts)
        for position in range(start, stop)
    ]


def _describe_row(row: SparseTargets, sampled_at: float | None, texts: TokenTexts) -> dict[str, Any]:
    """One position of an entry: `log_tail` is the mass outside the certain ids, of which the sampled ids have a part.

    Certain, sampled and outside mass sum to 1 but for the rounding of the codes. `sampled_weight` is what each sampled
    id stands for in a loss at the temperature that it was sampled for. `entropy_at_least` is the entropy if all of the
    mass without a known id lay on one: no distribution with the known ones has less. At most `MOST_IDS` ids of either
    kind are listed.
    """
    certain, kept = int(row.certain[0]), int(row.kept[0])
    masses = np.exp(row.logprobs[0, :kept].astype(np.float64))
    sampled_mass = float(masses[certain:].sum())
    known = {name: _known(getattr(row, name)) for name in VALUES.values()}
    tail = known["log_tail_half" if sampled_at == 2 else "log_tail"]
    weight = None
    if kept > certain and tail is not None:
        tempered = row.logprobs[0, :certain].astype(np.float64) / (sampled_at or 1.0)
        weight = math.exp(tail) / (float(np.exp(tempered).sum()) + math.exp(tail)) / (kept - certain)
    tail_mass = None if known["log_tail"] is None else math.exp(known["log_tail"])
    outside = None if tail_mass is None else tail_mass - sampled_mass
    return {
        "entropy": known["entropy"],
        "entropy_at_least": None if tail_mass is None else _least_entropy(masses, certain, tail_mass),
        "without_ids": not row.k,
        "certain": certain,
        "certain_mass": float(masses[:certain].sum()),
        "tail_mass": tail_mass,
        "sampled": kept - certain,
        "sampled_mass": _number(sampled_mass),
        "sampled_weight": weight,
        "outside_mass": None if outside is None or math.isnan(outside) else max(0.0, outside),
        "label_logprob": known["label_logprob"],
        "top": [
            {
                "id": int(row.token_ids[0, column]),
                "text": texts.text(int(row.token_ids[0, column])),
                "probability": _number(float(masses[column])),
                "sampled": column >= certain,
            }
            for column in (*range(min(certain, MOST_IDS)), *range(certain, min(kept, certain + MOST_IDS)))
        ],
    }


def _least_entropy(masses: NDArray[np.float64], certain: int, tail_mass: float) -> float:
    """``-sum p log p`` in nats over the known ids and the mass outside them as one; `masses` of `certain` ids, then of
    sampled ones, which are NaN where they are not known."""
    each = masses if np.isfinite(masses).all() else masses[:certain]
    rest = max(0.0, tail_mass - float(each[certain:].sum()))
    return sum(-p * math.log(p) for p in (*map(float, each), rest) if p > 0)


def _known(values: NDArray[np.float32] | None) -> float | None:
    """The value of a row, or None where it has none."""
    return None if values is None else _number(float(values[0]))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
