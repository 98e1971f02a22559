"""SentencePiece models without a tokenizer.json: the ids of sentencepiece itself, or one line."""

from __future__ import annotations

import functools
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from support.commands import Run, refused
from support.models.saved import sample_text

from storage import LogitCache
from storage.errors import InputError
from student.models.text_ids import text_prefix, text_suffix
from student.models.tokenizer import open_tokenizer
from student.models.tokenizer_file import PROBES

_IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "allow_whitespace_only_pieces": True, **_IDENTITY},
    "gemma": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False,
              "user_defined_symbols": ["<turn>", "\n\n", "▁▁"], **_IDENTITY},
    "bpe": {"model_type": "bpe"},
    "symbols": {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<sep>", "<sep2>"],
                "remove_extra_whitespaces": False},
    "unigram": {"model_type": "unigram", "user_defined_symbols": ["<sep>"]},
    "case": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf", "control_symbols": ["<cls>"]},
    "bytes": {"model_type": "unigram", "byte_fallback": True, **_IDENTITY},
}  # fmt: skip
TEXTS = (
    *PROBES, *sample_text().splitlines(keepends=True)[:400], sample_text()[:20_000],
    "a<sep>b <sep> c  <sep2>d<sep><sep>", "  <turn>user\n\nx  <turn>", " ▁x▁ ", "a\u0300\u0301 A\u030a \u1100\u1161",
)  # fmt: skip


@functools.cache
def trained(kind: str, **options: Any) -> bytes:
    """A tiny SentencePiece model."""
    written = io.BytesIO()
    # Runs of one character make segmentations of equal probability, of which either is right.
    lines = [line for line in sample_text().splitlines() if "===" not in line and "---" not in line]
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=900, num_threads=1, minloglevel=2,
        **KINDS.get(kind, {}), **options,
    )  # fmt: skip
    return written.getvalue()


def folder_of(path: Path, model: bytes, name: str = "tokenizer.model", **settings: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / name).write_bytes(model)
    if settings:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_alone_has_the_ids_of_sentencepiece(tmp_path: Path, kind: str) -> None:
    tokenizer = open_tokenizer(folder_of(tmp_path / "a", trained(kind)))
    processor = SentencePieceProcessor(model_proto=trained(kind))
    for text in TEXTS:
        if "===" not in text and "---" not in text:
            assert tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] == processor.encode(text), text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert len(tokenizer) == processor.get_piece_size()
    kept = "def f(x):\n    return 'é 日本語 😀'  # ok"
    if kind in ("llama", "gemma", "bytes"):
        assert tokenizer.decode(tokenizer(kept, add_special_tokens=False)["input_ids"]) == kept


def test_settings_and_class_beside_a_model(tmp_path: Path) -> None:
    added = {"3": {"content": "<renamed>", "special": True}, "900": {"content": "<new>", "special": True}}
    for token in added.values():
        token |= {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}  # type: ignore[dict-item]
    llama = open_tokenizer(
        folder_of(tmp_path / "a", trained("llama"), tokenizer_class="LlamaTokenizer", added_tokens_decoder=added,
                  chat_template="{{ messages }}", pad_token="<new>")
    )  # fmt: skip
    assert text_prefix(llama) == (1,)
    assert (llama.convert_ids_to_tokens(3), llama.pad_token_id, llama.chat_template) == (
        "<renamed>", 900, "{{ messages }}",
    )  # fmt: skip
    t5 = open_tokenizer(folder_of(tmp_path / "b", trained("unigram"), "spiece.model", tokenizer_class="T5Tokenizer"))
    assert (text_suffix(t5), len(t5)) == ((2,), 1000)
    # A class with an order of its own: the pieces of sentencepiece under that class's ids.
    name = "sentencepiece.bpe.model"
    other = open_tokenizer(folder_of(tmp_path / "c", trained("plain"), name, tokenizer_class="XLMRobertaTokenizer"))
    pieces = SentencePieceProcessor(model_proto=trained("plain")).encode("the quick fox", out_type=str)
    assert other.tokenize("the quick fox") == pieces
    assert other.bos_token_id == 0


def test_sampling_of_segmentations_is_off(tmp_path: Path) -> None:
    sampling = {"enable_sampling": True, "alpha": 0.1, "nbest_size": -1}
    said: list[str] = []
    tokenizer = open_tokenizer(
        folder_of(tmp_path / "a", trained("unigram"), "spiece.model", tokenizer_class="GPTSw3Tokenizer",
                  sp_model_kwargs=sampling), log=said.append,
    )  # fmt: skip
    assert len({tuple(tokenizer.encode(PROBES[2])) for _ in range(20)}) == 1
    assert len(said) == 1
    assert "sampling" in said[0]


def test_what_is_no_such_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.model is not a SentencePiece model: copy it again"):
        open_tokenizer(folder_of(tmp_path / "a", b"\x00\x01 no model"))
    with pytest.raises(InputError, match=r"tokenizer\.model is neither a BPE nor a Unigram model"):
        open_tokenizer(folder_of(tmp_path / "b", trained("char", model_type="char")))


def test_a_stream_of_a_model_alone(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "a", trained("llama"))
    (tmp_path / "text.txt").write_text(sample_text()[:5_000], encoding="utf-8", newline="")
    arguments = ("logit-cache", "tokenize", "--text", tmp_path / "text.txt", "--tokenizer", folder, "--out")
    done = run(*arguments, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    cache = LogitCache.open(str(tmp_path / "cache"))
    expected = SentencePieceProcessor(model_proto=trained("llama")).encode(sample_text()[:5_000])
    assert cache.tokens.read(0, len(cache.tokens)).tolist() == expected
    assert sorted(cache.tokenizer_files()) == ["tokenizer.json", "tokenizer_config.json"]

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    refused(run(*arguments, tmp_path / "other"), "tokenizer.model", "pip install 'logit-cache[sentencepiece]'")
    assert not (tmp_path / "other").exists()
