"""Text of every kind → token stream: the stored stream, and refusals."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.caches.streams import documents, write
from support.commands import ROOT
from support.models.saved import sample_text, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from logit_cache.corpus import pieces, record, spool
from logit_cache.corpus.config import CorpusConfig
from logit_cache.corpus.sources import names, text_files
from logit_cache.corpus.tokenize import tokenize
from storage import LogitCache
from storage.errors import InputError
from student.models.vocabulary import cache_vocabulary


def documents_of(cache: LogitCache) -> list[str]:
    """The text of each document; the `gpt2` tokenizer loses nothing."""
    decode = tiny_tokenizer("gpt2").decode
    return [decode(tokens, clean_up_tokenization_spaces=False) for tokens, _ in documents(cache)]


def made(tmp_path: Path, gpt2: str, *text: str, **options: Any) -> LogitCache:
    config = CorpusConfig(text=text, out=str(tmp_path / "cache"), tokenizer=gpt2, **options)
    record = tokenize(config)
    cache = LogitCache.open(config.out)
    assert cache.record == record
    return cache


def source_counts(cache: LogitCache) -> list[tuple[str, int, int]]:
    return [(s.name, s.documents, s.text_bytes) for s in cache.record.corpus.sources]


# --- plain text ------------------------------------------------------------------------------------------------------


def test_files_are_documents_and_text_is_kept_as_it_is(tmp_path: Path, gpt2: str) -> None:
    texts = ["Grüße, 日本語 😀\r\nline two\n\n", "e\u0301 — \t no line feed at the end", sample_text()[:5_003]]
    paths = [write(tmp_path / f"{name}.txt", text) for name, text in zip("bac", texts, strict=True)]
    write(tmp_path / "empty.txt", "")
    cache = made(tmp_path, gpt2, *paths, str(tmp_path / "empty.txt"))
    assert documents_of(cache) == texts
    tokens = cache.tokens.read(0, len(cache.tokens))
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [
        i for text in texts for i in tiny_tokenizer("gpt2")(text, add_special_tokens=False)["input_ids"]
    ]
    sizes = [len(text.encode()) for text in texts]
    assert source_counts(cache) == [("b.txt", 1, sizes[0]), ("a.txt", 1, sizes[1]), ("c.txt", 1, sizes[2]),
                                    ("empty.txt", 0, 0)]  # fmt: skip
    record = cache.record.corpus
    assert (record.positions, record.documents, record.text_bytes) == (len(tokens), 3, sum(sizes))
    assert not record.has_loss_mask
    assert cache.loss_mask is None
    expected = b"tokens" + tokens.astype("<u4").tobytes() + b"documents" + cache.document_starts.astype("<u8").tobytes()
    assert record.stream_sha256 == hashlib.sha256(expected).hexdigest()
    assert str(tmp_path) not in record.model_dump_json()
    assert all(str(tmp_path).encode() not in data for data in cache.tokenizer_files().values())


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_blank_lines_separate_documents(tmp_path: Path, gpt2: str, newline: str) -> None:
    parts = ["first\nparagraph", "second", "", "\nfourth, after five line feeds", "last\n"]
    text = "\n\n".join(parts).replace("\n", newline)
    cache = made(tmp_path, gpt2, write(tmp_path / "a.txt", text), document_separator="\n\n")
    assert documents_of(cache) == [part.replace("\n", newline) for part in parts if part]
    assert cache.record.corpus.document_separator == "\n\n"
    assert cache.record.corpus.text_bytes == sum(len(part.replace("\n", newline)) for part in parts)


def test_a_token_can_end_each_document(tmp_path: Path, gpt2: str) -> None:
    # The third is tokenised in several pieces.
    texts = ["one", "two", "three " * 60_000, "four"]
    path = write(tmp_path / "a.txt", "\n\n".join([*texts[:2], "", *texts[2:]]))
    cache = made(tmp_path, gpt2, path, document_separator="\n\n", append_token="</s>")
    assert documents_of(cache) == [f"{text}</s>" for text in texts]
    assert cache.record.corpus.text_bytes == sum(map(len, texts))


def test_many_files_are_folded_into_one_source(tmp_path: Path, gpt2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (record, spool):
        monkeypatch.setattr(module, "MAX_SOURCES", 3)
    for index in range(6):
        write(tmp_path / f"{index}.txt", "x" * (index + 1))
    cache = made(tmp_path, gpt2, f"{tmp_path}/*.txt")
    assert source_counts(cache) == [("0.txt", 1, 1), ("1.txt", 1, 2), ("4 more files", 4, 3 + 4 + 5 + 6)]
    assert cache.document_sources is not None
    assert cache.document_sources.tolist() == [0, 1, 2, 2, 2, 2]


def sources_of(cache: LogitCache) -> list[str]:
    """The name of the source of each document."""
    assert cache.document_sources is not None
    return [cache.record.corpus.sources[number].name for number in cache.document_sources]


def test_named_inputs_of_one_name_are_one_source(tmp_path: Path, gpt2: str) -> None:
    (tmp_path / "code").mkdir()
    for name in ("code/a.py", "code/b.py", "math.txt", "more.txt", "plain.txt"):
        write(tmp_path / name, name)
    text = [
        f"math={tmp_path}/math.txt",
        f"code={tmp_path}/code",
        str(tmp_path / "plain.txt"),
        f"math={tmp_path}/m*e.txt",
    ]
    cache = made(tmp_path, gpt2, *text)
    assert source_counts(cache) == [("math", 2, 16), ("code", 2, 18), ("plain.txt", 1, 9)]
    assert sources_of(cache) == ["math", "code", "code", "plain.txt", "math"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_column_names_the_source_of_each_row(tmp_path: Path, gpt2: str, kind: str) -> None:
    rows = [{"text": f"text {n}", "domain": domain} for n, domain in enumerate(["b", "a", "b", "c d", "a"])]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        path.write_text("text,domain\n" + "".join(f"{row['text']},{row['domain']}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = write(tmp_path / "own.txt", "other")
    cache = made(tmp_path, gpt2, f"c d={own}", str(path), source_column="domain")
    assert sources_of(cache) == ["c d", "b", "a", "b", "c d", "a"]
    assert source_counts(cache) == [("c d", 2, 5 + 6), ("b", 2, 12), ("a", 2, 12)]


def test_rows_whose_column_names_no_source(tmp_path: Path, gpt2: str) -> None:
    rows = [{"text": "x", "domain": "a"}, {"text": "y"}, {"text": "z", "domain": 3}, {"text": "u", "domain": " "}]
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"rows.jsonl line 2: expected a text in 'domain', .* found nothing"):
        made(tmp_path, gpt2, path, source_column="domain")
    cache = made(tmp_path, gpt2, path, source_column="domain", skip_bad_rows=True)
    assert (sources_of(cache), cache.record.corpus.skipped_rows) == (["a"], 3)


def test_names_of_sources_are_never_merged(tmp_path: Path, gpt2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (record, spool, names):
        monkeypatch.setattr(module, "MAX_SOURCES", 3)
    rows = write(tmp_path / "rows.jsonl", "".join(json.dumps({"text": "x", "d": f"n{n}"}) + "\n" for n in range(4)))
    with pytest.raises(InputError, match="more than 3 sources, the last one 'n3'"):
        made(tmp_path, gpt2, rows, source_column="d", skip_bad_rows=True)
    for index in range(3):
        write(tmp_path / f"{index}.txt", "x")
    with pytest.raises(InputError, match="more than 3 sources, the last one 'named'"):
        made(tmp_path, gpt2, f"{tmp_path}/?.txt", f"named={rows}")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        (("{}/a.txt",), "domain", "a.txt: a text has no column 'domain': name it, with --text NAME="),
        (("one={}/rows.jsonl",), "domain", "every --text has a name of its own"),
        (("{}/rows.csv",), "domain", "expected a column 'domain' with the source of each row, found columns text"),
        (("one={}/none.txt",), None, r"none.txt: no such file; .* was read as SOURCE=PATH"),
        (("={}/a.txt",), None, "expected the name of a source, of 1 to 256 characters"),
        (("x" * 257 + "={}/a.txt",), None, "expected the name of a source, of 1 to 256 characters"),
        (("one=",), None, "expected NAME=PATH, and there is no path"),
    ],
)
def test_sources_that_cannot_be_named(
    tmp_path: Path, gpt2: str, text: tuple[str, ...], column: str | None, message: str
) -> None:
    write(tmp_path / "a.txt", "x")
    write(tmp_path / "rows.jsonl", '{"text": "x", "domain": "a"}\n')
    write(tmp_path / "rows.csv", "text\nx\n")
    with pytest.raises(InputError, match=message):
        made(tmp_path, gpt2, *(each.format(tmp_path) for each in text), source_column=column)
    assert not (tmp_path / "cache").exists()


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_trained_like_the_seeds(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", sample_text())
    config = CorpusConfig(text=(path,), out=str(tmp_path / "cache"), train_tokenizer=500)
    record = tokenize(config)
    cache = LogitCache.open(config.out)
    cache.save_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<s>", "</s>"]
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
    assert (len(tokenizer), record.tokenizer.vocabulary_size) == (500, 500)
    assert cache_vocabulary(cache) == tokenizer.get_vocab()
    whole = json.loads(cache.tokenizer_files()["tokenizer.json"])
    assert whole["normalizer"] == {"type": "NFKC"}
    assert (whole["pre_tokenizer"]["type"], whole["pre_tokenizer"]["add_prefix_space"]) == ("ByteLevel", True)
    assert whole["decoder"]["type"] == "ByteLevel"
    # One document, one space before it, however many pieces.
    tokens = cache.tokens.read(0, len(cache.tokens))
    assert tokens.tolist() == tokenizer(sample_text(), add_special_tokens=False, verbose=False)["input_ids"]
    import unicodedata

    assert tokenizer.decode(tokens) == " " + unicodedata.normalize("NFKC", sample_text())
    # Text of bytes that were never seen has ids too.
    assert tokenizer.decode(tokenizer("ᚠ\x07", add_special_tokens=False)["input_ids"]).strip(" ") == "ᚠ\x07"


def test_training_again_gives_the_same_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", sample_text())
    code = (
        "import sys; from logit_cache.corpus.tokenize import *; "
        f"print(tokenize(CorpusConfig(text=({path!r},), out=sys.argv[1], train_tokenizer=900)).tokenizer.fingerprint)"
    )
    config = CorpusConfig(text=(path,), out=str(tmp_path / "cache"), train_tokenizer=900)
    record = tokenize(config)
    # Another process has another hash seed and other threads.
    again = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "again")],
        check=True, capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"},
    )  # fmt: skip
    assert again.stdout.strip() == record.tokenizer.fingerprint

    def content(name: str) -> dict[str, bytes]:
        root = tmp_path / name
        files = (p for p in root.rglob("*") if p.is_file() and "receipts" not in p.parts)
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}

    before = content("cache")
    assert before == content("again")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    assert tokenize(config) == record
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")} == times


def test_a_validation_cache_takes_the_tokenizer_of_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", sample_text()[:20_000])
    first = tokenize(CorpusConfig(text=(path,), out=str(tmp_path / "first"), train_tokenizer=400))
    for index, source in enumerate((tmp_path / "first", tmp_path / "first" / "tokenizer", f"file://{tmp_path}/first")):
        out = str(tmp_path / f"second-{index}")
        second = tokenize(CorpusConfig(text=(path,), out=out, tokenizer=str(source)))
        assert second.tokenizer == first.tokenizer
        assert second.corpus == first.corpus
        assert LogitCache.open(out).tokenizer_files() == LogitCache.open(str(tmp_path / "first")).tokenizer_files()


def test_a_tokenizer_that_is_not_fast(tmp_path: Path) -> None:
    tiny_tokenizer("bytes").save_pretrained(tmp_path / "bytes")
    text = sample_text()[:3_000]
    cache = made(tmp_path, str(tmp_path / "bytes"), write(tmp_path / "a.txt", text))
    assert tiny_tokenizer("bytes").decode(cache.tokens.read(0, len(cache.tokens))) == text
    cache.save_tokenizer(tmp_path / "back")
    assert AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab() == tiny_tokenizer("bytes").get_vocab()


@pytest.mark.parametrize(("size", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_the_width_of_ids_follows_the_vocabulary(tmp_path: Path, size: int, dtype: type) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "words")
    text = write(tmp_path / "a.txt", f"t1 t60000 t{size - 1}")
    cache = made(tmp_path, str(tmp_path / "words"), text)
    tokens = cache.tokens.read(0, len(cache.tokens))
    assert (cache.vocabulary_size, tokens.dtype) == (size, dtype)
    assert tokens.tolist() == [1, 60_000, size - 1]


# --- streaming -------------------------------------------------------------------------------------------------------


def test_the_stream_does_not_depend_on_blocks(tmp_path: Path, gpt2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 5_000)
    path = write(tmp_path / "a.txt", sample_text() + "\n\n" + "=" * 20_000)
    digests = set()
    for block in (1 << 20, 4_096, 997):
        monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
        config = CorpusConfig(text=(path,), out=str(tmp_path / str(block)), tokenizer=gpt2, document_separator="\n\n")
        digests.add(tokenize(config).corpus.stream_sha256)
    assert len(digests) == 1


def test_progress_moves_and_ends_at_the_total(tmp_path: Path, gpt2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PIECE_CHARACTERS", 5_000), ("BATCH_CHARACTERS", 10_000)):
        monkeypatch.setattr(pieces, name, value)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 4_096)
    write(tmp_path / "a.txt", sample_text())
    write(tmp_path / "b.jsonl", "".join(json.dumps({"text": f"row {i}", "more": "x" * 99}) + "\n" for i in range(50)))
    pq.write_table(pa.table({"text": ["first", "", "e\u0301 😀", "last"] * 125}), tmp_path / "c.parquet")
    size = sum(p.stat().st_size for p in tmp_path.iterdir())
    for options, passes in ({"tokenizer": gpt2}, 1), ({"train_tokenizer": 400}, 2):
        counts: list[int] = []
        opened: list[tuple[str, int | None, str]] = []

        @contextmanager
        def track(*named: Any, opened: Any = opened, counts: Any = counts) -> Iterator[Any]:
            opened.append(named)
            yield counts.append

        text = tuple(f"{tmp_path}/*.{ending}" for ending in ("txt", "jsonl", "parquet"))
        tokenize(CorpusConfig(text=text, out=str(tmp_path / f"cache-{passes}"), **options), track)
        assert opened == [("tokenize", passes * size, "bytes")]
        assert sum(counts) == passes * size
        assert min(counts) >= 0
        assert len(counts) > passes * len(sample_text()) // 20_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux' /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, gpt2: str) -> None:
    line = sample_text().replace("\n", " ").encode()
    for name, repeats in (("small", 4), ("large", 32)):
        (tmp_path / name).write_bytes(line * repeats)
    code = (
        "import re, sys, logit_cache.corpus.pieces as pieces, logit_cache.corpus.sources.text_files as text_files\n"
        "from logit_cache.corpus.tokenize import *\n"
        "pieces.PIECE_CHARACTERS, pieces.BATCH_CHARACTERS, text_files.BLOCK_BYTES = 1 << 14, 1 << 16, 1 << 14\n"
        "folder, tokenizer = sys.argv[1:]\n"
        "for name in ('small', 'large'):\n"
        "    tokenize(CorpusConfig(text=(f'{folder}/{name}',), out=f'{folder}/cache-{name}', tokenizer=tokenizer))\n"
        "    print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), gpt2],
        check=True, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    small, large = (int(line) / 1024 for line in done.stdout.split())
    more = len(line) * 28 / (1 << 20)
    assert more > 3
    # One document of one line. Tokenised at once it takes 190 bytes of memory per byte of text; the growth here
    # is the stream itself, mapped into memory while it is written, and the leftovers of loading a tokenizer again.
    assert large - small < 20 * more, f"{small:.0f} and {large:.0f} MiB at the peak, for {more:.1f} MiB more of text"
