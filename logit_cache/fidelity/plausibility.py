"""Could a teacher have made an entry? What rows must satisfy whoever made them, among themselves and with the text.

For entries of which there is no teacher to run, as of imported and served ones. Nothing here shows that a certain model
made them: numbers that another model gave the same text pass. Random windows (`logit_cache.fidelity.samples`) are read.

Of a row, with S its certain ids (all of a top-k row), p their probabilities, m the least of these, D the sampled ids,
p_t the stored mass outside S, y the token that follows, H a stored entropy, and `N = V - |S|`::

    distinct   no id of a row comes twice                   else it is no distribution, whatever its numbers are
    masses     sum_S p + p_t = 1                            numbers that were normalised over other ids than the row's
                                                            own and the tail's. Codes hold it by construction
    sampled    sum_D p <= p_t                               sampled ids whose log-probs are another row's
    outside    p_t <= N m                                   ids that are not the likeliest ones, garbage that decodes.
                                                            Of imported rows 1 % may break it, as when they came
    label      p_y is the row's where it has y; if not,     labels, or rows, of other tokens
               p_y <= m where y is not in S, and p_y <= p_t
    entropy    within the bounds of `row_bounds`            entropies of other rows, or in other units

all within the errors that the entry states. Where p_t is not known, p is relative to the row, so that ``p_y <= p`` of
the same id is all that holds, and the entropy has no bounds. A row that breaks one of these is impossible, and so is
the entry; what the reader refuses, as ids outside the vocabulary or log-probs above 0, is a problem too. Of all rows
together, the mean log-prob that they give the next token must exceed the one that they give their own, as where an
import decides what rows are about (`logit_cache.fidelity.readings`): rows that were moved fail this, and those of a
model that does not know the text at all.

Unlikely, and no more: a mean cross-entropy ``-log p_y`` far above the upper bounds of the mean entropy (of a calibrated
teacher, whose text is as likely as its rows say, both are equal), or below the lower bounds (rows that are too flat, as
those of a temperature above 1, or of a model early in training, are); and rows that repeat the row before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from logit_cache.fidelity.readings import Evidence
from logit_cache.fidelity.row_bounds import entropy_bounds, least_logprob, log_sums, most_outside
from logit_cache.fidelity.samples import Examination, Sample, entry_of, fresh_seed, read_samples
from logit_cache.fidelity.stated_errors import decoded_error, mass_error, stated_error
from storage.cache.reader import LogitCache
from storage.format.manifest.entry import TeacherEntry
from storage.format.version_2 import NOTHING_OUTSIDE

Rows = NDArray[np.float64]
Where = NDArray[np.bool_]

# Files may be off by so much: what their own rounding adds to a sum, and to the bound of the mass outside, nats.
_FILE_ROUNDING = 0.02
_FILE_BOUND = 0.1
_MOST_UNBOUNDED = 0.01
# Rows below which nothing is said of the text, and standard errors below which their two readings are alike.
_FEWEST_ROWS, _LEAST_ERRORS = 64, 2.0
# Of a token that a row has no mass for, nats: single rows do not outweigh all others.
_LEAST_LOGPROB = -30.0
# The text's cross-entropy against the entropy: nats, and standard errors.
_MOST_ABOVE, _MOST_BELOW = 2.0, 0.5
_CLEAR_ERRORS = 4.0
_MOST_REPEATED = 0.1


@dataclass
class Check:
    """One of the module's conditions: the `rows` for which it can be checked, those that break it, the first of them.

    allowed: the share of the rows that may break it.
    """

    rows: int = 0
    broken: int = 0
    position: int | None = None
    allowed: float = 0.0

    def add(self, first: int, checked: Where, holds: Where) -> None:
        """Rows from the position `first` on: whether it is checked, and whether it holds, bool [R]."""
        broken = np.flatnonzero(checked & ~holds)
        self.rows += int(np.count_nonzero(checked))
        self.broken += len(broken)
        if self.position is None and len(broken):
            self.position = first + int(broken[0])

    @property
    def is_possible(self) -> bool:
        return self.broken <= self.allowed * self.rows


@dataclass(frozen=True)
class Text:
    """Means over the rows that the text says something of, nats.

    after, of       log-prob of the next token, and of the row's own, over `rows`; of one that is none of the certain
                    ids an equal share of p_t, or m where that is not known
    cross_entropy   of the next token; `at_least` that where log-probs of tokens that a row lacks are not stored
    entropy         the mean of its lower and upper bounds, which are equal where it is stored; None where p_t is not
                    known, as the cross-entropy then is
    repeated        the share of the rows that are equal to the row before them
    """

    rows: int
    after: float
    of: float
    cross_entropy: float | None
    at_least: bool
    entropy: tuple[float, float] | None
    repeated: float


@dataclass(kw_only=True)
class Plausibility(Examination):
    """The result: the module's conditions, by name; `unlikely` decides nothing; `unchecked` is what cannot be told."""

    checks: dict[str, Check] = field(default_factory=dict)
    text: Text | None = None
    unlikely: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def plausible(self) -> bool:
        """Whether nothing in the windows is impossible."""
        return not self.problems and all(check.is_possible for check in self.checks.values())


def plausibility(
    url: str,
    name: str | None = None,
    windows: int = 16,
    seed: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Plausibility:
    """Check random windows of an entry of a cache, by default its only one; `progress` receives 1 for each.

    A seed of None is a fresh one. Raises what `samples.entry_of` and `read_samples` do.
    """
    cache = LogitCache.open(url)
    targets = entry_of(cache, name)
    found = Plausibility(cache=url, name=targets.name, seed=fresh_seed(seed))
    rules = _Rules(targets.entry)
    text = _TextSums(targets.entry)
    for sample in read_samples(cache, targets, windows, found):
        rows = _Read.of(targets.entry, sample)
        with np.errstate(invalid="ignore"):  # NaN and infinities stand for what a row does not have
            rules.add(rows)
            text.add(rows)
        if progress is not None:
            progress(1)
    found.checks = {each: check for each, check in rules.checks.items() if check.rows}
    found.unchecked += [f"{each}: {why}" for each, why in _WHY.items() if each not in found.checks]
    text.judge(found)
    return found


@dataclass(frozen=True)
class _Read:
    """The rows of a sample, float64, -inf in columns that are none of theirs.

    logprobs, sampled  [R, K]  of the certain ids, and of the sampled ones, NaN where these are not stored
    outside            [R]     log p_t, NaN where it is not known, or the row has no targets
    label_at           [R, K]  the columns of the token that follows; `label` [R], its stored log-prob, or NaN
    least, others      [R]     log m, inf without certain ids, and N
    """

    sample: Sample
    ids: NDArray[np.int64]
    logprobs: Rows
    sampled: Rows
    outside: Rows
    label: Rows
    label_at: Where
    least: Rows
    others: NDArray[np.int64]
    entropy: Rows

    @classmethod
    def of(cls, entry: TeacherEntry, sample: Sample) -> _Read:
        stored = sample.stored
        none = np.full(len(stored), np.nan)
        ids = np.where(stored.is_kept, stored.token_ids.astype(np.int64), -1)
        numbers = stored.logprobs.astype(np.float64)
        logprobs = np.where(stored.is_certain, numbers, -np.inf)
        outside, label, entropy = (
            none if values is None else values.astype(np.float64)
            for values in (stored.log_tail, stored.label_logprob, stored.entropy)
        )
        return cls(
            sample=sample,
            ids=ids,
            logprobs=logprobs,
            sampled=np.where(stored.is_kept & ~stored.is_certain, numbers, -np.inf),
            outside=outside,
            label=np.where(sample.labels >= 0, label, np.nan),
            label_at=(ids == sample.labels[:, None]) & (ids >= 0),
            least=least_logprob(logprobs),
            others=entry.vocabulary_size - stored.certain.astype(np.int64),
            entropy=entropy,
        )

    @property
    def has_targets(self) -> Where:
        return self.sample.stored.there

    @property
    def of_label(self) -> Rows:
        """The row's own log-prob of the token that follows [R]; NaN where it lacks it, or does not know it."""
        own = np.where(self.logprobs > -np.inf, self.logprobs, self.sampled)
        here = np.where(self.label_at, own, -np.inf).max(axis=1, initial=-np.inf)
        return np.where(self.label_at.any(axis=1), here, np.nan)


_WHY = {
    "distinct": "an id of a projected row may come twice, or no ids are stored",
    "masses": "codes hold it by construction, or the mass outside the ids is not known",
    "sampled": "log-probs of sampled ids are not stored",
    "outside": "the mass outside the ids is not known, or no row has certain ids",
    "label": "log-probs of the tokens that follow are not stored, or the rows are projected",
    "entropy": "no entropies are stored",
}


class _Rules:
    """The module's conditions of single rows."""

    def __init__(self, entry: TeacherEntry) -> None:
        self._entry = entry
        self._error = decoded_error(entry)
        self._imported = entry.imported_from is not None
        self._rules: dict[str, Callable[[_Read], tuple[Where, Where]]] = {
            "distinct": self._distinct,
            "masses": self._masses,
            "sampled": self._sampled,
            "outside": self._outside,
            "label": self._label,
            "entropy": self._entropy,
        }
        # A projected row may name an id more than once, and only their sum is bounded.
        left_out = ("distinct", "label") if entry.made == "projected" else () if entry.targets.k else ("distinct",)
        self.checks = {name: Check() for name in self._rules if name not in left_out}
        self.checks["outside"].allowed = _MOST_UNBOUNDED if self._imported else 0.0

    def add(self, rows: _Read) -> None:
        for name, check in self.checks.items():
            checked, holds = self._rules[name](rows)
            check.add(rows.sample.window.first, rows.has_targets & checked, holds)

    def _distinct(self, rows: _Read) -> tuple[Where, Where]:
        ascending = np.sort(rows.ids, axis=1)
        twice = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)
        return rows.has_targets, ~twice.any(axis=1)

    def _masses(self, rows: _Read) -> tuple[Where, Where]:
        codes = self._entry.format_version == 2 and self._entry.encoding.step_nats is not None
        total = np.logaddexp(log_sums(rows.logprobs), rows.outside)
        checked = np.zeros(len(total), dtype=bool) if codes else ~np.isnan(total)
        return checked, np.abs(total) <= self._error

    def _sampled(self, rows: _Read) -> tuple[Where, Where]:
        total = log_sums(np.where(np.isnan(rows.sampled), -np.inf, rows.sampled))
        error = self._error + self._stated("sampled_logprobs", rows.outside)
        return total > -np.inf, total <= rows.outside + error

    def _outside(self, rows: _Read) -> tuple[Where, Where]:
        checked = ~np.isnan(rows.outside) & np.isfinite(rows.least) & (rows.others > 0)
        slack = 2 * self._error + (_FILE_BOUND if self._imported else 0.0)
        most = most_outside(np.where(checked, rows.least, 0.0), rows.others)
        with np.errstate(divide="ignore"):
            most = np.logaddexp(most, np.log(mass_error(self._entry)))
        return checked, rows.outside <= most + slack

    def _label(self, rows: _Read) -> tuple[Where, Where]:
        error = self._error + self._stated("label_logprob", rows.label) + (_FILE_ROUNDING if self._imported else 0.0)
        step = self._entry.encoding.value_step_nats or 0.0
        lowest = (NOTHING_OUTSIDE + 1) * step if step else -np.inf  # that a code of the label holds
        own: Rows = np.maximum(rows.of_label, lowest)
        certain = (rows.label_at & (rows.logprobs > -np.inf)).any(axis=1)
        other = error + self._stated("sampled_logprobs", rows.label) * ~certain
        within: Where = rows.label <= own + other
        if self._entry.targets.has("tail"):
            within &= rows.label >= own - other
        most = np.where(certain, np.inf, np.minimum(rows.least, np.where(np.isnan(rows.outside), 0.0, rows.outside)))
        fits: Where = rows.label <= np.maximum(most, lowest) + error
        return ~np.isnan(rows.label), fits & (within | np.isnan(own))

    def _entropy(self, rows: _Read) -> tuple[Where, Where]:
        checked = ~np.isnan(rows.entropy) & ~np.isnan(rows.outside)
        lower, upper = entropy_bounds(rows.logprobs, rows.outside, rows.others)
        # sum |p' log p' - p log p| <= d exp(d) (1 + H) where log-probs are off by d; twice, as the tail's are too.
        error = 2 * self._error * np.exp(self._error) * (1 + upper) + self._stated("entropy", rows.entropy)
        return checked, (lower - error <= rows.entropy) & (rows.entropy <= upper + error)

    def _stated(self, name: str, values: Rows) -> Rows:
        return stated_error(self._entry, name, values)


class _TextSums:
    """What all rows together say of the text."""

    def __init__(self, entry: TeacherEntry) -> None:
        self._evidence = Evidence()
        self._exact = entry.targets.has("label")
        self._has_ids = bool(entry.targets.k)
        self._loss: list[Rows] = []
        self._bounds: list[Rows] = []
        self._pairs = self._repeated = 0

    def add(self, rows: _Read) -> None:
        if not self._has_ids:  # the label's log-prob alone says nothing of other tokens
            return
        sample, window = rows.sample, rows.sample.window
        offset = window.first - window.start
        ids = np.where(rows.logprobs > -np.inf, rows.ids, -1)
        # A token that a row lacks has its share of the mass outside. Where that is not known it counts as the row's
        # least one, so that a row of one id says nothing.
        known = ~np.isnan(rows.outside)
        others = np.where(known, rows.outside - np.log(np.maximum(rows.others, 1)), rows.least)
        speaks = (known | (sample.stored.certain > 1))[:, None] & (ids >= 0)
        logprobs = np.where(speaks, np.maximum(rows.logprobs, _LEAST_LOGPROB), -np.inf)
        tokens = np.append(sample.tokens[: window.last - window.start], sample.labels[-1:][sample.labels[-1:] >= 0])
        self._evidence.add(tokens, offset, ids, logprobs, np.maximum(others, _LEAST_LOGPROB))
        self._add_loss(rows)
        self._add_repeated(rows)

    def _add_loss(self, rows: _Read) -> None:
        known = rows.has_targets & (rows.sample.labels >= 0) & ~np.isnan(rows.outside)
        loss = -rows.label
        if not self._exact:
            # No more than this is left to a token that the row lacks.
            most = np.minimum(np.minimum(rows.least, rows.outside), 0.0)
            loss = -np.maximum(np.where(np.isnan(rows.of_label), most, rows.of_label), _LEAST_LOGPROB)
        lower, upper = entropy_bounds(rows.logprobs, rows.outside, rows.others)
        there = ~np.isnan(rows.entropy)
        bounds = np.stack([np.where(there, rows.entropy, bound) for bound in (lower, upper)])
        self._loss.append(loss[known])
        self._bounds.append(bounds[:, known])

    def _add_repeated(self, rows: _Read) -> None:
        pairs = rows.has_targets[1:] & rows.has_targets[:-1]
        same = (rows.ids[1:] == rows.ids[:-1]).all(axis=1)
        for values in (rows.logprobs, rows.sampled, rows.outside[:, None]):
            same &= ((values[1:] == values[:-1]) | np.isnan(values[1:])).all(axis=1)
        self._pairs += int(np.count_nonzero(pairs))
        self._repeated += int(np.count_nonzero(pairs & same))

    def judge(self, found: Plausibility) -> None:
        """The figures, and what they make impossible or unlikely."""
        if not self._has_ids:
            found.unchecked.append("text: without ids, rows do not say which tokens they are about")
            return
        evidence = self._evidence
        loss, bounds = np.concatenate(self._loss), np.concatenate(self._bounds, axis=1)
        repeated = self._repeated / max(self._pairs, 1)
        after, of = evidence.means
        found.text = Text(
            rows=evidence.rows,
            after=after,
            of=of,
            cross_entropy=float(loss.mean()) if len(loss) else None,
            at_least=not self._exact,
            entropy=(float(bounds[0].mean()), float(bounds[1].mean())) if len(loss) else None,
            repeated=repeated,
        )
        if evidence.rows < _FEWEST_ROWS:
            found.unchecked.append(f"text: {evidence.rows} rows are too few: give more --windows")
        elif not evidence.is_clear(_LEAST_ERRORS):
            found.problems.append(f"the text is not what the rows are about, by either reading: {evidence}")
        elif evidence.likelier != "after":
            found.problems.append(f"the rows are about their own tokens, as if moved by one: {evidence}")
        elif not evidence.is_clear():
            found.unchecked.append(f"text: {evidence}, which is not clear: give more --windows")
        if len(loss) >= _FEWEST_ROWS:
            found.unlikely += self._unlikely_loss(loss, bounds)
        if repeated > _MOST_REPEATED:
            found.unlikely.append(f"{repeated:.0%} of the rows are equal to the row before them")

    def _unlikely_loss(self, loss: Rows, bounds: Rows) -> list[str]:
        below, above = bounds[0] - loss, loss - bounds[1]
        if above.mean() > _MOST_ABOVE + _noise(above):
            return [
                f"the text surprises the rows: a mean cross-entropy of {loss.mean():.3f} nats, where they are sure of "
                f"it to {bounds[1].mean():.3f}"
            ]
        if self._exact and below.mean() > _MOST_BELOW + _noise(below):
            return [
                f"the rows are less sure than the text is likely: a mean entropy of {bounds[0].mean():.3f} nats or "
                f"more, and a cross-entropy of {loss.mean():.3f}, as at a temperature above 1, or early in training"
            ]
        return []


def _noise(values: Rows) -> float:
    return _CLEAR_ERRORS * float(values.std()) / math.sqrt(len(values))
