"""The loader of tokenizers: tokenizer.json is what is used, the same every time; other kinds are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.models.saved import make_tokenizer, sample_text, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from storage.errors import InputError
from student.models.text_ids import text_prefix, text_suffix
from student.models.tokenizer import open_tokenizer, read_tokenizer
from student.models.tokenizer_file import FILE, PROBES
from student.models.tokenizer_settings import portable_files, stored_files


def saved(folder: Path, kind: str, **settings: Any) -> Path:
    """A tokenizer's folder as people have them: its tokenizer.json, and settings that another wrote."""
    folder.mkdir(exist_ok=True)
    tiny_tokenizer(kind).backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **settings}))
    return folder


def edited(folder: Path, **changes: Any) -> Path:
    """The folder with other members of its tokenizer.json; those of `model` are merged."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= changes.pop("model", {})
    path.write_text(json.dumps(content | changes))
    return folder


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def words(folder: Path, vocabulary: dict[str, int], added: tuple[AddedToken, ...] = (), **settings: Any) -> Path:
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="u"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_tokens(list(added))
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama3", "Qwen2Tokenizer"),
        ("llama3", "GPT2Tokenizer"),
        ("llama2", "LlamaTokenizerFast"),
        ("gpt2", "GemmaTokenizer"),
        ("unigram", "T5Tokenizer"),
        ("seeds", "GPT2TokenizerFast"),
        ("metaspace", "PreTrainedTokenizerFast"),
    ],
)
def test_tokenizer_json_holds_whatever_class_is_named(tmp_path: Path, kind: str, name: str) -> None:
    folder = saved(tmp_path / "folder", kind, tokenizer_class=name)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    said: list[str] = []
    tokenizer = open_tokenizer(str(folder), log=said.append)
    for text in (*PROBES, sample_text(), "a</s>b <s> c"):
        assert ids(tokenizer, text) == file.encode(text, add_special_tokens=False).ids
    assert tokenizer.get_vocab() == file.get_vocab()
    # GPT-2's class agrees with this file but for text that the probes have, and a class of no rules with every file.
    assert len(said) == (name != "PreTrainedTokenizerFast")
    assert all("its tokenizer.json is used" in line and "in place of" in line for line in said)


def test_a_model_s_type_may_name_a_class_against_the_settings(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", "llama3", tokenizer_class="PreTrainedTokenizerFast")
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    said: list[str] = []
    tokenizer = read_tokenizer(folder, "asked", log=said.append)
    assert ids(tokenizer, PROBES[3]) == ids(tiny_tokenizer("llama3"), PROBES[3])
    assert [line for line in said if line.startswith("asked: its tokenizer.json is used; Qwen2Tokenizer of")] == said
    assert len(said) == 1


def test_a_class_gives_its_names_to_tokens_that_the_file_has(tmp_path: Path) -> None:
    vocabulary = {"u": 0, "a": 1, "<|endoftext|>": 2}
    folder = words(tmp_path / "old", vocabulary, tokenizer_class="GPT2Tokenizer", model_max_length=1024)
    tokenizer = read_tokenizer(folder, "old")
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.model_max_length) == (2, 2, 1024)
    assert tokenizer.get_vocab() == vocabulary
    without = words(tmp_path / "new", {"u": 0, "a": 1}, tokenizer_class="GPT2Tokenizer")
    tokenizer = read_tokenizer(without, "new")
    assert (tokenizer.eos_token, len(tokenizer)) == (None, 2)


def listed(*tokens: tuple[int, str], **flags: bool) -> dict[str, Any]:
    every = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **flags}
    return {str(index): {"content": string, **every} for index, string in tokens}


def test_tokens_that_only_the_settings_list_have_the_ids_listed(tmp_path: Path) -> None:
    # One after the file's, one past a gap, one in a hole of the file's ids, and two without a number.
    tokens = listed((6, "<next>"), (9, "<far>"), (4, "<hole>"))
    vocabulary = {"u": 0, "a": 1, "b": 2, "c": 3, "e": 5}
    folder = words(tmp_path / "a", vocabulary, added_tokens_decoder=tokens)
    tokenizer = read_tokenizer(folder, "a")
    assert {string: tokenizer.get_vocab()[string] for string in ("<next>", "<far>", "<hole>")} == {
        "<next>": 6, "<far>": 9, "<hole>": 4,
    }  # fmt: skip
    assert ids(tokenizer, "a<far>b<hole>") == [1, 9, 2, 4]
    hole = words(tmp_path / "c", vocabulary, eos_token="<end>", extra_special_tokens=["<x>"])
    assert read_tokenizer(hole, "c").get_vocab() == {**vocabulary, "<end>": 7, "<x>": 6}
    named = words(tmp_path / "b", {"u": 0, "a": 1}, extra_special_tokens=["<x>"], image_token="<image>")
    assert read_tokenizer(named, "b").get_vocab() == {"u": 0, "a": 1, "<image>": 2, "<x>": 3}


def test_settings_against_the_file(tmp_path: Path) -> None:
    said: list[str] = []
    token = AddedToken("<x>", lstrip=False, normalized=True)
    folder = words(tmp_path / "a", {"u": 0, "a": 1}, (token,), added_tokens_decoder=listed((5, "<x>"), lstrip=True))
    tokenizer = read_tokenizer(folder, "asked", log=said.append)
    assert (tokenizer.added_tokens_decoder[2].lstrip, tokenizer.added_tokens_decoder[2].normalized) == (False, True)
    assert said == ["asked: '<x>' is id 2, as tokenizer.json says; tokenizer_config.json says 5"]
    taken = words(tmp_path / "b", {"u": 0, "a": 1}, added_tokens_decoder=listed((1, "<y>")))
    with pytest.raises(InputError, match=r"^asked: tokenizer_config\.json gives '<y>' the id 1, which is 'a' in"):
        read_tokenizer(taken, "asked")
    gap = edited(saved(tmp_path / "c", "unigram", added_tokens_decoder=listed((450, "<z>"))))
    with pytest.raises(InputError, match=r"gives '<z>' the id 450, and the next one of tokenizer\.json is 400"):
        read_tokenizer(gap, "asked")


def test_dropout_truncation_and_padding_are_off(tmp_path: Path) -> None:
    folder = edited(
        saved(tmp_path / "a", "gpt2"),
        model={"dropout": 0.5},
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<pad>"},
    )  # fmt: skip
    said: list[str] = []
    tokenizer = open_tokenizer(str(folder), log=said.append)
    expected = ids(tiny_tokenizer("gpt2"), PROBES[2])
    assert all(ids(tokenizer, PROBES[2]) == expected for _ in range(20))
    assert said == [f"{folder}: the BPE dropout of its tokenizer.json (dropout 0.5) is switched off"]
    tokenizer.save_pretrained(tmp_path / "b")
    content = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    assert (content["model"]["dropout"], content["truncation"], content["padding"]) == (None, None, None)


@pytest.mark.parametrize(
    ("name", "flags", "file_has", "prefix", "suffix"),
    [
        ("PreTrainedTokenizerFast", {}, True, (1,), ()),
        ("PreTrainedTokenizerFast", {}, False, (), ()),
        # A class that acted on neither: models were trained with the file's.
        ("PreTrainedTokenizerFast", {"add_bos_token": False}, True, (1,), ()),
        ("Qwen2Tokenizer", {"add_bos_token": False}, False, (), ()),
        ("LlamaTokenizerFast", {"add_bos_token": True, "add_eos_token": False}, False, (1,), ()),
        ("LlamaTokenizer", {"add_bos_token": False}, True, (), ()),
        ("GemmaTokenizer", {"add_eos_token": True}, True, (1,), (2,)),
        ("GPTNeoXTokenizer", {"add_bos_token": False}, False, (), ()),
    ],
)
def test_what_is_put_around_a_text(
    tmp_path: Path, name: str, flags: dict[str, bool], file_has: bool, prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> None:
    folder = saved(tmp_path / "a", "llama3", tokenizer_class=name, bos_token="<s>", **flags)
    if file_has:
        file = Tokenizer.from_file(str(folder / "tokenizer.json"))
        file.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        file.save(str(folder / "tokenizer.json"))
    said: list[str] = []
    tokenizer = open_tokenizer(str(folder), log=said.append)
    assert (text_prefix(tokenizer), text_suffix(tokenizer)) == (prefix, suffix)
    differing = (prefix, suffix) != (((1,) if file_has else ()), ())
    assert any("tokenizer.json says otherwise" in line for line in said) == differing
    tokenizer.save_pretrained(tmp_path / "b")
    assert text_prefix(read_tokenizer(tmp_path / "b", "b")) == prefix


def test_the_ends_of_tokenizers_without_a_tokenizer_json() -> None:
    assert text_prefix(tiny_tokenizer("bytes")) == ()
    assert text_suffix(tiny_tokenizer("bytes")) == (1,)


def test_vocabulary_and_merges_need_each_other_and_a_class(tmp_path: Path) -> None:
    model = json.loads(make_tokenizer("gpt2").backend_tokenizer.to_str())["model"]
    vocabulary, merges = json.dumps(model["vocab"]), "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match=r"asked: expected merges\.txt beside vocab\.json, found none"):
        read_tokenizer(tmp_path, "asked")
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    assert ids(read_tokenizer(tmp_path, "asked"), PROBES[2]) == ids(tiny_tokenizer("gpt2"), PROBES[2])
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"does not say how text is cut into words: copy the model's config\.json"):
        read_tokenizer(tmp_path, "asked")


def test_settings_without_a_vocabulary_are_named(tmp_path: Path) -> None:
    """With the files that the class would read, where it has any."""
    for name, files in (
        ({}, "tokenizer.json or tokenizer.model or vocab.json or vocab.txt"),
        ({"tokenizer_class": "LlamaTokenizerFast"}, "tokenizer.model or tokenizer.json"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(name))
        with pytest.raises(InputError) as caught:
            read_tokenizer(tmp_path, "asked")
        expected = f"asked: expected the tokenizer's vocabulary ({files}), found tokenizer_config.json alone"
        assert str(caught.value) == f"{expected}: copy it there"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert read_tokenizer(tmp_path, "asked").encode("a", add_special_tokens=False) == [100]


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        ("tokenizer.model", "IQ== 0\nIg== 1\n", "tokenizer.model is a tiktoken vocabulary"),
        ("qwen.tiktoken", "IQ== 0\nIg== 1\n", "qwen.tiktoken is a tiktoken vocabulary"),
        ("tekken.json", "{}", "tekken.json is a tekken vocabulary"),
        ("readme.txt", "words", "expected tokenizer.json or the like, found readme.txt"),
    ],
)
def test_other_kinds_are_named(tmp_path: Path, file: str, content: str, kind: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError) as caught:
        open_tokenizer(str(tmp_path))
    assert kind in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_for_both_versions_keep_what_the_file_says() -> None:
    settings = {
        "backend": "tokenizers", "is_local": True, "tokenizer_class": "TokenizersBackend", "image_token": "<image>",
        "model_specific_special_tokens": {"image_token": "<image>"}, "extra_special_tokens": ["<x>"],
    }  # fmt: skip
    file = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}, "model": {}}
    files = {"tokenizer.json": json.dumps(file).encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    portable = portable_files(files)
    assert json.loads(portable["tokenizer_config.json"]) == {
        "add_prefix_space": True, "additional_special_tokens": ["<x>"], "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_special_tokens": {"image_token": "<image>"},
    }  # fmt: skip
    assert portable_files(portable) == portable
    # A model's own class, which 4.57 knows, is not put aside; settings that need no change keep their bytes.
    own = files | {"tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}'}
    assert portable_files(own) == own
    assert json.loads(stored_files(own)["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"
    # A class of Python without a tokenizer.json is what it is, and its settings are part of its fingerprint.
    python = json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_special_tokens": ["<x>"]}).encode()
    plain = {"tokenizer_config.json": python}
    assert json.loads(portable_files(plain)["tokenizer_config.json"]) == {
        "tokenizer_class": "ByT5Tokenizer", "additional_special_tokens": ["<x>"],
    }  # fmt: skip
    assert json.loads(stored_files(plain)["tokenizer_config.json"]) == json.loads(python)


def test_code_that_is_not_run_is_not_asked_for_again(tmp_path: Path) -> None:
    said: list[str] = []
    folder = saved(tmp_path / "a", "gpt2", auto_map={"AutoTokenizer": [None, "code.Own"]})
    tokenizer = open_tokenizer(str(folder), log=said.append)
    [line] = said
    assert line == f"{folder}: the code that its tokenizer_config.json names (auto_map) is not run: its {FILE} is used"
    tokenizer.save_pretrained(tmp_path / "b")
    assert "auto_map" not in json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
