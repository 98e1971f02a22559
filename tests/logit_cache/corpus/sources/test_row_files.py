"""Files of rows: the values of every format, and errors that name the row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from logit_cache.corpus.documents import Conversation
from logit_cache.corpus.rows import RowReader
from logit_cache.corpus.sources.find import find_sources
from logit_cache.corpus.sources.row_files import read_rows
from storage.errors import InputError

TEXTS = ["first", "", 'zweite "Zeile"\r\n', "e\u0301 😀\n\n, x", "2024-01-01", "NA", "007"]
READER = RowReader("text", "messages")


def rows(*text: Path | str, **options: Any) -> list[tuple[str, dict[str, Any] | str]]:
    """Each row, or its error, by its place; the meter ends at the size of the files."""
    found: list[tuple[str, dict[str, Any] | str]] = []
    for source in find_sources(map(str, text)):
        counts: list[int] = []
        for where, row in read_rows(source, READER, options.get("split", "train"), counts.append):
            try:
                found.append((where, dict(row())))
            except InputError as error:
                found.append((where, str(error).removeprefix(f"{where}: ")))
        assert sum(counts) == source.file_bytes or source.kind == "hub"
    return found


def values(*text: Path | str, **options: Any) -> list[dict[str, Any] | str]:
    return [row for _, row in rows(*text, **options)]


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        rows(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_json(path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    path.write_text("\ufeff" + "\r\n\n".join(lines), encoding="utf-8", newline="")


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([("id", "text", "score"), *((i, text, "0.5") for i, text in enumerate(TEXTS)), ()])


def write_arrow(path: Path) -> None:
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table, max_chunksize=3)


WRITE = {
    "jsonl": write_json,
    "csv": write_csv,
    "tsv": write_csv,
    "parquet": lambda path: pq.write_table(pa.table({"id": range(7), "text": TEXTS}), path, row_group_size=3),
    "arrow": write_arrow,
    "feather": lambda path: feather.write_feather(pa.table({"text": TEXTS}), path),
    "": lambda path: datasets.Dataset.from_dict({"text": TEXTS, "id": [0] * 7}).save_to_disk(str(path), num_shards=2),
}


@pytest.mark.parametrize("ending", WRITE)
def test_values_are_those_of_the_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    WRITE[ending](path)
    assert values(path) == [{"text": text} for text in TEXTS]


def test_rows_are_named_by_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ntext\na\n"two\nlines"\n\nb\n')
    assert [where for where, _ in rows(tmp_path / "a.csv")] == [f"{tmp_path}/a.csv line {n}" for n in (3, 4, 7)]
    pq.write_table(pa.table({"text": ["x"] * 600}), tmp_path / "a.parquet", row_group_size=300)
    assert [where for where, _ in rows(tmp_path / "a.parquet")] == [f"{tmp_path}/a.parquet row {n}" for n in range(600)]


def test_a_document_of_csv_may_be_long(tmp_path: Path) -> None:
    text = "word " * 1_000_000
    (tmp_path / "a.csv").write_text(f"text\n{text}\nshort\n")
    assert values(tmp_path / "a.csv") == [{"text": text}, {"text": "short"}]


def test_structs_of_tables_have_the_forms_of_rows(tmp_path: Path) -> None:
    messages = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "calls": [{"name": "f", "x": None}]}],
        [{"role": "user", "content": "b", "calls": None}, {"role": "assistant", "content": "c"}],
    ]
    table = pa.table({"messages": messages})
    pq.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, tmp_path / "a.feather")
    for name in ("a.parquet", "a.feather"):
        found = [READER.document(0, dict(row), "row", True) for row in values(tmp_path / name) if isinstance(row, dict)]
        assert [row.messages for row in found if isinstance(row, Conversation)] == [
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "calls": [{"name": "f"}]}],
            [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}],
        ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "expected one JSON object per line"),
        (b"[1]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (b'{"text": ' + b"[" * 100_000, "expected one JSON object per line"),
        (b'{"text": "\xe9"}', "byte 10 of it is not valid UTF-8"),
    ],
)
def test_a_wrong_line_of_json_is_an_error_of_its_own(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    first, (where, error), last = rows(tmp_path / "a.jsonl")
    assert first[1] == last[1] == {"text": "fine"}
    assert where.endswith("a.jsonl line 2")
    assert message in str(error)


def test_a_wrong_row_of_csv_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,a\n2,b,c\n3,"d\xff\ne"\n\xff,f\n')
    assert values(tmp_path / "a.csv") == [
        {"text": "a"},
        "expected 2 values, as in the header, found 3; correct the row",
        "'text' is not valid UTF-8; correct or remove the row",
        {"text": "f"},
    ]


def test_a_wrong_row_of_a_table_is_an_error_of_its_own(tmp_path: Path) -> None:
    data = pa.array([b"fine", b"\xff", b"fine"])
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, data.buffers())})
    pq.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, tmp_path / "a.feather")
    for name in ("a.parquet", "a.feather"):
        first, (where, error), last = rows(tmp_path / name)
        assert first[1] == last[1] == {"text": "fine"}
        assert where.endswith("row 1")
        assert "cannot be read ('utf-8' codec can't decode byte 0xff" in str(error)


def test_a_file_that_is_wrong_as_a_whole_is_refused(tmp_path: Path) -> None:
    quoted = refused(tmp_path / "a.csv", b'text\nfine\n"never closed\nand more\n')
    assert "a.csv line 4: not valid CSV (unexpected end of data)" in quoted
    assert "line 1: byte 0 of it is not valid UTF-8 (invalid start byte); it begins like UTF-16 text" in refused(
        tmp_path / "a.csv", "text\nfine\n".encode("utf-16")
    )
    assert "expected a string in 'text'" in refused(tmp_path / "a.csv", b"text;id\nfine;1\n")
    assert "two columns have the same name (text, text)" in refused(tmp_path / "a.csv", b"text,text\na,b\n")
    assert "a.parquet: cannot be read as Parquet" in refused(tmp_path / "a.parquet", b"PAR1 and no more")
    assert "a.arrow: cannot be read as Arrow" in refused(tmp_path / "a.arrow", b"some plain text, and no table")
    assert "a.arrow: cannot be read as Arrow" in refused(tmp_path / "a.arrow", b"")
    pq.write_table(pa.table({"body": ["x"], "output": ["y"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: expected a string in 'text'.*found columns body, output"):
        rows(tmp_path / "b.parquet")


@pytest.mark.parametrize("ending", ["parquet", "arrow", "feather", ""])
def test_a_damaged_table_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    WRITE[ending](path)
    path = path if ending else path / "data-00000-of-00002.arrow"
    data = path.read_bytes()
    for wrong in (data[:-1], data[:-8], data[: len(data) // 2], data[:20]):
        assert "cannot be read as " in refused(path, wrong)


def test_a_damaged_page_of_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 1_000] * 1_000}), path, compression=None, use_dictionary=False)
    data = path.read_bytes()
    assert "a.parquet: cannot be read as Parquet" in refused(path, data[:100] + b"\xff" * 4_900 + data[5_000:])


def test_hub_data_sets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    failure: list[Exception] = []

    def generate() -> Iterator[dict[str, Any]]:
        yield from ({"text": text, "id": 1} for text in TEXTS)
        if failure:
            raise failure[0]

    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        calls.append((path, name, options))
        return datasets.IterableDataset.from_generator(generate)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert values("hub:org/some.name:config-1@v2", split="validation") == [{"text": text, "id": 1} for text in TEXTS]
    assert calls == [("org/some.name", "config-1", {"split": "validation", "revision": "v2", "streaming": True})]
    failure.append(ConnectionError("connection\nreset"))
    with pytest.raises(InputError, match=r"hub:org/o, split 'train': cannot be read after 7 rows \(connection reset\)"):
        rows("hub:org/o")
