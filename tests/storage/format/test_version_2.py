"""Version 2 of an entry: what is read is within the stated error of what was given, by our decoder and by arithmetic.

Legend: `T` positions, `K` stored ids, `V` vocabulary; `P` the mass of a row's certain ids, `R` that outside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support.caches.small import (
    dense_targets,
    make_corpus,
    make_entry,
    make_entry_2,
    stream_record,
    varopt_targets,
    without_rows,
    write_entry,
)
from support.references.version_2 import decoded_row

from storage import LogitCache, SparseTargets
from storage.cache.writer import EntryWriter, ShardWriter
from storage.errors import CorruptCache, FormatError
from storage.format.chance import ROUNDING, SHRINKING, uniforms
from storage.format.layout import teacher_arrays
from storage.format.manifest.entry import TARGET_FIELDS, TeacherEntry
from storage.format.stored import StoredTargets

V, T, K = 61, 48, 9
STEP, VALUE_STEP, SAMPLED_STEP = 1 / 32, 1 / 256, 1 / 2
LEAST = -(2**15 - 2) * VALUE_STEP
FLOAT = 2e-6  # what float32 adds
ALL = TARGET_FIELDS
EXACT_FIELDS: Any = tuple(name for name in TARGET_FIELDS if name != "sampled-logprobs")
NAMES = {"half-tail": "log_tail_half", "label": "label_logprob", "entropy": "entropy"}


@cache
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, T).astype(np.uint16)


@cache
def logits() -> np.ndarray:
    """Row 0 is flat, row 1 sharp; row 2 has ids that a teacher masks."""
    found = np.random.default_rng(1).normal(size=(T, V)) * 2
    found[0], found[1] = 0.0, found[1] * 20
    found[2, 7:] = -1e5
    return found


def labels() -> np.ndarray:
    return np.append(tokens()[1:].astype(np.int64), -1)


@cache
def top_k(k: int = K) -> SparseTargets:
    found = dense_targets(logits(), k, labels())
    assert np.isneginf(found.log_tail[2])
    return replace(found, **{name: np.maximum(getattr(found, name), -2000) for name in ("logprobs", "label_logprob")})


@cache
def varopt(temperature: float = 1.0) -> SparseTargets:
    found = varopt_targets(logits().clip(-20), K, labels(), temperature)
    assert found.certain[0] == 0
    assert 0 < found.certain[4] < K or temperature != 1.0
    return found


EVERY_THIRD = np.arange(T) % 3 == 1
CASES: dict[str, tuple[Callable[[], SparseTargets], dict[str, Any]]] = {
    "top-k, lean": (top_k, {}),
    "top-k, all": (top_k, {"fields": EXACT_FIELDS}),
    "top-k, K = V": (lambda: top_k(V), {"k": V, "fields": EXACT_FIELDS}),
    "top-k, exact": (top_k, {"fields": EXACT_FIELDS, "encoding": "float32"}),
    "top-k, tail unknown": (top_k, {"tail": "unknown", "made": "imported", "fields": ("entropy",)}),
    "top-k, some rows": (lambda: without_rows(top_k(), EVERY_THIRD), {"positions": "some", "fields": EXACT_FIELDS}),
    "varopt, lean": (varopt, {"method": "varopt"}),
    "varopt, all": (varopt, {"method": "varopt", "fields": ALL}),
    "varopt, exact": (varopt, {"method": "varopt", "fields": ALL, "encoding": "float32"}),
    "varopt, exact, lean": (varopt, {"method": "varopt", "encoding": "float32"}),
    "varopt at 2, all": (lambda: varopt(2.0), {"method": "varopt", "temperature": 2.0, "fields": ALL}),
    "varopt, some rows": (
        lambda: without_rows(varopt(), EVERY_THIRD), {"method": "varopt", "positions": "some", "fields": ALL},
    ),
}  # fmt: skip


NO_IDS: dict[str, Any] = {"method": "none", "tail": "unknown", "fields": ("label",)}
WITHOUT_IDS: dict[str, tuple[Callable[[], SparseTargets], dict[str, Any]]] = {
    "no ids": (top_k, {**NO_IDS, "k": 0}),
    "no ids, exact": (top_k, {**NO_IDS, "k": 0, "encoding": "float32"}),
}


def entry_of(record: Any, name: str) -> TeacherEntry:
    changes = dict((CASES | WITHOUT_IDS)[name][1])
    return make_entry_2(record, changes.pop("k", K), **changes, shard_tokens=32, chunk_tokens=16)


@pytest.fixture(params=CASES)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, TeacherEntry, SparseTargets]:
    """A cache whose entry `a` is a case, and `b` one of version 1; what `a` was given."""
    record = make_corpus(str(tmp_path), tokens(), V)
    entry, given = entry_of(record, request.param), CASES[request.param][0]()
    write_entry(tmp_path, "a", entry, given)
    write_entry(tmp_path, "b", make_entry(record, K), dense_targets(logits().clip(-20), K, labels()))
    return tmp_path, entry, given


def test_what_is_read_is_within_the_stated_error(written: tuple[Path, TeacherEntry, SparseTargets]) -> None:
    path, entry, given = written
    opened = LogitCache.open(str(path))
    assert [opened.teacher(name).entry.format_version for name in "ab"] == [2, 1]
    assert np.array_equal(opened.teacher("b").read(0, T).token_ids, top_k().token_ids)
    read, group = opened.teacher("a").read(0, T), zarr.open(str(path), mode="r")["teachers/a"]
    names = {folder.name for folder in (path / "teachers/a").iterdir() if folder.is_dir()} - {"receipts"}
    assert names == teacher_arrays(entry).keys()
    arrays, record = {name: group[name][:] for name in names}, group.attrs["logit_cache"]
    for row in range(T):
        by_hand = decoded_row(record, arrays, row)
        kept = slice(0, int(given.kept[row]))
        assert read.token_ids[row, kept].tolist() == by_hand.pop("ids")
        np.testing.assert_allclose(read.logprobs[row, kept], by_hand.pop("logprobs"), rtol=1e-6, atol=1e-6)
        for name, number in by_hand.items():
            np.testing.assert_allclose(getattr(read, name)[row], number, rtol=1e-6, atol=1e-6, err_msg=name)
        check_row(entry, given.rows(row, row + 1), read.rows(row, row + 1))


def check_row(entry: TeacherEntry, given: SparseTargets, read: SparseTargets) -> None:
    """One row against what was given, each number within its stated error."""
    kept, certain, codes = int(given.kept[0]), int(given.certain[0]), entry.encoding.kind == "codes"
    assert (int(read.kept[0]), int(read.certain[0])) == (kept, certain)
    assert (read.token_ids[0, kept:] == 65_535).all()
    assert np.isneginf(read.logprobs[0, kept:]).all()
    for field, name in NAMES.items():
        there, was = getattr(read, name), getattr(given, name)
        assert (there is not None) == entry.targets.has(field)
        if there is not None:
            error = VALUE_STEP / 2 + FLOAT if codes else 0.0
            was = np.where(np.isneginf(was), was, np.maximum(was, LEAST)) if codes else was
            np.testing.assert_allclose(there, was, rtol=0, atol=error, equal_nan=True, err_msg=name)
    assert (read.log_tail is None) == (entry.targets.tail == "unknown")
    if kept == 0:
        assert read.log_tail is None or np.isnan(read.log_tail[0])
        return
    order = np.argsort(given.token_ids[0, certain:kept].astype(int))
    assert read.token_ids[0, :certain].tolist() == given.token_ids[0, :certain].tolist()
    assert read.token_ids[0, certain:kept].tolist() == given.token_ids[0, certain:kept][order].tolist()
    heads, were = (targets.logprobs[0, :certain].astype(np.float64) for targets in (read, given))
    drawn, exact = read.logprobs[0, certain:kept], given.logprobs[0, certain:kept][order]
    if not codes:
        assert np.array_equal(heads, were)
        assert np.isnan(drawn).all() or np.array_equal(drawn, exact)
        return
    if read.log_tail is not None:
        assert np.abs(heads - were).max(initial=0.0) <= 1.5 * STEP + FLOAT
        assert math.isclose(np.exp(heads).sum() + math.exp(read.log_tail[0]), 1.0, abs_tol=FLOAT)
        for mine, theirs in (
            (np.exp(heads).sum(), np.exp(were).sum()),
            *np.exp([[read.log_tail[0], given.log_tail[0]]]),
        ):
            assert abs(mine - theirs) <= math.expm1(STEP / 2) * theirs + FLOAT
    else:
        assert np.abs((heads - heads[0]) - (were - were[0])).max() <= STEP / 2 + FLOAT
        assert math.isclose(np.exp(heads).sum(), 1.0, abs_tol=FLOAT)
    if not entry.targets.has("sampled-logprobs"):
        assert np.isnan(drawn).all()
        return
    assert (np.abs(drawn - exact) <= SAMPLED_STEP + FLOAT).all()
    tempered = read.log_tail if entry.targets.temperature == 1.0 else read.log_tail_half
    assert tempered is not None
    assert (drawn <= entry.targets.temperature * (tempered[0] - math.log(max(kept - certain, 1))) + STEP + FLOAT).all()


def test_the_mean_of_one_over_a_sampled_probability_is_exact() -> None:
    """Over seeds, which are keys of the random numbers, for ids of any distance from a code."""
    draws, row = 1_500, varopt().rows(5, 6)
    sampled = int(row.kept[0]) - int(row.certain[0])
    record = stream_record(T, V)
    inverse = []
    for seed in range(draws):
        entry = make_entry_2(record, K, ALL, method="varopt", seed=seed)
        read = StoredTargets.of(entry, row).decoded()
        inverse.append(np.exp(-read.logprobs[0, -sampled:].astype(np.float64)))
    by_id = np.argsort(row.token_ids[0, -sampled:])
    wanted = np.exp(-row.logprobs[0, -sampled:].astype(np.float64))[by_id]
    ratio = np.array(inverse) / wanted
    assert (ratio.std(axis=0) > 0.05).all(), "they are rounded both ways"
    assert (np.abs(ratio.mean(axis=0) - 1) <= 4.5 * ratio.std(axis=0) / math.sqrt(draws)).all()


def test_random_numbers_are_a_pure_function_of_seed_use_and_position() -> None:
    whole = uniforms(7, ROUNDING, 0, 100, 9)
    assert (whole.shape, whole.min() >= 0, whole.max() < 1) == ((100, 9), True, True)
    assert abs(whole.mean() - 0.5) < 5 / math.sqrt(12 * whole.size)
    for start, stop in ((0, 1), (13, 14), (40, 100)):
        assert np.array_equal(uniforms(7, ROUNDING, start, stop, 9), whole[start:stop])
    for other in (uniforms(8, ROUNDING, 0, 100, 9), uniforms(7, SHRINKING, 0, 100, 9)):
        assert not np.isin(other, whole).any()


def test_masses_at_the_ends_of_the_codes() -> None:
    """A tail that is next to nothing is not nothing, and a head of next to nothing is not none."""
    entry = make_entry_2(stream_record(T, V), K, method="varopt")
    tails = np.array([-1e-9, -3000.0, -0.5, -40.0], dtype=np.float32)
    given = replace(varopt().rows(3, 7), log_tail=tails)
    stored = StoredTargets.of(entry, given)
    assert stored.broken_rule() is None
    read = stored.decoded().log_tail
    assert read is not None
    assert np.isfinite(read).all()
    assert math.exp(read[1]) == 0.0


def test_a_short_row_of_a_teacher_that_gives_the_other_ids_nothing() -> None:
    entry = make_entry_2(stream_record(T, V), K, ALL, method="varopt")
    row, count = top_k().rows(2, 3), np.array([7], dtype=np.uint16)
    unused = np.arange(K) >= 7
    ids, logprobs = np.where(unused, 65_535, row.token_ids), np.where(unused, -np.inf, row.logprobs)
    given = replace(row, token_ids=ids.astype(np.uint16), logprobs=logprobs, kept=count, certain=count)
    stored = StoredTargets.of(entry, given)
    assert stored.broken_rule() is None
    check_row(entry, given, stored.decoded())


# --- the rules: an array, what is changed in it, and what is said of it ----------------------------------------------


def at(row: Any, column: Any, number: Any) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[(row, column) if column is not None else row] = number

    return change


DOES_NOT_FIT = "is there in a row without targets, or none in a row that has some"
BROKEN: list[tuple[str, str, Callable[[np.ndarray], None], str]] = [
    ("varopt, all", "kept", at(4, None, K + 1), "kept exceeds K"),
    ("varopt, all", "certain", at(4, None, K + 1), "certain exceeds kept"),
    ("varopt, all", "kept", at(0, None, 0), "a row is without targets, and the entry says that none is"),
    ("top-k, all", "certain", at(4, None, K - 1), "an id is sampled in an entry of top-k targets"),
    ("top-k, all", "ids", at(4, 3, V), f"a token id is not below the vocabulary size {V}"),
    ("varopt, all", "ids", at(4, K - 1, V - 1), f"a token id is not below the vocabulary size {V}"),
    ("top-k, some rows", "ids", at(1, 0, 1), "an id beyond kept is not 0"),
    ("varopt, all", "ids", at(4, K - 1, 0), "an id comes twice in a row"),
    ("varopt, all", "certain_codes", at(4, K - 1, 1), "certain_codes is not 0 in a column"),
    ("varopt, all", "sampled_codes", at(4, 0, 1), "sampled_codes is not 0 in a column"),
    ("top-k, some rows", "certain_codes", at(1, 1, 1), "certain_codes is not 0 in a column"),
    ("varopt, exact", "sampled_logprobs", at(4, 0, -1), "sampled_logprobs is not 0 in a column"),
    ("top-k, all", "certain_codes", at(4, 0, 1), "column 0 of certain_codes is not 0"),
    ("top-k, exact", "certain_logprobs", at(4, 2, np.nan), "a log-prob is not finite, or positive"),
    ("top-k, exact", "certain_logprobs", at(4, 0, 0.1), "a log-prob is not finite, or positive"),
    ("varopt, exact", "sampled_logprobs", at(4, K - 1, -np.inf), "a log-prob is not finite, or positive"),
    ("top-k, exact", "certain_logprobs", at(4, 2, -1e3), "log-probs do not descend along a row"),
    ("top-k, all", "mass_code", at(4, None, 2**15 - 1), "mass_code holds the fill value"),
    ("top-k, all", "label_code", at(4, None, 2**15 - 1), "label_code holds the fill value"),
    ("top-k, some rows", "mass_code", at(1, None, 0), f"mass_code {DOES_NOT_FIT}"),
    ("top-k, all", "entropy_code", at(4, None, -(2**15)), f"entropy_code {DOES_NOT_FIT}"),
    ("top-k, exact", "log_tail", at(4, None, np.nan), f"log_tail {DOES_NOT_FIT}"),
    ("varopt, all", "mass_code", at(4, None, -(2**15) + 1), "mass_code is infinite where it cannot be"),
    ("varopt, exact", "log_tail_half", at(4, None, -np.inf), "log_tail_half is infinite where it cannot be"),
    ("top-k, exact", "log_tail", at(4, None, np.inf), "log_tail is infinite where it cannot be"),
    ("top-k, all", "entropy_code", at(4, None, -(2**15) + 1), "entropy_code is infinite where it cannot be"),
    ("top-k, K = V", "half_tail_code", at(4, None, 0), "half_tail_code is not -inf where all ids are certain"),
    ("top-k, all", "entropy_code", at(4, None, -1), "entropy_code is negative"),
    ("top-k, exact", "entropy", at(4, None, -0.1), "entropy is negative"),
    ("top-k, exact", "log_tail", at(4, None, 0.1), "log_tail is positive: no probability exceeds 1"),
    ("varopt, all", "mass_code", at(0, None, 0), "mass_code says that no id is certain, or does not where it must"),
    ("varopt, all", "mass_code", at(4, None, 2**15 - 2), "mass_code says that no id is certain, or does not"),
    ("top-k, all", "label_code", at(4, None, -(2**15)), "label_code is missing where a token follows"),
    ("top-k, all", "label_code", at(4, None, -(2**15) + 1), "label_code is infinite, or there where no token follows"),
    ("top-k, all", "label_code", at(T - 1, None, -4), "label_code is infinite, or there where no token follows"),
    ("top-k, exact", "label_logprob", at(4, None, 0.1), "a log-prob is positive: no probability exceeds 1"),
    ("no ids", "label_code", at(4, None, 2**15 - 1), "label_code holds the fill value"),
    ("no ids", "label_code", at(4, None, -(2**15)), "label_code is missing where a token follows"),
    ("no ids, exact", "label_logprob", at(4, None, np.nan), "label_logprob is missing where a token follows"),
    ("no ids", "label_code", at(T - 1, None, -4), "label_code is infinite, or there where no token follows"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "array", "change", "message"), BROKEN)
def test_values_that_break_a_rule_are_neither_written_nor_read(
    case: str,
    array: str,
    change: Callable[[np.ndarray], None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = make_corpus(str(tmp_path), tokens(), V, tokenizer_files={"tokenizer.json": b"{}"})
    entry = entry_of(record, case).model_copy(update={"layout": make_entry(record, K).layout})
    sound = StoredTargets.of(entry, (CASES | WITHOUT_IDS)[case][0]())
    assert sound.broken_rule() is None
    damaged = replace(sound, arrays={name: values.copy() for name, values in sound.arrays.items()})
    change(damaged.arrays[array])

    writer = EntryWriter.open(str(tmp_path), "a", entry)
    monkeypatch.setattr("storage.cache.writer.shard_values", lambda *given: damaged)
    with pytest.raises(FormatError, match=f"shard 0 is not written: .*{message}"):
        writer.commit(0, top_k())
    ShardWriter(LogitCache.open(str(tmp_path)).teacher("a").receipts).commit(0, damaged.arrays)
    with pytest.raises(CorruptCache, match=f"breaks the format: .*{message}"):
        LogitCache.open(str(tmp_path)).teacher("a").read(0, 5)


def test_an_id_may_come_twice_where_it_was_projected() -> None:
    entry = make_entry_2(stream_record(T, V), K, method="varopt", made="projected")
    twice = varopt().token_ids.copy()
    twice[4, K - 1] = twice[4, K - 2]
    stored = StoredTargets.of(entry, replace(varopt(), token_ids=twice))
    assert stored.broken_rule() is None
    assert sorted(stored.decoded().token_ids[4]) == sorted(twice[4])


@pytest.mark.parametrize(("has_mask", "ids"), [(True, True), (False, True), (True, False)])
def test_rows_of_trained_positions_are_those_of_the_loss_mask(tmp_path: Path, has_mask: bool, ids: bool) -> None:
    url, mask = str(tmp_path), ~EVERY_THIRD & (np.arange(T) < T - 1)
    record = make_corpus(url, tokens(), V, loss_mask=mask if has_mask else None)
    changes = {"positions": "trained", "shard_tokens": 32, "chunk_tokens": 16}
    entry = make_entry_2(record, K, **changes) if ids else make_entry_2(record, 0, **changes, **NO_IDS)
    given = without_rows(top_k(), ~mask)
    write_entry(url, "a", entry, given)
    opened = LogitCache.open(url)
    if not has_mask:
        with pytest.raises(FormatError, match="no loss mask says which"):
            opened.teacher("a")
        return
    assert np.array_equal(opened.teacher("a").read(0, T).there, mask)
    others = "the rows with targets are not those of the record"
    for name, rows, message in (
        ("fewer", ~mask | (np.arange(T) == 20), others if ids else "label_code is missing where a token follows"),
        ("more", ~mask & (np.arange(T) != 22), others),
    ):
        write_entry(url, name, entry, without_rows(top_k(), rows))
        assert len(opened.teacher(name).read(0, 16)) == 16
        with pytest.raises(CorruptCache, match=message):
            opened.teacher(name).read(16, 32)
    # As `DistillationWindows` leaves the documents of other sources to other teachers.
    stored = opened.teacher("a").stored(0, T)
    assert np.array_equal(stored.without(np.arange(T) < 10).decoded().there, mask & (np.arange(T) >= 10))


@pytest.mark.parametrize("positions", ["all", "trained"])
def test_rows_of_sources_are_those_of_their_documents(tmp_path: Path, positions: str) -> None:
    url, mask, starts = str(tmp_path), ~EVERY_THIRD, np.array([0, 7, 20, 33])
    names = ("b", "a", "c", "a")
    record = make_corpus(url, tokens(), V, starts, loss_mask=mask, document_sources=names)
    entry = make_entry_2(record, K, positions=positions, sources=("a", "c"), shard_tokens=32, chunk_tokens=16)
    wanted = np.arange(T) >= 7
    wanted &= mask if positions == "trained" else True
    given = without_rows(top_k(), ~wanted)
    write_entry(url, "x", entry, given)
    opened = LogitCache.open(url)
    assert np.array_equal(opened.teacher("x").read(0, T).kept > 0, wanted)
    assert np.array_equal(opened.rows_with_targets(entry.targets).read(3, 25), wanted[3:25])
    write_entry(url, "y", entry, without_rows(given, np.arange(T) == 23))
    with pytest.raises(CorruptCache, match="the rows with targets are not those of the record"):
        opened.teacher("y").read(0, T)
    elsewhere = make_entry_2(record, K, positions=positions, sources=("d",), shard_tokens=32, chunk_tokens=16)
    write_entry(url, "z", elsewhere, given)
    with pytest.raises(FormatError, match="no document here is from its source 'd'"):
        opened.teacher("z")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "format_version"),
        ({"format_version": 1}, "made"),
        ({"made": None}, "states how it was made"),
        ({"targets": {"has_label_logprob": True}}, "no has_label_logprob"),
        ({"targets": {"fields": ["label", "entropy"]}}, "alphabetical order"),
        ({"targets": {"fields": ["sampled-logprobs"]}}, "go with varopt"),
        ({"targets": {"order": "ids", "sampling": "systematic"}}, "go with varopt"),
        ({"targets": {"sources": ["b", "a"]}}, "sources are in alphabetical order"),
        ({"targets": {"sources": ["a"], "positions": "some"}}, "go with all or trained positions"),
        ({"targets": {"tail": "unknown", "fields": ["half-tail"]}}, "goes with neither varopt nor half-tail"),
        ({"targets": {"k": 0}}, "a k of 0 goes with the method none"),
        ({"targets": {"method": "none", "fields": ["label"], "tail": "unknown"}}, "a k of 0 goes with the method none"),
        ({"targets": {"method": "none", "k": 0, "fields": ["label"]}}, "the label alone is stored"),
        ({"targets": {"method": "none", "k": 0, "fields": [], "tail": "unknown"}}, "the label alone is stored"),
        ({"encoding": {"mantissa_bits": 12}}, "mantissa_bits goes with version 1"),
        ({"encoding": {"value_step_nats": None}}, "value_step_nats goes with codes"),
    ],
)
def test_a_record_that_says_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    fields = make_entry_2(stream_record(T, V), K).model_dump(mode="json")
    for name, value in changes.items():
        fields[name] = {**fields[name], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        TeacherEntry.model_validate(fields)
