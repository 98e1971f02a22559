"""`audit` without a teacher: honest entries of every kind pass, and each impossibility is found by its own condition.

The distributions are known and dense; the text is sampled from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.imported import Known, V, known
from support.caches.small import (
    dense_targets,
    entry_2,
    make_corpus,
    make_entry,
    varopt_targets,
    without_rows,
    write_entry,
)
from support.commands import Run, refused, succeeded

from logit_cache.caching.recompress import RecompressJob, recompress
from logit_cache.fidelity.plausibility import Plausibility, plausibility
from logit_cache.fidelity.row_bounds import entropy_bounds, least_logprob, most_outside
from storage.format.manifest.entry import Encoding, TeacherEntry, Windowing
from storage.format.targets import SparseTargets

K, LENGTH, DOCUMENTS = 12, 60, 16
FIELDS = ("entropy", "half-tail", "label")


class World:
    """A stream, the distribution behind each position, and what an entry of it is made from."""

    def __init__(self, folder: Path, data: Known, tokens: np.ndarray | None = None) -> None:
        self.logprobs = np.concatenate(data.logprobs)
        self.tokens = np.concatenate(data.tokens) if tokens is None else tokens
        self.labels = np.append(self.tokens[1:], -1)
        self.labels[data.starts[1:] - 1] = -1
        self.cache = folder / "cache"
        self.record = make_corpus(str(self.cache), self.tokens.astype(np.uint16), V, data.starts)
        self.numbers = 0

    def entry(self, *fields: str, k: int = K, **changes: Any) -> TeacherEntry:
        """Version 1 with `version`, else of version 2; `step`: of its codes."""
        version, step = changes.pop("version", 2), changes.pop("step", None)
        windowing = Windowing(context_tokens=LENGTH, stride_tokens=LENGTH, isolate_documents=True)
        made = make_entry(self.record, k, windowing=windowing, encoding=changes.get("encoding", "codes"))
        if version == 1:
            return made
        entry = entry_2(made, *fields, **changes)
        if step is not None:
            encoding = Encoding(**{**dict(entry.encoding), "step_nats": step, "value_step_nats": min(step, 1 / 16)})
            entry = entry.model_copy(update={"encoding": encoding})
        return entry

    def check(self, entry: TeacherEntry, targets: SparseTargets, **options: Any) -> Plausibility:
        self.numbers += 1
        write_entry(self.cache, f"e{self.numbers}", entry, targets)
        return plausibility(str(self.cache), f"e{self.numbers}", **{"windows": 200, "seed": 1, **options})

    def top(self, k: int = K, logits: np.ndarray | None = None) -> SparseTargets:
        return dense_targets(self.logprobs if logits is None else logits, k, self.labels)

    def sampled(self) -> SparseTargets:
        return varopt_targets(self.logprobs, K, self.labels)


@pytest.fixture(scope="module")
def data() -> Known:
    """From flat distributions to sharp ones."""
    parts = [known((LENGTH,) * 2, seed, scale) for seed, scale in enumerate(np.linspace(0.5, 4, DOCUMENTS // 2))]
    return Known([ids for part in parts for ids in part.tokens], [rows for part in parts for rows in part.logprobs])


@pytest.fixture(scope="module")
def world(data: Known, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("plausible"), data)


def without_normaliser(targets: SparseTargets) -> SparseTargets:
    sums = np.logaddexp.reduce(targets.logprobs.astype(np.float64), axis=1)[:, None]
    return replace(targets, log_tail=None, logprobs=(targets.logprobs - sums).astype(np.float32))


ALL = {"distinct", "outside", "label", "entropy"}
SAMPLES: dict[str, Any] = {"method": "varopt"}
HONEST: dict[str, tuple[Callable[[World], TeacherEntry], Callable[[World], SparseTargets], set[str]]] = {
    "codes": (lambda w: w.entry(*FIELDS), World.top, ALL),
    "coarse codes": (lambda w: w.entry(*FIELDS, step=1.0), World.top, ALL),
    "float32": (lambda w: w.entry(*FIELDS, encoding="float32"), World.top, ALL | {"masses"}),
    "version 1": (lambda w: w.entry(version=1), World.top, ALL | {"masses"}),
    "lean": (lambda w: w.entry(), World.top, {"distinct", "outside"}),
    "every id": (lambda w: w.entry(*FIELDS, k=V), lambda w: w.top(V), ALL - {"outside"}),
    "one id": (lambda w: w.entry(*FIELDS, k=1), lambda w: w.top(1), ALL),
    "samples": (lambda w: w.entry(*FIELDS, "sampled-logprobs", **SAMPLES), World.sampled, ALL | {"sampled"}),
    "samples in float32": (
        lambda w: w.entry(*FIELDS, "sampled-logprobs", **SAMPLES, encoding="float32"),
        World.sampled,
        ALL | {"sampled", "masses"},
    ),
    "lean samples": (lambda w: w.entry(**SAMPLES), World.sampled, {"distinct", "outside"}),
    "mass not known": (
        lambda w: w.entry("label", tail="unknown"),
        lambda w: without_normaliser(w.top()),
        {"distinct", "label"},
    ),
    "one id of a mass not known": (
        lambda w: w.entry(k=1, tail="unknown"),
        lambda w: without_normaliser(w.top(1)),
        {"distinct"},
    ),
    "some rows": (
        lambda w: w.entry("label", positions="some"),
        lambda w: without_rows(w.top(), np.arange(len(w.tokens)) % 3 == 0),
        {"distinct", "outside", "label"},
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_entries_are_plausible(world: World, name: str) -> None:
    entry, targets, checks = HONEST[name]
    found = world.check(entry(world), targets(world))
    assert found.plausible, (found.problems, found.checks)
    assert set(found.checks) == checks
    assert all(check.broken == 0 for check in found.checks.values())
    assert found.unlikely == []
    assert found.text is not None
    assert (found.text.cross_entropy is None) == name.endswith("mass not known")
    if name == "one id of a mass not known":
        assert "text: 0 rows are too few: give more --windows" in found.unchecked
        return
    assert found.text.after > found.text.of + 0.5


@pytest.mark.parametrize("name", ["codes", "coarse codes", "version 1", "samples", "lean samples", "float32"])
def test_honest_entries_that_were_made_smaller_are_plausible(world: World, name: str) -> None:
    entry, targets, _ = HONEST[name]
    world.check(entry(world), targets(world))
    first = f"e{world.numbers}"
    for k in (9, 5):
        to = f"{first}-{k}"
        recompress(RecompressJob(cache=str(world.cache), name=first, to=to, k=k, format_version=2))
        found = plausibility(str(world.cache), to, 200)
        assert found.plausible, (found.problems, found.checks)
        first = to


def test_the_figures_are_those_of_the_whole_distributions(world: World) -> None:
    """Cross-entropy exact with log-probs of labels, and else no more than that; the entropy between its bounds."""
    rows = np.flatnonzero(world.labels >= 0)
    loss = -world.logprobs[rows, world.labels[rows]].mean()
    entropy = -(np.exp(world.logprobs[rows]) * world.logprobs[rows]).sum(axis=1).mean()
    exact = world.check(world.entry(*FIELDS, encoding="float32"), world.top()).text
    assert exact is not None
    assert (exact.cross_entropy, exact.at_least) == (pytest.approx(loss, rel=1e-5), False)
    assert exact.entropy == (pytest.approx(entropy, rel=1e-5),) * 2
    lean = world.check(world.entry(encoding="float32"), world.top()).text
    assert lean is not None
    assert lean.cross_entropy is not None
    assert lean.entropy is not None
    assert lean.at_least
    assert loss - 1 < lean.cross_entropy < loss
    assert lean.entropy[0] < entropy < lean.entropy[1]


@pytest.mark.parametrize("k", [0, 1, 3, 20, 49, 50])
def test_bounds_hold_the_entropy_of_every_distribution(k: int) -> None:
    """From uniform to a single id, some ids masked; equal to it where the row leaves nothing open."""
    rng = np.random.default_rng(k)
    logits = rng.normal(size=(3000, 50)) * rng.choice([0.0, 0.1, 1.0, 4.0, 40.0], size=(3000, 1))
    logits[rng.random((3000, 50)) < rng.choice([0.0, 0.5], size=(3000, 1))] = -1e4
    logp = -np.sort(-(logits - np.logaddexp.reduce(logits, axis=1)[:, None]), axis=1)
    entropy = -(np.exp(logp) * logp).sum(axis=1)
    heads = np.where(np.arange(50) < k, logp, -np.inf)
    outside = np.logaddexp.reduce(logp[:, k:], axis=1, initial=-np.inf)
    others = np.full(3000, 50 - k)
    lower, upper = entropy_bounds(heads, outside, others)
    assert (lower <= entropy + 1e-9).all()
    assert (entropy <= upper + 1e-9).all()
    if k:
        assert (outside <= most_outside(least_logprob(heads), others) + 1e-9).all()
    flat = np.ptp(logp, axis=1) < 1e-12
    np.testing.assert_allclose(upper[flat], np.log(50))
    np.testing.assert_allclose(lower[flat], np.log(50) if k else 0.0, atol=1e-9)
    if k == 50:
        np.testing.assert_allclose(lower, upper)
    elif k == 49:
        assert np.abs(upper - lower).max() < 1e-9


def twice(world: World) -> SparseTargets:
    exact = world.top()
    ids = exact.token_ids.copy()
    free = (ids[:, [0, 5]] != world.labels[:, None]).all(axis=1)
    ids[free, 5] = ids[free, 0]
    return replace(exact, token_ids=ids)


def next_best(world: World) -> SparseTargets:
    """The next K ids in place of the first, everything else in order."""
    wide = world.top(2 * K)
    tail = np.logaddexp(wide.log_tail, np.logaddexp.reduce(wide.logprobs[:, :K], axis=1))
    narrow = world.top()
    return replace(narrow, token_ids=wide.token_ids[:, K:], logprobs=wide.logprobs[:, K:], log_tail=tail)


def moved(by: int) -> Callable[[World], SparseTargets]:
    return lambda world: dense_targets(np.roll(world.logprobs, by, axis=0), K, np.full(len(world.tokens), -1))


def values_of(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[World], SparseTargets]:
    return lambda world: replace(world.top(), **{name: change(getattr(world.top(), name))})


def renormalised(world: World) -> SparseTargets:
    """Log-probs among the ids of a row beside the mass outside them."""
    return replace(without_normaliser(world.top()), log_tail=world.top().log_tail)


def strangers(world: World) -> SparseTargets:
    found = world.sampled()
    is_sampled = found.is_kept & ~found.is_certain
    return replace(found, logprobs=np.where(is_sampled, found.log_tail[:, None] - 0.5, found.logprobs))


def other_rows(values: np.ndarray) -> np.ndarray:
    rolled = np.roll(values, 7)
    return np.where(np.isnan(values), np.nan, np.where(np.isnan(rolled), -0.01, rolled)).astype(np.float32)


IMPOSSIBLE: dict[str, tuple[dict[str, Any], Callable[[World], SparseTargets], set[str]]] = {
    "an id twice": ({"fields": FIELDS}, twice, {"distinct"}),
    "no longer the whole": ({"fields": (), "encoding": "float32"}, renormalised, {"masses"}),
    "tail of 10 % more": (
        {"fields": (), "version": 1},
        values_of("log_tail", lambda tail: tail + np.float32(0.1)),
        {"masses"},
    ),
    "not the likeliest ids": ({"fields": ()}, next_best, {"outside"}),
    "samples of their own": (
        {"fields": ("sampled-logprobs",), "encoding": "float32", **SAMPLES},
        strangers,
        {"sampled"},
    ),
    "labels of other rows": ({"fields": FIELDS}, values_of("label_logprob", other_rows), {"label"}),
    "labels that are sure": (
        {"fields": ("label",), "tail": "unknown"},
        lambda w: without_normaliser(values_of("label_logprob", lambda v: np.minimum(v, -1e-3) * 0)(w)),
        {"label"},
    ),
    "entropies of other rows": ({"fields": FIELDS}, values_of("entropy", other_rows), {"entropy"}),
    "entropies in bits": (
        {"fields": FIELDS},
        values_of("entropy", lambda nats: (nats / np.log(2)).astype(np.float32)),
        {"entropy"},
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_the_impossible_is_found_by_its_own_condition(world: World, name: str) -> None:
    settings, targets, broken = IMPOSSIBLE[name]
    fields = settings["fields"]
    entry = world.entry(*fields, **{key: value for key, value in settings.items() if key != "fields"})
    found = world.check(entry, targets(world))
    assert not found.plausible
    assert {each for each, check in found.checks.items() if not check.is_possible} == broken
    (check,) = (found.checks[each] for each in broken)
    assert check.broken > 0.3 * check.rows
    assert check.position is not None


@pytest.mark.parametrize(
    ("by", "said"), [(1, "about their own tokens"), (-1, "by either reading"), (200, "by either reading")]
)
def test_rows_that_were_moved_are_not_about_the_text(world: World, by: int, said: str) -> None:
    found = world.check(world.entry(), moved(by)(world))
    assert not found.plausible
    assert [said in problem for problem in found.problems] == [True]
    assert all(check.broken == 0 for check in found.checks.values())


def test_another_text_under_the_same_rows(world: World, data: Known, tmp_path: Path) -> None:
    other = World(tmp_path, data, world.tokens[::-1].copy())
    found = other.check(other.entry(), other.top())
    assert "by either reading" in found.problems[0]


def test_the_unlikely_is_reported_and_decides_nothing(world: World) -> None:
    flat = world.check(world.entry(*FIELDS), world.top(logits=world.logprobs / 2))
    assert flat.plausible
    assert "at a temperature above 1" in flat.unlikely[0]
    sharp = world.check(world.entry(*FIELDS), world.top(logits=world.logprobs * 3))
    assert sharp.plausible
    assert "surprises" in sharp.unlikely[0]
    repeated = np.arange(len(world.tokens))
    repeated[4::5] -= 1
    stuck = world.check(world.entry(), world.top(logits=world.logprobs[repeated]))
    assert stuck.plausible
    assert "20% of the rows are equal" in stuck.unlikely[0]


def test_a_text_without_mass_surprises_its_rows_and_no_more(world: World) -> None:
    """A teacher that masks all but its likeliest ids leaves nothing to tokens of the text that are none of them."""
    masked = np.where(world.logprobs < -np.sort(-world.logprobs)[:, K - 1 : K], -1e4, world.logprobs)
    found = world.check(world.entry(), world.top(logits=masked))
    assert found.plausible
    assert "surprises" in found.unlikely[0]
    assert found.text is not None
    assert np.isfinite([found.text.after, found.text.of, found.text.cross_entropy or np.nan]).all()


def test_rows_that_are_few_or_flat_say_nothing_of_the_text(world: World, tmp_path: Path) -> None:
    found = world.check(world.entry(), moved(1)(world), windows=1)
    assert found.plausible
    assert "58 rows are too few" in found.unchecked[-1]
    flat = World(tmp_path, known((LENGTH,) * 3, 0, 0.4))
    found = flat.check(flat.entry(k=V), flat.top(V))
    assert found.plausible
    assert found.unchecked[-1].endswith("which is not clear: give more --windows")


def test_the_command(world: World, run: Run) -> None:
    write_entry(world.cache, "good", world.entry(*FIELDS), world.top())
    write_entry(world.cache, "bad", world.entry(*FIELDS), twice(world))
    line = ("logit-cache", "audit", world.cache, "--seed", 3)
    done = succeeded(run(*line, "--name", "good"))
    assert done.stdout.splitlines()[0].endswith("good without a teacher, seed 3")
    assert "that one did, only --teacher shows" in done.stdout
    bad = run(*line, "--name", "bad")
    assert (bad.returncode, bad.stdout.splitlines()[-1][:13]) == (1, "NOT PLAUSIBLE")
    for name, status in (("good", 0), ("bad", 1)):
        done = run(*line, "--name", name, "--json")
        found = json.loads(done.stdout)
        assert (done.returncode, found["plausible"]) == (status, not status)
        assert found["checks"]["distinct"]["rows"] == found["positions"] == DOCUMENTS * LENGTH
    refused(run(*line), "--name", "good")
    refused(run(*line, "--name", "good", "--dtype", "float32"), "--dtype", "add --teacher")
