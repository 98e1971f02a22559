"""The tokenizer of a stream is the one that was saved, and what is stored of it is what other programs load."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import ROOT, Run
from support.models.saved import make_tokenizer, sample_text
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer

from logit_cache.corpus import tokenize as corpus
from logit_cache.corpus import tokenizer as stored
from logit_cache.corpus.config import CorpusConfig
from logit_cache.corpus.tokenize import tokenize
from storage import LogitCache
from storage.errors import InputError
from storage.format.identity import tokenizer_fingerprint
from student.models.text_ids import text_prefix
from student.models.tokenizer import open_tokenizer
from student.models.tokenizer_file import PROBES

TEMPLATES = {"default": "{{ messages }}", "rag": "{{ documents }}", "tool_use": "{{ tools }}"}


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(sample_text()[:4_000], encoding="utf-8", newline="")
    return str(path)


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A tokenizer with a regex of its own, under the name of a class that has another."""
    folder = tmp_path / "qwen"
    make_tokenizer("llama3").save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_stored_before(files: dict[str, bytes]) -> dict[str, bytes]:
    """The settings as they were stored before those of transformers 4.57."""
    loading = ("is_local", "local_files_only")
    settings = json.loads(files["tokenizer_config.json"])
    settings = {name: value for name, value in settings.items() if name not in loading}
    data = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    return {**files, "tokenizer_config.json": data}


def test_a_stream_has_the_ids_of_tokenizer_json(run: Run, text: str, qwen: Path, tmp_path: Path) -> None:
    done = run("logit-cache", "tokenize", "--text", text, "--tokenizer", qwen, "--out", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "Qwen2Tokenizer of transformers applies rules" in line]
    cache = LogitCache.open(str(tmp_path / "cache"))
    file = Tokenizer.from_file(str(qwen / "tokenizer.json"))
    assert cache.tokens.read(0, len(cache.tokens)).tolist() == file.encode(sample_text()[:4_000]).ids
    assert cache.vocabulary_size == file.get_vocab_size()


def test_a_stream_that_was_made_with_the_rules_of_a_class_keeps_them(
    text: str, qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CorpusConfig(text=(text,), out=str(tmp_path / "cache"), tokenizer=str(qwen))
    with monkeypatch.context() as before:
        before.setattr(corpus, "open_tokenizer", lambda name, *more: AutoTokenizer.from_pretrained(name))
        before.setattr(stored, "stored_files", as_stored_before)
        record = tokenize(config)
    made = files_in(tmp_path / "cache")
    said: list[str] = []
    # The record that is returned may be of other library versions.
    assert tokenize(config, log=said.append).corpus == record.corpus
    assert files_in(tmp_path / "cache") == made
    assert said == [f"{qwen}: {config.out} was made with the rules of its transformers class, which are kept"]
    fresh = tokenize(config.model_copy(update={"out": str(tmp_path / "other")}))
    assert fresh.corpus.stream_sha256 != record.corpus.stream_sha256


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("options", [{"train_tokenizer": 400}, {"tokenizer": "llama3"}], ids=["trained", "given"])
def test_a_cache_of_earlier_settings_is_finished_by_the_same_command(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool, options: dict[str, Any]
) -> None:
    if "tokenizer" in options:
        make_tokenizer("llama3").save_pretrained(tmp_path / "llama3")
        options = {"tokenizer": str(tmp_path / "llama3")}
    out = tmp_path / "cache"
    config = CorpusConfig(text=(text,), out=str(out), **options)
    with monkeypatch.context() as before:
        before.setattr(stored, "stored_files", as_stored_before)
        record = tokenize(config)
    made = files_in(out)
    assert b"TokenizersBackend" in made["tokenizer/tokenizer_config.json"]
    if interrupted:
        shutil.rmtree(out / "receipts")
        shutil.rmtree(out / "tokens")
    assert tokenize(config).tokenizer == record.tokenizer
    found = files_in(out)
    if not interrupted:
        assert found == made
    cache = LogitCache.open(str(out))
    vocabulary = open_tokenizer(str(out)).get_vocab()
    assert tokenizer_fingerprint(cache.tokenizer_files(), vocabulary) == record.tokenizer.fingerprint
    assert len(cache.tokens.read(0, record.corpus.positions)) == record.corpus.positions


def test_several_chat_templates_are_kept(run: Run, text: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(tmp_path / "several")
    assert (tmp_path / "several" / "additional_chat_templates").is_dir()
    arguments = ("logit-cache", "tokenize", "--text", text, "--tokenizer", tmp_path / "several", "--out")
    assert run(*arguments, tmp_path / "cache").returncode == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "cache" / "tokenizer").chat_template == TEMPLATES
    assert open_tokenizer(str(tmp_path / "cache")).chat_template == TEMPLATES
    tokenizer.chat_template = TEMPLATES["default"]
    _, files = stored.stored_tokenizer(tokenizer)
    assert files["chat_template.jinja"] == TEMPLATES["default"].encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file | {"normalizer": {"type": "Lowercase"}}, "other ids in place of"),
        (
            lambda file: file | {"added_tokens": [{**file["added_tokens"][0], "content": "<lost>"}]},
            "id 600: '<lost>' here",
        ),
        (
            lambda file: file | {"post_processor": {"type": "ByteLevel", "add_prefix_space": True,
                                                    "trim_offsets": True, "use_regex": True}},
            "ids before a text: () in place of (1,)",
        ),
    ],
)  # fmt: skip
def test_what_saving_changes_is_named(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    save = type(tokenizer).save_pretrained

    def lossy(self: Any, folder: str, **options: Any) -> None:
        save(self, folder, **options)
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    monkeypatch.setattr(type(tokenizer), "save_pretrained", lossy)
    with pytest.raises(InputError, match="does not survive saving") as caught:
        stored.stored_tokenizer(tokenizer)
    assert message in str(caught.value)


# --- transformers 4.57 -----------------------------------------------------------------------------------------------

TRANSFORMERS_4 = Path(os.environ.get("TRANSFORMERS_4_DIR", ROOT / "build" / "transformers-4"))
_ASK = """
import json, sys
from transformers import AutoTokenizer, __version__
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.load(sys.stdin)
json.dump({
    "version": __version__.split(".")[0],
    "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
    "with_special": [tokenizer(text)["input_ids"] for text in texts],
    "special_ids": sorted(tokenizer.all_special_ids),
    "named": {name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
    "template": tokenizer.chat_template,
    "size": len(tokenizer),
    "added": {index: [str(token), token.special, token.lstrip, token.rstrip, token.normalized, token.single_word]
              for index, token in tokenizer.added_tokens_decoder.items()},
}, sys.stdout)
"""


def ask(folder: Path, texts: list[str], path: str = "") -> dict[str, Any]:
    """What AutoTokenizer says of a folder in a process of its own; `path` is laid in front of what is installed."""
    done = subprocess.run(
        [sys.executable, "-c", _ASK, str(folder)], input=json.dumps(texts), capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@functools.cache
def rich_tokenizer(kind: str) -> Any:
    """One with all that settings can have: added tokens with flags, a list of special ones, BOS, templates."""
    tokenizer = make_tokenizer(kind)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>", AddedToken("<y>", lstrip=True)]})
    tokenizer.add_tokens([AddedToken("<z>", rstrip=True, normalized=False)])
    tokenizer.chat_template = TEMPLATES if kind == "llama3" else TEMPLATES["default"]
    if kind == "llama3":
        start = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = start
    return tokenizer


@pytest.mark.transformers4
@pytest.mark.skipif(not TRANSFORMERS_4.is_dir(), reason="no transformers 4.57: make test-transformers-4")
@pytest.mark.parametrize("kind", ["seeds", "llama3", "unigram"])
def test_stored_and_published_files_load_in_transformers_4(kind: str, tmp_path: Path) -> None:
    tokenizer, files = stored.stored_tokenizer(rich_tokenizer(kind))
    folder = tmp_path / "stored"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    texts = [*PROBES, "<s>a</s> <x> b <y>c<z> d"]
    found = ask(folder, texts, str(TRANSFORMERS_4))
    assert found.pop("version") == "4"
    expected = ask(folder, texts)
    assert expected.pop("version") == "5"
    assert found == expected
    assert found["ids"] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [each[: len(text_prefix(tokenizer))] for each in found["with_special"]] == [
        list(text_prefix(tokenizer)) for _ in texts
    ]


def test_a_student_of_an_earlier_cache_is_saved_with_portable_settings(
    run: Run, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(stored, "stored_files", as_stored_before)
        tokenize(CorpusConfig(text=(text,), out=str(tmp_path / "old"), train_tokenizer=400))
    done = run(
        "train-student", "--cache", tmp_path / "old", "--model", "llama-tiny", "--set", "max_steps=1",
        "--window-tokens", 16, "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())
    assert (settings["tokenizer_class"], settings["add_prefix_space"]) == ("PreTrainedTokenizerFast", True)
    assert "backend" not in settings
