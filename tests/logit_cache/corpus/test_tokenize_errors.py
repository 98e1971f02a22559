"""Text and options that cannot be tokenised: one clear message with the position, and nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from pydantic import ValidationError
from support.caches.streams import write
from support.commands import ROOT
from support.models.saved import sample_text

from logit_cache.corpus import tokenize as corpus
from logit_cache.corpus.config import CorpusConfig
from logit_cache.corpus.tokenize import tokenize
from storage.errors import InputError


def refused(tmp_path: Path, gpt2: str, *text: str, **options: Any) -> str:
    """The message of the InputError; nothing may have been written."""
    config = CorpusConfig(**{"text": text, "out": str(tmp_path / "cache"), "tokenizer": gpt2, **options})
    with pytest.raises(InputError) as caught:
        tokenize(config)
    assert not (tmp_path / "cache").exists()
    return str(caught.value)


@pytest.mark.parametrize("options", [{}, {"tokenizer": None, "train_tokenizer": 300}], ids=["given", "trained"])
def test_an_empty_corpus_is_refused(tmp_path: Path, gpt2: str, options: dict[str, Any]) -> None:
    text = [write(tmp_path / "a.txt", ""), write(tmp_path / "b.jsonl", '{"text": ""}\n')]
    assert "there is no text in it" in refused(tmp_path, gpt2, *text, **options)


def test_wrong_tokenizers_are_refused(tmp_path: Path, gpt2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(tmp_path / "a.txt", "text")
    folder = tmp_path / "broken"
    folder.mkdir()
    assert f"{folder}: cannot be read as a tokenizer" in refused(tmp_path, gpt2, text, tokenizer=str(folder))
    (folder / "tokenizer.json").write_text("{")
    assert f"{folder}: cannot be read as a tokenizer" in refused(tmp_path, gpt2, text, tokenizer=str(folder))
    assert "no such folder" in refused(tmp_path, gpt2, text, tokenizer=str(tmp_path / "none"))
    file = str(Path(gpt2) / "tokenizer.json")
    assert "expected a folder with tokenizer.json or the like, found a file" in refused(
        tmp_path, gpt2, text, tokenizer=file
    )

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refused(tmp_path, gpt2, text, tokenizer="org/name")
    assert message == (
        "org/name: cannot be read as a tokenizer (We couldn't connect to the hub); check the id and the network"
    )


def test_wrong_options_are_refused(tmp_path: Path, gpt2: str) -> None:
    text = write(tmp_path / "a.txt", "text")
    assert "'<eod>' is not a token of this vocabulary" in refused(tmp_path, gpt2, text, append_token="<eod>")
    assert "cannot be read as a chat template" in refused(tmp_path, gpt2, text, chat_template=str(tmp_path / "none"))
    for options, message in (
        ({"tokenizer": gpt2, "train_tokenizer": 300}, "not both"),
        ({}, "not neither"),
        ({"train_tokenizer": 258}, "at least 259"),
        ({"train_tokenizer": 259, "special_tokens": ("<s>", "<a>")}, "at least 260"),
        ({"tokenizer": gpt2, "special_tokens": ("<a>",)}, "goes with --train-tokenizer"),
        ({"tokenizer": gpt2, "document_separator": ""}, "document_separator"),
        ({"tokenizer": gpt2, "text": ()}, "text"),
        ({"tokenizer": gpt2, "surprise": 1}, "surprise"),
    ):
        with pytest.raises(ValidationError, match=message):
            CorpusConfig.model_validate({"text": (text,), "out": "x", **options})


def test_a_folder_that_holds_something_else_is_left_alone(
    tmp_path: Path, gpt2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write(tmp_path / "a.txt", "text")
    out = tmp_path / "full"
    out.mkdir()
    write(out / "thesis.tex", "text")
    monkeypatch.setattr(corpus, "encode", lambda *_: pytest.fail("the work was started"))
    with pytest.raises(InputError, match=r"full holds thesis\.tex and is not a cache"):
        tokenize(CorpusConfig(text=(text,), out=str(out), tokenizer=gpt2))
    with pytest.raises(InputError, match="is a file"):
        tokenize(CorpusConfig(text=(text,), out=text, tokenizer=gpt2))
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_a_full_temporary_folder_is_one_line(tmp_path: Path, gpt2: str) -> None:
    text = write(tmp_path / "a.txt", sample_text())
    code = (
        "import resource, signal, sys; from logit_cache.corpus.tokenize import *\n"
        "from storage.errors import one_line_errors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "with one_line_errors(): tokenize(CorpusConfig(text=(sys.argv[1],), out=sys.argv[2], tokenizer=sys.argv[3]))"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, text, str(tmp_path / "cache"), gpt2],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"error: no space left for the token stream in the temporary folder {temporary}: free some room, or set "
        f"TMPDIR to a folder with 5 bytes per token\n"
    )
    assert not (tmp_path / "cache").exists()
    assert list(temporary.iterdir()) == []
