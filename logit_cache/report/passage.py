"""A passage of a cache as pages show it: tokens coloured by the teachers' entropy, and what is expected after each."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from logit_cache.passage.positions import describe_positions
from logit_cache.passage.token_text import Part, TokenTexts
from logit_cache.report.findings import RecipeFindings, Series, open_cache
from storage.cache.reader import LogitCache
from student.report import Expected, Passage

LEVELS = (0.5, 1.0, 2.0, 3.5, 5.0)
"""Bounds in nats of the colours."""

Models = Sequence[tuple[Series, Passage]]

_ALL_OTHERS = (Part("mark", "all others"),)


@dataclass(frozen=True)
class Bar:
    """An id, or all others together; `mass` is None where it is not known. follows: whether the text has it there."""

    parts: tuple[Part, ...]
    mass: float | None
    follows: bool = False


@dataclass(frozen=True)
class Reader:
    """What a teacher entry or a model expects at a position: ids of known probability, all others, sampled ids."""

    label: str
    style: str
    facts: str
    bars: tuple[Bar, ...] = ()
    sampled: tuple[Bar, ...] = ()
    sampled_facts: str = ""


@dataclass(frozen=True)
class Token:
    """A position: its token, the next one, and the mean entropy of the teachers with its colour, if it is known."""

    position: int
    parts: tuple[Part, ...]
    following: tuple[Part, ...]
    level: int | None
    entropy: str
    readers: tuple[Reader, ...]


def tokens_of(
    cache: LogitCache, start: int, stop: int, entries: Sequence[str] | None = None, models: Models = ()
) -> list[Token]:
    """The positions `start .. stop` of a cache, with some entries (None: all) and models, each by its series.

    Raises InputError for a range that cannot be shown, and what reading raises.
    """
    texts = TokenTexts(cache)
    return [_token(found, texts, models) for found in describe_positions(cache, texts, start, stop, entries)]


def recipe_tokens(found: RecipeFindings) -> tuple[list[Token], int] | None:
    """The passage that the first student recorded, with its seed; its teachers, and the models of the seed beside it.

    None without a held-out cache that has its tokens, or a student that read a passage of it.
    """
    cache = open_cache(found.held_out_cache)
    if cache is None or not cache.record.corpus.tokens_included:
        return None
    there = [
        (series, model, model.passage)
        for series in found.series
        for model in series.models
        if model.passage is not None and _is_of(cache, model.passage)
    ]
    for series, model, passage in there:
        if series.role == "student" and model.run is not None:
            entries = [teacher.name for teacher in model.run.job.teachers if teacher.name in cache.teachers]
            models = [(one, read) for one, other, read in there if other.seed == model.seed]
            stop = passage.start + len(passage.expected)
            return tokens_of(cache, passage.start, stop, entries, models), model.seed
    return None


def _is_of(cache: LogitCache, passage: Passage) -> bool:
    corpus = cache.record.corpus
    inside = passage.start + len(passage.expected) <= corpus.positions
    return inside and passage.stream_sha256 == corpus.stream_sha256


def _token(found: dict[str, Any], texts: TokenTexts, models: Models) -> Token:
    position, following = found["position"], None if found["next"] is None else found["next"]["id"]
    entropies = [_entropy(row) for row in found["teachers"].values() if row is not None]
    known = [value for value, _ in entropies if value is not None]
    mean = sum(known) / len(known) if known else None
    readers = [_reader(f"entry {name}", "entry", row, texts, following) for name, row in found["teachers"].items()]
    for series, passage in models:
        number = position - passage.start
        if 0 <= number < len(passage.expected):
            row = _row(passage.expected[number])
            readers.append(_reader(series.label, series.style, row, texts, following))
    return Token(
        position=position,
        parts=texts.parts(found["token"]["id"]),
        following=() if following is None else texts.parts(following),
        level=None if mean is None else bisect.bisect_right(LEVELS, mean),
        entropy="mean " * (len(known) > 1) + _nats(mean, any(bound for _, bound in entropies)),
        readers=tuple(readers),
    )


def _reader(label: str, style: str, row: dict[str, Any] | None, texts: TokenTexts, following: int | None) -> Reader:
    if row is None or not row["certain"] + row["sampled"]:
        return Reader(label, style, "not cached here yet" if row is None else "no targets here")

    def bar(item: dict[str, Any]) -> Bar:
        return Bar(texts.parts(item["id"]), item["probability"], item["id"] == following)

    certain = [bar(item) for item in row["top"] if not item["sampled"]]
    sampled = [bar(item) for item in row["top"] if item["sampled"]]
    rest = None
    if row["tail_mass"] is not None:
        rest = max(0.0, row["certain_mass"] + row["tail_mass"] - sum(one.mass or 0.0 for one in certain))
    facts = [_nats(*_entropy(row))]
    if row["label_logprob"] is not None:
        facts.append(f"next token {percent(math.exp(row['label_logprob']))}")
    weight = row["sampled_weight"]
    stands_for = "" if weight is None else f"; each stands for {percent(weight)} of a loss"
    number = row["sampled"] if len(sampled) == row["sampled"] else f"{len(sampled)} of {row['sampled']}"
    return Reader(
        label,
        style,
        ", ".join(facts),
        (*certain, Bar(_ALL_OTHERS, rest)),
        tuple(sampled),
        f"{number} sampled from the others{stands_for}" if sampled else "",
    )


def _row(expected: Expected) -> dict[str, Any]:
    """What a model expects, as `describe_positions` has what an entry stored."""
    mass = sum(probability for _, probability in expected.likeliest)
    return {
        "entropy": expected.entropy,
        "certain": len(expected.likeliest),
        "certain_mass": mass,
        "tail_mass": max(0.0, 1.0 - mass),
        "sampled": 0,
        "sampled_weight": None,
        "label_logprob": expected.label_logprob,
        "top": [{"id": id, "probability": p, "sampled": False} for id, p in expected.likeliest],
    }


def _entropy(row: dict[str, Any]) -> tuple[float | None, bool]:
    """The entropy of a row in nats, and whether it is a lower bound; None where neither is known."""
    if row["entropy"] is not None or not row["certain"] + row["sampled"]:
        return row["entropy"], False
    return row["entropy_at_least"], row["entropy_at_least"] is not None


def _nats(entropy: float | None, is_bound: bool) -> str:
    return "entropy not known" if entropy is None else f"entropy {'≥ ' if is_bound else ''}{entropy:.2f} nats"


def percent(mass: float | None) -> str:
    """`12.3 %`, `< 0.1 %`, `–`."""
    if mass is None:
        return "–"
    return "< 0.1 %" if 0 < mass < 0.0005 else f"{100 * mass:.1f} %"
