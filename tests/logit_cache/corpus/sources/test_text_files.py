"""Files of text: every compression, bytes that are no text, and documents cut out of blocks."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from logit_cache.corpus.sources import text_files
from logit_cache.corpus.sources.text_files import cut_at, decoded, read_blocks
from storage.errors import InputError

TEXT = "Grüße, 日本語 😀\r\n".encode() * 30_000


def by_arrow(codec: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return bytes(sink.getvalue().to_pybytes())

    return compress


COMPRESS = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": by_arrow("zstd"), "lz4": by_arrow("lz4"),
}  # fmt: skip


def read(path: Path, data: bytes, lines: bool = False) -> bytes:
    path.write_bytes(data)
    counts: list[int] = []
    read = b"".join(read_blocks(str(path), counts.append, lines))
    assert sum(counts) == len(data)
    return read


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        list(decoded(read_blocks(str(path), int), str(path)))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files(tmp_path: Path, ending: str) -> None:
    compress = COMPRESS[ending]
    for lines in (False, True):
        assert read(tmp_path / f"a.txt.{ending.upper()}", compress(TEXT), lines) == TEXT
    # Programs that compress in parallel write several parts.
    assert read(tmp_path / f"a.txt.{ending}", compress(TEXT) + compress(TEXT)) == TEXT * 2


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, ending: str) -> None:
    data = COMPRESS[ending](os.urandom(200_000).hex().encode())
    flipped = data[:50_000] + bytes([data[50_000] ^ 255]) + data[50_001:]
    wrongs = [data[: len(data) // 2], data[:-1], data[:3], b"", b"plain text", data + b"more"]
    # These two carry a checksum where whoever writes them asks for it.
    wrongs += [flipped] if ending not in ("zst", "lz4") else []
    for wrong in wrongs:
        assert refused(tmp_path / f"a.txt.{ending}", wrong).startswith("cannot be decompressed as ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "a.txt.gz"):
        (tmp_path / name).write_bytes(b"")
        (tmp_path / name).chmod(0)
        with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
            list(read_blocks(str(tmp_path / name), int))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("0123456é89012345\xff6".encode("latin-1"), "byte 7 is not valid UTF-8"),
        ("012345678é".encode() + b"01234\xc3(", "byte 16 is not valid UTF-8"),
        (b"0123456789cut \xe6\x97", "byte 14 is not valid UTF-8 (unexpected end"),
        (b"0123456789\x7fELF\0", "byte 14 is 0, so this is no UTF-8 text file; convert it to UTF-8"),
        ("text".encode("utf-16"), "byte 0 is not valid UTF-8 (invalid start byte); it begins like UTF-16 text"),
        (gzip.compress(b"text", mtime=0), "it begins like a gzip file, whose name ends in .gz"),
        (by_arrow("zstd")(b"text"), "it begins like a Zstandard file, whose name ends in .zst"),
        (b"PAR1\x15\x04\x15\x80", "it begins like a Parquet file, whose name ends in .parquet"),
    ],
)
def test_what_is_no_utf8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 10)
    assert message in refused(tmp_path / "a.txt", data)


@pytest.mark.parametrize("block", [1, 2, 100])
def test_a_byte_order_mark_is_left_out_once(block: int) -> None:
    data = b"\xef\xbb\xbfmarked \xef\xbb\xbf once"
    blocks = (data[at : at + block] for at in range(0, len(data), block))
    assert "".join(decoded(blocks, "a.txt")) == "marked \ufeff once"


@pytest.mark.parametrize("separator", ["\n\n", "<|end|>", "aba", "\r\n--\n", "\n"])
def test_separation_is_that_of_split_for_any_block(separator: str) -> None:
    text = "xaababa<|end|<|end|>\n\n\ny\n--\n--\n\n\r\n\r\n\r\nabababaz\r\n--\r\n<|end|>" * 3 + "\r\n"
    # Where a line feed may have a carriage return before it, split's own answer needs the text without them.
    plain = text if "\n" not in separator else text.replace("\r\n", "\n")
    expected = plain.split(separator.replace("\r\n", "\n"))
    for block in (1, 2, 3, 7, 50, 10_000):
        found = [""]
        for part, ends in cut_at(separator, (text[i : i + block] for i in range(0, len(text), block))):
            found[-1] += part
            if ends:
                found.append("")
        assert found.pop() == ""
        assert [part if "\n" not in separator else part.replace("\r\n", "\n") for part in found] == expected
