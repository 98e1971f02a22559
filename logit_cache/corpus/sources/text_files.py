"""Files of text: decompressed by the ending of their name, decoded, and cut into documents.

Text is kept as it is, carriage returns included; only a byte-order mark at the start of a file is left out. Nothing is
held whole.
"""

from __future__ import annotations

import codecs
import functools
import io
import itertools
import lzma
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from storage.errors import InputError
from storage.progress import Advance

BLOCK_BYTES = 1 << 20
_ADVANCE_BYTES = 1 << 12  # lines are shorter, and a progress bar is slow
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".lz4": "lz4"}
# How files of other formats begin, which are often met under the name of a text.
_OTHERS = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x1f\x8b": "a gzip file, whose name ends in .gz",
    b"BZh": "a bzip2 file, whose name ends in .bz2",
    b"\xfd7zXZ": "an xz file, whose name ends in .xz",
    b"\x28\xb5\x2f\xfd": "a Zstandard file, whose name ends in .zst",
    b"\x04\x22\x4d\x18": "an LZ4 file, whose name ends in .lz4",
    b"PAR1": "a Parquet file, whose name ends in .parquet",
    b"ARROW1": "an Arrow file, whose name ends in .arrow",
    b"PK\x03\x04": "a zip archive, which has to be unpacked first",
    b"%PDF": "a PDF, whose text has to be extracted first",
}


def read_blocks(where: str, advance: Advance, lines: bool = False) -> Iterator[bytes]:
    """The bytes of a file, decompressed, in blocks of `BLOCK_BYTES` or in lines with their line feeds.

    `advance` receives the bytes read from the disk. Raises InputError naming the file if it cannot be read or
    decompressed.
    """
    codec = COMPRESSIONS.get(Path(where).suffix.lower())
    counted = 0
    try:
        with open(where, "rb") as file, _decompressed(file, codec) as stream:
            read = stream.readline if lines else functools.partial(stream.read, BLOCK_BYTES)
            while True:
                block = read()
                position = file.tell()
                if position - counted >= _ADVANCE_BYTES or not block:
                    advance(position - counted)
                    counted = position
                if codec is not None and not position:
                    raise EOFError("the file is empty")
                if not block:
                    return
                yield block
    except (EOFError, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{where}: cannot be read ({reason}); check its permissions and its disk") from None
        raise InputError(
            f"{where}: cannot be decompressed as {codec} ({error}); it is damaged, cut short, or of another format"
        ) from None


def _decompressed(file: BinaryIO, codec: str | None) -> BinaryIO:
    if codec is None:
        return file
    if codec == "xz":  # which pyarrow does not have
        return cast(BinaryIO, lzma.open(file))
    import pyarrow

    return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(file, codec), 1 << 16))


def decoded(blocks: Iterable[bytes], where: str) -> Iterator[str]:
    """The text of a UTF-8 file that is read in blocks, without a byte-order mark at its start.

    Raises InputError that names `where` and the byte that is wrong, counted from the start of the file.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, started, head = 0, False, b""
    for block in itertools.chain(blocks, (b"",)):
        head = head or block[:8]
        carried = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = offset - carried + error.start
            raise not_utf8(where, f"byte {at} is not valid UTF-8 ({error.reason})", head) from None
        if b"\0" in block:
            raise not_utf8(where, f"byte {offset + block.index(0)} is 0, so this is no UTF-8 text file", head)
        yield text if started else text.removeprefix("\ufeff")
        started = started or bool(text)
        offset += len(block)


def not_utf8(where: str, found: str, head: bytes) -> InputError:
    """The error about bytes that are no text, with what to do about a file that begins with `head`."""
    other = next((name for start, name in _OTHERS.items() if head.startswith(start)), None)
    remedy = "convert it to UTF-8, or leave it out" if other is None else f"it begins like {other}"
    return InputError(f"{where}: {found}; {remedy}")


def cut_at(separator: str, blocks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """`"".join(blocks).split(separator)` as a stream of (text, ends), whatever the blocks.

    A line feed of the separator also matches one with a carriage return before it.
    """
    lines = separator.replace("\r\n", "\n").split("\n")
    pattern = re.compile("\r?\n".join(re.escape(line) for line in lines))
    longest = len(separator) + len(lines) - 1
    buffer = ""
    for block in blocks:
        buffer += block
        # A match that starts after this point may become longer, or start earlier, with the next block.
        limit = len(buffer) - longest
        position = 0
        for match in pattern.finditer(buffer):
            if match.start() > limit:
                break
            yield buffer[position : match.start()], True
            position = match.end()
        if limit > position:
            yield buffer[position:limit], False
        buffer = buffer[max(position, limit, 0) :]
    for text in (parts := pattern.split(buffer))[:-1]:
        yield text, True
    yield parts[-1], True
