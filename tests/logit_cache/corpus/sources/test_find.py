"""Which files a path, a folder or a pattern stands for: all that is meant, nothing else, and what the log says."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest

from logit_cache.corpus.sources.find import find_sources
from storage.errors import InputError


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def found(*text: str | Path) -> tuple[list[str], list[str]]:
    """The names of the files, and the log."""
    lines: list[str] = []
    return [source.name for source in find_sources(map(str, text), lines.append)], lines


def refused(*text: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        find_sources(map(str, text))
    return str(caught.value)


def test_folders_and_patterns_are_sorted_and_repeats_are_said(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "z.txt", "a.txt", "sub/m.py", ".secret", "sub/.hidden/x.txt", "b[1].txt")
    (tmp_path / "again").symlink_to(folder / "a.txt")
    names, lines = found(f"{folder}/*.txt", folder, f"{folder}/**/*.py", f"{folder}/b[1].txt", tmp_path / "again")
    patterned = ["a.txt", "b[1].txt", "z.txt"]
    assert names == [*patterned, "a.txt", "b[1].txt", "m.py", "z.txt", "m.py", "b[1].txt", "again"]
    assert lines == [
        f"{folder}/*.txt: 3 text files, from {folder}/a.txt to {folder}/z.txt",
        f"{folder}: 4 text files, from {folder}/a.txt to {folder}/z.txt; left out: .secret, sub/.hidden",
        f"{folder}/**/*.py: 1 text file, {folder}/sub/m.py",
        f"{folder}/a.txt is read 3 times, as it is named",
        f"{folder}/b[1].txt is read 3 times, as it is named",
        f"{folder}/z.txt is read 2 times, as it is named",
        f"{folder}/sub/m.py is read 2 times, as it is named",
    ]


def test_an_equals_sign_in_a_path_that_is_there_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "math=a.txt", "a.txt", "lang=en/b.txt", "deep/lang=en/c.txt")
    monkeypatch.chdir(tmp_path)
    given = ("math=a.txt", "lang=en", "lang=*/b.txt", f"{tmp_path}/deep/lang=en/c.txt", "x=math=a.txt", "math=./a.txt")
    sources = find_sources(given)
    assert [(source.name, source.named) for source in sources] == [
        ("math=a.txt", False), ("b.txt", False), ("b.txt", False), ("c.txt", False), ("x", True), ("math", True)
    ]  # fmt: skip
    [hub] = find_sources(["web=hub:org/set"])
    assert (hub.name, hub.location, hub.kind) == ("web", "hub:org/set", "hub")


BESIDE = ("README.md", "LICENSE", ".gitattributes", "dataset_infos.json", "_SUCCESS", ".cache/x.parquet", "a.crc",
          "data/licence.txt", "cache-0123456789abcdef.arrow")  # fmt: skip


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "jsonl.zst", "csv", "tsv.gz", "arrow"])
def test_what_lies_beside_a_data_set_is_left_out(tmp_path: Path, ending: str) -> None:
    folder = make(tmp_path / "set", *BESIDE, f"data/b.{ending}", f"data/authors.{ending}")
    expected = [f"authors.{ending}", f"b.{ending}"]
    names, [line] = found(folder)
    assert names == expected
    assert line.endswith("; left out: .cache, .gitattributes, LICENSE, README.md, _SUCCESS and 4 more")
    names, [line] = found(f"{folder}/**/*")
    assert names == expected
    assert "left out: LICENSE, README.md" in line
    # What is named is read.
    assert found(folder / "README.md", folder / "dataset_infos.json") == (["README.md", "dataset_infos.json"], [])


def test_a_readme_among_texts_is_one_of_them(tmp_path: Path) -> None:
    folder = make(tmp_path / "docs", "README.md", "LICENSE", "guide.md", "guide.md.sha256", "dataset_info.json")
    names, [line] = found(folder)
    assert names == ["LICENSE", "README.md", "guide.md"]
    assert line.endswith("; left out: dataset_info.json, guide.md.sha256")
    assert found(make(tmp_path / "lone", "README.md"))[0] == ["README.md"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.parquet", "a.jsonl"), "files of several formats, JSON lines (a.jsonl) and Parquet (a.parquet)"),
        (("x/a.csv", "a.txt"), "files of several formats, text (a.txt) and CSV (x/a.csv)"),
        (("a.parquet", "b.parquet.incomplete"), "Parquet (a.parquet) and text (b.parquet.incomplete)"),
        (("a.txt", "a.txt.gz"), "a.txt is there twice, also as a.txt.gz"),
        (("train.jsonl", "test.jsonl"), "files of several splits, test and train"),
        (
            ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
            "splits, train and validation",
        ),
        (("en/dev/a.json.gz", "en/training/a.json.gz"), "files of several splits, train and validation"),
    ],
)
def test_what_cannot_be_meant_together_is_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    folder = make(tmp_path / "mixed", *names)
    for text in (folder, f"{folder}/**/*"):
        assert message in refused(text)
    assert len(found(*(folder / name for name in names))[0]) == len(names)
    assert found(f"{folder}/{names[0]}")[0] == [Path(names[0]).name]


def test_words_of_splits_that_are_none(tmp_path: Path) -> None:
    assert len(found(make(tmp_path / "train", "latest.jsonl", "test-cases.jsonl", "protest.jsonl"))[0]) == 3
    assert len(found(make(tmp_path / "code", "train.py", "test.py"))[0]) == 2


def test_missing_shards_of_a_folder_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "c4.00000-of-00003.json.gz", "c4.00002-of-00003.json.gz")
    assert f"{folder}: 2 of the 3 files c4.?????-of-00003.json.gz are there" in refused(folder)
    assert len(found(f"{folder}/*.gz")[0]) == 2
    make(folder, "c4.00001-of-00003.json.gz")
    assert len(found(folder)[0]) == 3


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    rows.save_to_disk(str(tmp_path / "one"), num_shards=2)
    names, [line] = found(make(tmp_path / "one", "cache-0123456789abcdef.arrow"))
    assert names == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert line.endswith("; left out: cache-0123456789abcdef.arrow, dataset_info.json, state.json")
    (tmp_path / "one" / names[1]).unlink()
    assert "1 of the 2 files data-?????-of-00002.arrow are there" in refused(tmp_path / "one")
    datasets.DatasetDict({"good": rows, "bad": rows}).save_to_disk(str(tmp_path / "dict"))
    assert "files of several splits, bad and good" in refused(tmp_path / "dict")
    assert found(tmp_path / "dict" / "good")[0] == ["data-00000-of-00001.arrow"]
    datasets.DatasetDict({"only": rows}).save_to_disk(str(tmp_path / "single"))
    assert found(tmp_path / "single")[0] == ["data-00000-of-00001.arrow"]


def test_links(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "a.txt", "sub/b.txt")
    make(tmp_path / "elsewhere", "c.txt")
    make(folder / ".store", "d.txt")
    for name, target in (("linked", tmp_path / "elsewhere"), ("more", tmp_path / "elsewhere"), ("from", folder / "sub"),
                         ("sub/up", folder), ("shown", folder / ".store")):  # fmt: skip
        (folder / name).symlink_to(target)
    lines: list[str] = []
    read = [
        Path(source.location).relative_to(folder).as_posix() for source in find_sources([str(folder)], lines.append)
    ]
    assert read == ["a.txt", "linked/c.txt", "shown/d.txt", "sub/b.txt"]
    again = " (a link to a folder that is read already)"
    assert lines[0].endswith(f"left out: .store, from/{again}, more/{again}, sub/up/{again}")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert "gone.txt: is a link to a file that is not there" in refused(folder)
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: is neither a file nor a folder" in refused(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["a.txt", "a.parquet", "a.jsonl.gz"])
def test_a_file_that_git_lfs_has_not_fetched_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert f"{name}: a pointer of Git LFS is there, and not the file" in refused(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "a.txt", "sub/b.txt")
    (folder / "sub").chmod(0)
    assert "sub: cannot be read (Permission denied)" in refused(folder)
    (folder / "sub").chmod(0o700)


def test_text_that_is_not_there_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "in" / "sub", "a.txt")
    (tmp_path / "empty").mkdir()
    assert "none.txt: no such file" in refused(tmp_path / "none.txt")
    assert "*.txt: the pattern matches no file here" in refused(f"{tmp_path}/*.txt")
    assert f"the pattern matches no file but the folder {tmp_path}/in/sub: give that" in refused(f"{tmp_path}/in/*")
    assert "holds no files" in refused(tmp_path / "empty")
    assert "copy it here first" in refused("s3://bucket/text.txt")
    assert "expected hub:NAME" in refused("hub:a/b/c")


def test_folders_that_a_pattern_matches_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "a.txt", "sub/b.txt")
    assert found(f"{folder}/*") == (["a.txt"], [f"{folder}/*: 1 text file, {folder}/a.txt; left out: {folder}/sub/"])
