"""The texts of single tokens: together they are the text, whatever the tokenizer, and what is no text is marked."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from support.caches.small import make_corpus
from support.caches.texts import byte_level
from support.models.saved import FAST, tiny_tokenizer

from logit_cache.passage.token_text import Part, TokenTexts
from storage import LogitCache
from storage.errors import FormatError

TEXT = "The cat\n\tnaïve 👩\u200d👧 🦊 日本語\u00a0\u202e <tag> def f(x):   return x\r\n"


def texts_of(url: Path, files: dict[str, bytes], vocabulary: int) -> TokenTexts:
    make_corpus(str(url), np.zeros(4, dtype=np.uint16), vocabulary, tokenizer_files=files)
    return TokenTexts(LogitCache.open(str(url)))


def written(parts: list[Part]) -> bytes:
    """The bytes that some parts show."""
    found = b""
    for part in parts:
        code, digits = (re.fullmatch(pattern, part.text) for pattern in (r"⟨U\+([0-9A-F]+)⟩", r"⟨([0-9A-F ]+)⟩"))
        if part.kind == "mark" and code:
            found += chr(int(code[1], 16)).encode()
        else:
            found += bytes.fromhex(digits[1]) if part.kind == "mark" and digits else part.text.encode()
    return found


@pytest.mark.parametrize("kind", [kind for kind in FAST if kind != "wordpiece"])
def test_nothing_of_a_text_is_lost(kind: str, tmp_path: Path) -> None:
    backend = tiny_tokenizer(kind).backend_tokenizer
    texts = texts_of(tmp_path, {"tokenizer.json": backend.to_str().encode()}, backend.get_vocab_size())
    normal = TEXT if backend.normalizer is None else backend.normalizer.normalize_str(TEXT).replace("▁", " ")
    ids = backend.encode(TEXT, add_special_tokens=False).ids
    if kind == "unigram":  # whose letters beyond its alphabet are its unknown token
        ids = [token for token in ids if backend.id_to_token(token) != "<unk>"]
        normal = backend.decode(ids)
    shown = written([part for token in ids for part in texts.parts(token)]).decode()
    assert shown.removeprefix(" ") == normal.removeprefix(" ")


def test_what_is_no_text_is_marked(tmp_path: Path) -> None:
    tokenizer = byte_level()
    texts = texts_of(tmp_path, {"tokenizer.json": tokenizer.to_str().encode()}, 400)
    whole, *_, last = tokenizer.encode(" 😀🦊").ids
    assert texts.parts(whole) == (Part("space", " "), Part("text", "😀"))
    assert texts.text(last) == "⟨8A⟩"
    assert texts.parts(tokenizer.encode("\n").ids[0]) == (Part("newline", "\n"),)
    assert texts.parts(0) == (Part("mark", "<s>"),)
    assert texts.text(399) == "⟨id 399⟩"
    assert "".join(part.text for part in texts.parts(tokenizer.encode("\u007f").ids[0])) == "⟨U+007F⟩"


def test_pieces_of_several_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({"ðŁ": 0, "ðŁa": 1, "aðŁ": 2, "x" * 900: 3, "": 4}, []))
    tokenizer.decoder = decoders.ByteLevel()
    texts = texts_of(tmp_path, {"tokenizer.json": tokenizer.to_str().encode()}, 5)
    assert [texts.text(token) for token in (0, 1, 2)] == ["⟨F0 9F⟩", "⟨F0 9F⟩a", "a⟨F0 9F⟩"]
    assert texts.text(3) == "x" * 256 + "⟨644 bytes more⟩"
    assert texts.text(4) == "⟨empty⟩"


def test_without_a_tokenizer_that_can_be_read_ids_are_shown(tmp_path: Path) -> None:
    texts = texts_of(tmp_path / "a", {"vocab.txt": b"a"}, 9)
    assert (texts.text(7), texts.joined([7, 8])) == ("⟨id 7⟩", "⟨id 7⟩⟨id 8⟩")
    with pytest.raises(FormatError, match=r"its tokenizer\.json cannot be opened"):
        texts_of(tmp_path / "b", {"tokenizer.json": b"{}"}, 9).text(7)
