"""Job files: YAML scalars as people mean them, and errors that name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from logit_cache.caching.job import CacheJob
from logit_cache.caching.recompress import RecompressJob
from logit_cache.corpus.cleaning import CleaningJob
from logit_cache.corpus.tokenize import CorpusConfig
from logit_cache.engines.options import EngineOptions
from logit_cache.recipes.commands import RecipeJob
from storage.config import Settings, build_config, parse_yaml, read_yaml
from storage.errors import InputError
from student.evaluation.job import EvaluationJob
from student.job import StudentJob
from student.sweep.search_space import Choices


class Job(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shard_tokens: int = 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E3", 1000.0),
        ("-0.5", -0.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("12", 12),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("1e", "1e"),
        ("v1.5", "v1.5"),
        ("[1, 2e0]", [1, 2.0]),
        ("1:30:00", "1:30:00"),
        ("012", 12),
        ("-1_000", -1000),
        ("0o14", 12),
        ("0x1F", 31),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


def test_flags_override_the_file_and_dashes_are_underscores(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: a\nshard-tokens: 7\n")
    assert build_config(Job, str(path), {"name": None, "shard_tokens": None}, "test") == Job(name="a", shard_tokens=7)
    assert build_config(Job, str(path), {"name": "b", "shard_tokens": 9}, "test") == Job(name="b", shard_tokens=9)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- a\n", ["mapping", "list"]),
        ("name: [\n", ["not valid YAML"]),
        ("name: a\nshard_token: 3\n", ["shard_token", "did you mean 'shard_tokens'"]),
        ("shard_tokens: x\nname: a\n", ["--shard-tokens", "'x'"]),
        ("shard_tokens: 1\n", ["--name is missing"]),
        ("name: !!python/object/apply:os.getcwd []\n", ["not valid YAML"]),
        ("name: a\nshard_tokens: 1\nname: b\n", ["job.yaml", "'name' is given twice", "lines 1 and 3"]),
        ("shard_tokens: 1\nname: a\nshard-tokens: 2\n", ["'shard-tokens' is given twice", "lines 1 and 3"]),
        ("name: a\nother:\n  - {x: 1, y: 2, x: 3}\n", ["'x' is given twice", "lines 3 and 3"]),
        ("name: a\nother:\n  b:\n    1: x\n    1: y\n", ["'1' is given twice", "lines 4 and 5"]),
    ],
)
def test_errors_name_the_field(tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        build_config(Job, str(path), {}, "test")
    for word in words:
        assert word in str(error.value)


def test_keys_that_are_not_the_same(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("base: &b {a-b: 1, a_b: 2}\nlater: {<<: *b, a_b: 3}\nlast: {<<: *b}\n")
    found = read_yaml(str(path))
    assert found["later"] == {"a-b": 1, "a_b": 3}
    assert found["base"] == found["last"] == {"a-b": 1, "a_b": 2}


def test_a_file_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "job.yaml").write_text("name: a\n")
    assert build_config(Job, "~/job.yaml", {}, "test").name == "a"


# Every model of what a person writes, with the fields that it cannot do without.
SETTINGS: dict[type[Settings], dict[str, Any]] = {
    CacheJob: {"cache": "c", "teacher": "t", "name": "n"},
    CleaningJob: {"text": "t", "out": "o"},
    CorpusConfig: {"text": "t", "out": "o", "tokenizer": "k"},
    EngineOptions: {},
    EvaluationJob: {"model": "m"},
    RecipeJob: {"recipe": "r", "scale": "tiny", "text": "t", "eval_text": "e", "out": "o"},
    RecompressJob: {"cache": "c", "name": "n", "to": "m"},
    Choices: {"choices": 3},
    StudentJob: {"cache": "c", "model": "m", "output_dir": "o"},
}
SINGLE = {"weight": 2.0, "seeds": 3, "choices": 3, "fields": "lean"}
LISTS = [
    (kind, name)
    for kind, fields in SETTINGS.items()
    for name, field in kind.model_fields.items()
    if "tuple" in str(field.annotation) and "dict" not in str(field.annotation)
]


@pytest.mark.parametrize(("kind", "name"), LISTS, ids=lambda part: getattr(part, "__name__", part))
def test_a_single_value_is_a_list_of_one(kind: type[Settings], name: str) -> None:
    value: Any = SINGLE.get(name, "x")
    more = {"teacher": ["t", "u"], "combine": "mixture"} if name in ("weight", "revision") else {}
    more |= {"device_map": "auto"} if name == "max_memory" else {}
    more |= {"tokenizer": None, "train_tokenizer": 400} if name == "special_tokens" else {}
    more |= {"combine": None} if name == "live_teachers" else {}
    many = {**SETTINGS[kind], **more, name: [value]}
    if name in ("weight", "revision"):  # one for each of two teachers: read as a list, and found too short
        with pytest.raises(InputError, match="is given 1 times"):
            build_config(kind, many | {name: value}, {}, "test")
        return
    assert getattr(build_config(kind, many | {name: value}, {}, "test"), name) == getattr(kind(**many), name)


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_any_path_is_a_text(kind: type[Settings]) -> None:
    fields = {name: Path(value) if isinstance(value, str) and len(value) == 1 else value
              for name, value in SETTINGS[kind].items()}  # fmt: skip
    assert kind(**fields) == kind(**SETTINGS[kind])


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (CacheJob, {"k": "many"}, "--k: expected a whole number (found 'many')"),
        (CacheJob, {"top_p": "x"}, "--top-p: expected a number (found 'x')"),
        (CacheJob, {"bos_each_window": "x"}, "--bos-each-window: expected true or false (found 'x')"),
        (CacheJob, {"teacher": {"a": 1}}, "--teacher: expected a list (found"),
        (CacheJob, {"teacher": ["a", 3]}, "--teacher, item 2: expected text (in YAML, quotes make"),
        (CacheJob, {"teacher": []}, "--teacher: expected at least 1 item (found '[]')"),
        (CacheJob, {"k": 0}, "--k: expected greater than or equal to 1 (found '0')"),
        (CacheJob, {"targets": "all"}, "--targets: expected 'topk', 'varopt' or 'none' (found 'all')"),
        (CorpusConfig, {"split": 3}, "--split: expected text (in YAML, quotes make"),
        (StudentJob, {"training": [1]}, "--training: expected a mapping of names to values (found '[1]')"),
        (StudentJob, {"teachers": [{"name": "a", "weigth": 1}]}, "there is no field 'teachers.0.weigth'"),
    ],
)
def test_errors_are_in_the_words_of_yaml_and_flags(kind: type[Settings], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        build_config(kind, SETTINGS[kind] | fields, {}, "test")
    assert str(error.value).startswith(f"test: {words}")


def test_a_folder_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert StudentJob(**SETTINGS[StudentJob] | {"output_dir": "~/run"}).output_dir == str(tmp_path / "run")
    assert EngineOptions(slurm_folder="~/logs").slurm_folder == str(tmp_path / "logs")
    with pytest.raises(InputError, match="--output-dir: s3://b/run: a URL, where a path of this machine"):
        build_config(StudentJob, SETTINGS[StudentJob], {"output_dir": "s3://b/run"}, "test")
    with pytest.raises(InputError, match=r"--output-dir: .*no home folder"):
        build_config(StudentJob, SETTINGS[StudentJob], {"output_dir": "~no-such-user-9/run"}, "test")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml"):
        read_yaml(str(tmp_path / "none.yaml"))
