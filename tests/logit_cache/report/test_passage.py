"""A look inside: what a passage's page says of teachers and models, and that nothing of a cache becomes markup."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import report_folders as invented
from support.caches.small import make_corpus
from support.caches.texts import TEXT, write_text_cache
from support.commands import Run, refused, succeeded

from logit_cache.report.findings import gather_recipe
from logit_cache.report.folders import RecipeFolder, read_folder
from logit_cache.report.page import make_report, passage_page
from logit_cache.report.passage import Reader, Token, recipe_tokens, tokens_of
from storage import LogitCache


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "cache"
    write_text_cache(path)
    return path


@pytest.fixture(scope="module")
def tokens(url: Path) -> list[Token]:
    cache = LogitCache.open(str(url))
    return tokens_of(cache, 0, cache.record.corpus.positions)


def readers(token: Token) -> dict[str, Reader]:
    return {reader.label.removeprefix("entry "): reader for reader in token.readers}


def test_the_tokens_are_the_text(tokens: list[Token]) -> None:
    shown = "".join(part.text for token in tokens for part in token.parts).replace("⟩⟨", " ")
    assert shown == TEXT.replace("🦊", "⟨F0 9F A6 8A⟩").replace("é", "⟨C3 A9⟩").replace("\u202e", "⟨E2 80 AE⟩")
    assert [token.following for token in tokens] == [*(token.parts for token in tokens[1:]), ()]


def test_what_a_reader_expects_sums_to_one_and_a_sample_is_called_one(url: Path, tokens: list[Token]) -> None:
    cache = LogitCache.open(str(url))
    for token in tokens:
        found = readers(token)
        for name in ("exact", "lean"):
            assert sum(bar.mass or 0.0 for bar in found[name].bars) == pytest.approx(1, abs=0.05)
        assert not found["exact"].sampled
        row = cache.teacher("lean").read(token.position, token.position + 1)
        certain = int(row.certain[0])
        assert (len(found["lean"].bars), len(found["lean"].sampled)) == (min(10, certain) + 1, min(10, 12 - certain))
        assert all(bar.mass is None for bar in found["lean"].sampled), "their log-probs are not stored"
        assert ("sampled from the others; each stands for" in found["lean"].sampled_facts) == (certain < 12)
        assert (found["some"].facts == "no targets here") == (token.position % 3 > 0)


def test_the_entropy_is_exact_a_bound_or_not_known(url: Path, tokens: list[Token]) -> None:
    cache = LogitCache.open(str(url))
    for token in tokens:
        row = cache.teacher("exact").read(token.position, token.position + 1)
        assert row.entropy is not None
        exact = readers(token)["exact"].facts
        assert exact.startswith(f"entropy {row.entropy[0]:.2f} nats")
        p = np.exp(row.logprobs[0].astype(np.float64))
        tail = math.exp(float(row.log_tail[0])) if row.log_tail is not None else 0.0
        assert -(p * np.log(p)).sum() - tail * math.log(tail) <= row.entropy[0] + 0.05, "a bucket is a lower bound"
        assert readers(token)["lean"].facts.startswith("entropy ≥ ")
        assert token.entropy.startswith("mean entropy ≥ ")
    alone = tokens_of(cache, 1, 3, ["some"])
    assert [(token.level, token.entropy) for token in alone] == [(None, "entropy not known")] * 2


def test_what_follows_is_marked(tokens: list[Token]) -> None:
    marked = [bar.parts for token in tokens for bar in readers(token)["exact"].bars if bar.follows]
    assert len(marked) > len(tokens) / 3
    for token in tokens:
        assert {bar.parts for bar in readers(token)["exact"].bars if bar.follows} <= {token.following}


def test_a_page_of_a_cache(url: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = succeeded(run("logit-cache", "inspect", url, "--at", "0:30", "--html", out))
    assert (done.stdout, done.stderr) == ("", f"{out}: written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"], "and no partial file"
    page = out.read_text(encoding="utf-8")
    assert page.count('type="radio"') == 30
    assert page.count(" checked>") == 1
    assert "cache, positions 0 to 29" in page
    assert not re.search(r"https?:|url\(|@import| on\w+=|<script|<form", page)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert "&lt;s&gt;" in page


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>'
    vocabulary = {evil: 0, "'><img src=x onerror=alert(2)>": 1, "\u202e": 2, "x" * 100_000: 3}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": evil}
    added = [{"id": 0, "content": evil, "special": True, "single_word": False, "lstrip": False, "rstrip": False}]
    file = {"version": "1.0", "model": model, "added_tokens": [{**added[0], "normalized": False}], "decoder": None}
    files = {"tokenizer.json": json.dumps(file).encode()}
    url = tmp_path / "<b>cache"
    make_corpus(str(url), np.array([0, 1, 2, 3], dtype=np.uint16), 4, tokenizer_files=files)
    page = passage_page(LogitCache.open(str(url)), 0, 4).decode()
    assert not re.search(r"<script|<img|<b>cache|\u202e", page)
    assert page.count("&lt;script&gt;") > 2
    assert len(page) < 60_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--at", "x"], ["--at x", "a range A:B"]),
        (["--at", "-1"], ["--at -1"]),
        (["--at", "3:"], ["--at 3:"]),
        (["--at", "5:5"], ["--at 5:5", "0..", "before B"]),
        (["--at", "9:3"], ["--at 9:3"]),
        (["--at", "0:999999999"], ["--at 0:999999999"]),
        (["--html", "page.html"], ["give --at A:B with it"]),
        (["--at", "3", "--html", "page.html", "--json"], ["no --json"]),
        (["--at", "3", "--html", "no-folder/page.html"], ["--html no-folder/page.html", "a folder that exists"]),
    ],
)
def test_what_cannot_be_shown_is_refused(
    url: Path, run: Run, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    refused(run("logit-cache", "inspect", url, *arguments, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_too_long_a_passage_is_refused(run: Run, tmp_path: Path) -> None:
    make_corpus(str(tmp_path), np.zeros(2002, dtype=np.uint16), 3)
    refused(run("logit-cache", "inspect", tmp_path, "--at", "0:2001"), "2,001 positions, at most 2,000")


def test_a_range_is_its_positions(url: Path, run: Run) -> None:
    each = [json.loads(run("logit-cache", "inspect", url, "--at", at, "--json").stdout) for at in (4, 5)]
    assert json.loads(run("logit-cache", "inspect", url, "--at", "4:6", "--json").stdout) == each
    text = [run("logit-cache", "inspect", url, "--at", at).stdout for at in (4, 5, "4:6")]
    assert text[2] == "\n".join(text[:2])


def test_a_recipe_shows_its_first_student_and_the_models_beside_it(tmp_path: Path) -> None:
    folder = invented.recipe_folder(tmp_path / "recipe")
    read = read_folder(folder)
    assert isinstance(read, RecipeFolder)
    found = recipe_tokens(gather_recipe(read))
    assert found is not None
    tokens, seed = found
    assert (len(tokens), seed) == (invented.PASSAGE, 0)
    labels = ["entry ensemble-0", "teacher llama", "teacher gpt2", "student", "control", "live teachers"]
    assert [reader.label for reader in tokens[0].readers] == labels
    student = tokens[3].readers[3]
    assert student.facts == "entropy 1.25 nats, next token 13.5 %"
    assert [bar.mass for bar in student.bars] == pytest.approx([0.5, 0.25, 0.125, 0.125])

    for file in folder.rglob("student-student/passage.json"):
        file.write_text(file.read_text().replace(invented.stream_of(folder), "f" * 64))
    make_report([folder], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'type="radio"' not in page, "of another stream there is nothing to show"


def test_of_a_cache_without_tokens_there_is_no_passage(run: Run, tmp_path: Path) -> None:
    folder = invented.recipe_folder(tmp_path / "recipe", seeds=(0,), roles=("student",))
    (folder / "valid").rename(tmp_path / "whole")
    succeeded(run("logit-cache", "push", tmp_path / "whole", folder / "valid", "--without-tokens"))
    succeeded(run("logit-cache", "report", folder))
    refused(run("logit-cache", "inspect", folder / "valid", "--at", "0:3"), "without its tokens")


def test_a_damaged_passage_is_refused(run: Run, tmp_path: Path) -> None:
    folder = invented.recipe_folder(tmp_path / "recipe", seeds=(0,), roles=("student",))
    (file,) = folder.rglob("passage.json")
    data = json.loads(file.read_text())
    damages: list[list[list[Any]]] = [[[-1, 0.5]], [[1, 1.5]], [[1, 0.5]] * 11, [["a", 0.5]]]
    for likeliest in damages:
        data["expected"][2]["likeliest"] = likeliest
        file.write_text(json.dumps(data))
        refused(run("logit-cache", "report", folder), "passage.json", "expected a passage", "expected.2.likeliest")
