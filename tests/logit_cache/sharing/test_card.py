"""The card of a shared cache: correct, readable by the hub's own parser, and safe from text in records."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt
from support.caches.small import (
    dense_targets,
    entry_2,
    make_corpus,
    make_entry,
    make_entry_2,
    random_sample,
    stream_record,
    write_entry,
)
from support.commands import TESTS

import logit_cache.cli.main
from logit_cache.cli.inspect import cache_text
from logit_cache.describe import describe_cache
from logit_cache.sharing.card import card_text
from storage import LogitCache, SparseTargets
from storage.errors import InputError
from storage.format.manifest.cache import CacheRecord, CorpusSource
from storage.format.manifest.entry import Targets, TeacherEntry
from storage.stores import open_store

GOLDEN = TESTS / "golden" / "v1"
V, N, K = 61, 300, 6


def changed(entry: TeacherEntry, **fields: Any) -> TeacherEntry:
    return TeacherEntry.model_validate({**entry.model_dump(), **fields})


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Makes a cache with one entry of real targets; a missing shard on demand."""

    def cache(missing: tuple[int, ...] = (), encoding: str = "codes", **fields: Any) -> Path:
        path = tmp_path / "cache"
        rng = np.random.default_rng(5)
        tokens = rng.integers(0, V, N).astype(np.uint16)
        record = make_corpus(str(path), tokens, V)
        entry = changed(make_entry(record, K, shard_tokens=64, chunk_tokens=32, encoding=encoding), **fields)
        labels = np.append(tokens[1:], -1).astype(np.int64) if entry.targets.has_label_logprob else np.full(N, -1)
        write_entry(path, "llama", entry, dense_targets(rng.normal(size=(N, V)) * 3, K, labels), missing)
        return path

    return cache


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def results(text: str) -> tuple[SparseTargets, dict[str, Any]]:
    """What the two programs of a card have read: the targets of ours, and the variables of plain Zarr's."""
    found: list[dict[str, Any]] = [{}, {}]
    for program, variables in zip(blocks(text, "python"), found, strict=True):
        exec(compile(program, "README.md", "exec"), variables)
    return found[0]["targets"], found[1]


def record(positions: int = 1000, **corpus: Any) -> CacheRecord:
    made = stream_record(positions, V)
    return made.model_copy(update={"corpus": made.corpus.model_copy(update={"tokens_included": False, **corpus})})


def card_of(record: CacheRecord, **options: Any) -> str:
    """The card of a cache that has a record and nothing else."""
    return card_text(LogitCache(open_store("memory://card/none"), record), **options)


def test_the_hubs_own_parser_reads_the_front_matter() -> None:
    text = card_text(LogitCache.open(str(GOLDEN)), license="cc-by-4.0")
    data = DatasetCard(text).data.to_dict()
    assert data == {
        "license": "cc-by-4.0",
        "pretty_name": "Next-token distributions of codes, exact, incomplete and 1 more",
        "tags": ["logit-cache", "knowledge-distillation", "zarr"],
        "task_categories": ["text-generation"],
        "size_categories": ["n<1K"],
    }
    assert DatasetCard(text).content == text, "the hub's own writer leaves it as it is"


@pytest.mark.parametrize(
    ("positions", "category"),
    [
        (999, "n<1K"),
        (1_000, "1K<n<10K"),
        (10_000_000, "10M<n<100M"),
        (10**9, "1B<n<10B"),
        (10**12 - 1, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_the_size_category_is_that_of_the_tokens(positions: int, category: str) -> None:
    assert DatasetCard(card_of(record(positions))).data.to_dict()["size_categories"] == [category]


@pytest.mark.parametrize("license", ["MIT License", "", "mit\ntags: []", "`x`", "a" * 65])
def test_a_licence_is_an_identifier(license: str) -> None:
    with pytest.raises(InputError, match="licence"):
        card_of(record(), license=license)


def test_a_card_without_a_licence_states_that() -> None:
    card = DatasetCard(card_of(record()))
    assert card.data.to_dict()["license"] == "unknown"
    assert "Not specified by" in card.text


def test_the_card_of_the_golden_cache() -> None:
    cache = LogitCache.open(str(GOLDEN))
    text = card_text(cache)
    for name in cache.teachers:
        assert f"### {name}\n" in text
    section = text[text.index("### codes") : text.index("### exact")]
    targets = cache.teacher("codes").read(0, 44)
    head = float(np.exp(targets.logprobs[:, :4].astype(np.float64)).sum(axis=1).mean())
    mean, residual = re.findall(r"head mass: ([\d.]+) on average, so ([\d.]+) is outside", section)[0]
    assert float(mean) == pytest.approx(head, abs=1e-2)
    assert float(mean) + float(residual) == pytest.approx(1, abs=2e-4)
    # Sums of receipts are of exact log-probs, these are of codes: no position here is near a half.
    below = (np.exp(targets.logprobs.astype(np.float64)).sum(axis=1) < 0.5).mean()
    assert f"below 0.5 at {below:.2%} of the positions" in section
    stored = sum(item.stat().st_size for item in (GOLDEN / "teachers/codes").glob("*/c/**/*") if item.is_file())
    assert f"- size: {stored:,} bytes, {stored / 44:.1f} per token" in section
    assert "- coverage: 16 of 44 positions (36.36%)" in text
    weights = cache.teacher("sampled").entry.teacher.weights
    assert [f"{weight:g}" for weight in weights] == re.findall(r"^  - weight ([\d.]+): `", text, flags=re.MULTILINE)
    assert "varopt, k = 4, rows cut at a cumulative mass of 0.95, seed 7" in text
    for digest in (cache.record.corpus.stream_sha256, cache.teacher("exact").record_sha256):
        assert f"`{digest}`" in text
    assert "**The text is included**" in text


def test_a_derived_entry_names_what_it_came_from(make: Any) -> None:
    text = card_text(LogitCache.open(str(make(derived_from="a" * 64))))
    assert f"derived, not computed by its teacher; sha256 of the source entry's record: `{'a' * 64}`" in text


@pytest.mark.parametrize("labelled", [True, False])
def test_without_tokens_the_card_warns_of_leaks(make: Any, labelled: bool) -> None:
    cache = LogitCache.open(str(make(targets=Targets(k=K, has_label_logprob=labelled))))
    corpus = cache.record.corpus.model_copy(update={"tokens_included": False})
    cache.record = cache.record.model_copy(update={"corpus": corpus})
    text = card_text(cache)
    assert "**The text is not included, and still leaks.**" in text
    assert "attaches it by its digest" in text
    assert ("`label_logprob` identifies it" in text) == labelled


@pytest.mark.parametrize("encoding", ["codes", "float32"])
@pytest.mark.parametrize("missing", [(), (0,), (1, 2), (0, 1, 4)])
def test_its_python_runs(make: Any, monkeypatch: pytest.MonkeyPatch, encoding: str, missing: tuple[int, ...]) -> None:
    path = make(encoding=encoding, missing=missing)
    text = card_text(LogitCache.open(str(path)))
    monkeypatch.chdir(path)
    targets, theirs = results(text)
    assert len(targets.kept) == 8
    assert targets.start == 64 * (0 in missing) + 64 * (missing == (0, 1, 4))
    assert np.array_equal(theirs["token_ids"], targets.token_ids)
    assert np.array_equal(theirs["kept"], targets.kept)
    np.testing.assert_allclose(theirs["logprobs"], targets.logprobs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(theirs["tail"], np.exp(targets.log_tail))


VERSION_2: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "topk": (("entropy", "label"), {}),
    "topk-exact": ((), {"encoding": "float32"}),
    "lean": ((), {"method": "varopt"}),
    "lean-exact": ((), {"method": "varopt", "encoding": "float32"}),
    "whole-sample": (("entropy", "half-tail", "label", "sampled-logprobs"), {"method": "varopt"}),
    "unknown-tail": ((), {"tail": "unknown"}),
    "some": ((), {"method": "varopt", "positions": "some"}),
}


@pytest.mark.parametrize("kind", VERSION_2)
def test_the_python_of_version_2_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, changes = VERSION_2[kind]
    tokens = np.random.default_rng(5).integers(0, V, N).astype(np.uint16)
    made = make_corpus(str(tmp_path), tokens, V)
    targets = random_sample(N, V, K)
    # A row of nothing but sampled ids among those of the example, one of certain ids that are all, one of none.
    certain = np.where(np.arange(N) == 1, 0, targets.certain).astype(np.uint16)
    kept = np.where((np.arange(N) % 3 == 2) & (kind == "some"), 0, targets.kept).astype(np.uint16)
    nothing = (np.arange(N) == 3) & (kind == "lean")
    certain = np.where(nothing, K, np.minimum(certain, kept)).astype(np.uint16)
    targets = replace(
        targets, certain=certain, kept=kept, log_tail=np.where(nothing, -np.inf, targets.log_tail).astype(np.float32)
    )
    if "method" not in changes:
        logits = np.random.default_rng(1).normal(size=(N, V))
        targets = dense_targets(logits, K, np.append(tokens[1:], -1).astype(np.int64))
    write_entry(tmp_path, "llama", entry_2(make_entry(made, K, shard_tokens=64), *fields, **changes), targets)
    text = card_text(LogitCache.open(str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    found, theirs = results(text)
    assert np.array_equal(theirs["kept"], found.kept)
    assert np.array_equal(theirs["token_ids"][found.is_kept], found.token_ids[found.is_kept])
    np.testing.assert_allclose(theirs["logprobs"][found.is_certain], found.logprobs[found.is_certain], atol=1e-5)
    if kind == "unknown-tail":
        assert "tail" not in theirs
    else:
        there = found.kept > 0
        np.testing.assert_allclose(theirs["tail"][there], np.exp(found.log_tail[there]), rtol=1e-5)


def test_a_card_says_what_an_entry_of_version_2_stores_and_serves(tmp_path: Path) -> None:
    tokens = np.arange(N).astype(np.uint16) % V
    made = make_corpus(str(tmp_path), tokens, V)
    targets = random_sample(N, V, K)
    kept = np.where(np.arange(N) % 4, 0, targets.kept).astype(np.uint16)
    targets = replace(targets, kept=kept, certain=np.minimum(targets.certain, kept))
    lean = entry_2(
        make_entry(made, K, shard_tokens=64), method="varopt", positions="some", shrunk_from=[{"k": 9, "seed": 4}]
    )
    write_entry(tmp_path, "lean", lean.model_copy(update={"made": "recompressed"}), targets)
    cache = LogitCache.open(str(tmp_path))
    stored = cache.teacher("lean").stored_bytes()
    both = {
        "targets": "varopt, k = 6, seed 0, temperature 1, sampled from a sample of 9 ids (seed 4), at some positions",
        "stored": "format 2: ids, log-probs of the certain ones, mass outside them",
        "serves": "forward KL with tail sampled, at temperature 1",
        "made": "from another entry, without its teacher",
        "size": f"{stored / N:.1f} per token, {stored / 75:.1f} per position with targets",
        "coverage": "300 of 300 positions",
    }
    card, shown = card_text(cache), cache_text(describe_cache(cache))
    for name, words in both.items():
        assert re.search(rf"^- {name}: .*{re.escape(words)}", card, re.MULTILINE), name
        words = words.replace("per token", "bytes per token")
        assert re.search(rf"^  {name} +.*{re.escape(words)}", shown, re.MULTILINE), name
    assert "targets at 75 of them" in card
    assert "targets at 75 of them" in shown


def test_an_entry_with_nothing_in_it_yet_has_no_example(make: Any) -> None:
    text = card_text(LogitCache.open(str(make(missing=(0, 1, 2, 3, 4)))))
    assert blocks(text, "python") == []
    assert "- coverage: 0 of 300 positions (0.00%)" in text


def test_its_commands_parse(make: Any) -> None:
    lines = "\n".join(blocks(card_text(LogitCache.open(str(make()))), "console")).splitlines()
    assert [line.split()[:2] for line in lines] == [["logit-cache", "verify"], ["logit-cache", "audit"]]
    for line in lines:
        _, name, *arguments = shlex.split(line, comments=True)
        command: click.Command = logit_cache.cli.main.main.commands[name]
        assert not command.make_context(name, arguments).args


HOSTILE = [
    "# heading\n\n<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "`a` <b>b</b> ``c`` <i>d</i>",
    "```\n```python\nimport os",
    "[x](javascript:alert(1)) ![y](https://tracker.example/a.png) https://autolink.example",
    "\n---\nlicense: mit\n---\n",
    "- a\n  - b\n\n1. c",
    "| a | b |\n|---|---|\n| c | d |",
    "`",
    "``",
    "` `` ``` ````",
    "\\`<b>x</b>\\`",
    "ends with a backslash \\",
    "&lt;b&gt; &#60;b&#62;",
    "<!-- ",
    "\u202ecod.exe\u200b\x1b[31m\x00",
    "x" * 4096,
    "",
    " \t\n",
]


def hostile_card(tmp_path: Path, text: str) -> str:
    path = tmp_path / "cache"
    tokens = np.arange(N).astype(np.uint16) % V
    made = make_corpus(str(path), tokens, V, document_sources=[text])
    entry = make_entry_2(made, K, sources=(text,))
    free_text = {"source": text, "revision": text, "architecture": text, "trust_remote_code": True}
    free_text |= {"adapter": text, "adapter_sha256": "a" * 64, "adapter_config_sha256": "b" * 64}
    entry = changed(entry, teacher={"members": [entry.teacher.members[0].model_dump() | free_text]})
    write_entry(path, "a", entry, dense_targets(np.zeros((N, V)), K, np.append(tokens[1:], -1).astype(np.int64)))
    cache = LogitCache.open(str(path))
    sources = tuple(CorpusSource(name=text, documents=1, text_bytes=1) for _ in range(2))
    corpus = cache.record.corpus.model_copy(update={"sources": sources})
    cache.record = cache.record.model_copy(update={"corpus": corpus})
    return card_text(cache)


def structure(text: str) -> list[str]:
    """Every Markdown element of a page in order, with the content of all that is not a code span."""
    found = []
    for block in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text):
        found.append(f"{block.type} {block.tag}")
        found += [
            f"{item.type} {item.attrs} {'' if item.type == 'code_inline' else item.content}"
            for item in block.children or []
        ]
    return found


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_of_records_changes_nothing_but_itself(tmp_path: Path, text: str) -> None:
    plain = DatasetCard(hostile_card(tmp_path / "plain", "made-up"))
    hostile = DatasetCard(hostile_card(tmp_path / "hostile", text))
    assert hostile.data.to_dict() == plain.data.to_dict()
    assert structure(hostile.text) == structure(plain.text)
    assert not set("\u202e\u200b\x1b\x00") & set(hostile.text)
    assert max(map(len, hostile.text.splitlines())) < 1000
    shown = cache_text(describe_cache(LogitCache.open(str(tmp_path / "hostile/cache"))))
    assert all(line.isprintable() for line in shown.split("\n")), "a terminal obeys other characters"


def test_many_sources_are_counted_not_listed() -> None:
    sources = tuple(CorpusSource(name=f"part-{i}", documents=1, text_bytes=1) for i in range(25))
    text = card_of(record(sources=sources))
    assert "`part-19`" in text
    assert "`part-20`" not in text
    assert "and 5 more" in text


def test_the_card_names_targets_without_label_logprob(make: Any) -> None:
    text = card_text(LogitCache.open(str(make(targets=Targets(k=K, has_label_logprob=False)))))
    assert "top-k, k = 6; without `label_logprob`" in text
    assert "300 tokens in 1 document; 1,200 bytes of text" in text
    assert "loss on this text" not in text
