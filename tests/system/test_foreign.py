"""Caches made to do harm: `logit-cache pull` refuses each, names what is wrong, and stays small.

Every one is a sound cache with one thing changed, and whatever its maker could make fit is made to fit: digests of
records, receipts and indexes are computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from support.caches.copies import pull
from support.caches.known import contents
from support.caches.small import make_corpus, make_entry, random_stream, write_entry
from support.commands import command, environment
from support.servers.web import running, serving

from storage.errors import LogitCacheError
from storage.format.layout import teacher_arrays
from storage.format.manifest.entry import TeacherEntry
from storage.format.manifest.shared import ATTRIBUTE
from storage.format.sealing import canonical_json
from storage.format.shard import object_digest

V, N, K = 101, 16_384, 12
SHARD, CHUNK = 8_192, 4_096
MOST_MEMORY = 200 << 20
ENTRY = "teachers/a"
VICTIM = f"{ENTRY}/token_ids/c/1/0"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "cache"
    tokens, targets = random_stream(V, N, K)
    record = make_corpus(str(path), tokens, V)
    write_entry(path, "a", make_entry(record, K, shard_tokens=SHARD, chunk_tokens=CHUNK), targets)
    return path


@dataclass(frozen=True)
class Peak:
    """A finished process and the most memory that it had, in bytes."""

    status: int
    errors: list[str]
    stderr: str
    memory: int


# Of a process, Linux counts what its parent had at the fork: a small parent, in between, tells the true peak.
MEASURE = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def run_measured(arguments: list[str], env: dict[str, str]) -> Peak:
    done = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, *arguments], env=env, capture_output=True, text=True, check=True
    )
    status, kibibytes = map(int, done.stdout.split())
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return Peak(status, errors, done.stderr, kibibytes << 10)


@pytest.fixture(scope="module")
def imports() -> int:
    """Memory of the interpreter with everything imported that a pull imports."""
    code = (
        "import storage.transfer.copy, logit_cache.sharing.push_pull, logit_cache.cli.main, logit_cache.sharing.signing"
    )
    found = run_measured([sys.executable, "-c", code], environment())
    assert found.status == 0, found.stderr
    assert run_measured([sys.executable, "-c", "bytearray(256 << 20)"], environment()).memory > 256 << 20
    return found.memory


@dataclass(frozen=True)
class Place:
    """Where a test pulls: `source`, `target`, and everything else that must not change; `imports`: see the fixture."""

    top: Path
    source: Path
    target: Path
    imports: int

    def environment(self) -> dict[str, str]:
        return {**environment(), "HOME": str(self.top / "home"), "TMPDIR": str(self.top / "temporary")}

    def rest(self) -> dict[str, bytes | str]:
        """All files but the source's and the staging folder's."""
        found: dict[str, bytes | str] = {}
        for parent, folders, names in os.walk(self.top):
            folders[:] = [name for name in folders if Path(parent, name) not in (self.source, self.staging)]
            for name in (*folders, *names):
                path = Path(parent, name)
                found[str(path)] = path.read_bytes() if path.is_file() else "folder"
        return found

    @property
    def staging(self) -> Path:
        return self.target.with_name(self.target.name + ".incoming")


@pytest.fixture
def place(made: Path, imports: int, tmp_path: Path) -> Place:
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    (tmp_path / "secret.txt").write_text("not for others")
    return Place(tmp_path, Path(shutil.copytree(made, tmp_path / "source")), tmp_path / "here" / "target", imports)


def refused_quietly(place: Place, *words: str, source: str | None = None, options: Any = ()) -> None:
    """The installed command ends in one line that has the words; it took little memory and left no trace."""
    (place.top / "here").mkdir()
    before = place.rest()
    arguments = command("logit-cache", "pull", source or place.source, place.target, *options)
    done = run_measured(arguments, place.environment())
    assert done.status == 2, done.stderr
    assert len(done.errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.errors[0]) < 2000
    for word in words:
        assert word in done.errors[0], done.errors[0]
    assert done.memory - place.imports < MOST_MEMORY, f"{done.memory - place.imports >> 20} MiB"
    assert place.rest() == before


def refused_here(place: Place, *words: str, teachers: Any = ()) -> None:
    """The same in this process, for the many that need no measuring."""
    (place.top / "here").mkdir()
    before = place.rest()
    with pytest.raises(LogitCacheError) as caught:
        pull(str(place.source), str(place.target), teachers=teachers)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert place.rest() == before


# --- making them -----------------------------------------------------------------------------------------------------


def sealed(body: dict[str, Any]) -> dict[str, Any]:
    body = {key: value for key, value in body.items() if key != "sha256"}
    return {**body, "sha256": hashlib.sha256(canonical_json(body)).hexdigest()}


def change_record(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a group's record and give it the digest that fits."""
    data = json.loads(path.read_text())
    change(data["attributes"][ATTRIBUTE])
    data["attributes"][ATTRIBUTE] = sealed(data["attributes"][ATTRIBUTE])
    path.write_text(json.dumps(data))


def change_receipt(source: Path, group: str, shard: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a receipt, and the digests in it and in the index."""
    path = source / group / f"{shard:08d}.json"
    receipt = json.loads(path.read_text())
    change(receipt)
    receipt = sealed(receipt)
    path.write_text(json.dumps(receipt))
    index = json.loads((source / group / "index.json").read_text())
    index["receipts"][shard] = receipt["sha256"]
    (source / group / "index.json").write_text(json.dumps(sealed(index)))


def put_object(source: Path, data: bytes) -> None:
    """Replace one shard object, with a receipt that fits it in every digest."""
    entry = TeacherEntry.model_validate(
        {k: v for k, v in json.loads((source / ENTRY / "zarr.json").read_text())["attributes"][ATTRIBUTE].items()
         if k != "sha256"}
    )  # fmt: skip
    digest = object_digest(teacher_arrays(entry)["token_ids"], data).model_dump()
    (source / VICTIM).write_bytes(data)
    change_receipt(source, f"{ENTRY}/receipts", 1, lambda receipt: receipt["objects"].update(token_ids=digest))


def bomb(decoded: int) -> bytes:
    """A shard object of two chunks, the first of which decodes to `decoded` zeros."""
    from numcodecs import blosc

    def chunk(values: np.ndarray) -> bytes:
        data = blosc.compress(values, b"zstd", 3, blosc.NOSHUFFLE, 1 << 28)
        return bytes(data) + struct.pack("<I", google_crc32c.value(bytes(data)))

    chunks = [chunk(np.zeros(decoded, dtype=np.uint8)), chunk(np.zeros(CHUNK * K, dtype=np.uint16))]
    index = struct.pack("<4Q", 0, len(chunks[0]), len(chunks[0]), len(chunks[1]))
    return b"".join([*chunks, index, struct.pack("<I", google_crc32c.value(index))])


def sparse(path: Path, size: int = 5 << 30) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


# --- the attacks -----------------------------------------------------------------------------------------------------


def test_a_sound_cache_is_pulled_and_takes_little_memory(place: Place) -> None:
    done = run_measured(command("logit-cache", "pull", place.source, place.target), place.environment())
    assert done.status == 0, done.stderr
    assert done.memory - place.imports < MOST_MEMORY


@pytest.mark.parametrize("name", ["../../secret.txt", "/etc/hostname", "sub/file.json", "..", ""])
def test_a_tokenizer_file_outside_the_cache(place: Place, name: str) -> None:
    path = place.source / "receipts/tokenizer.json"
    receipt = json.loads(path.read_text())
    data = b"not for others"
    receipt["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(sealed(receipt)))
    refusal = refused_quietly if name == "../../secret.txt" else refused_here
    refusal(place, "cannot be a tokenizer file", repr(name))


@pytest.mark.parametrize(
    "key",
    [VICTIM, f"{ENTRY}/token_ids", ENTRY, "teachers", "zarr.json", "tokenizer/tokenizer.json", "tokens/zarr.json"],
)
def test_a_symbolic_link(place: Place, key: str) -> None:
    """Also one to the very bytes that belong there: they could be others by the next look."""
    elsewhere = place.top / "elsewhere"
    (place.source / key).rename(elsewhere)
    (place.source / key).symlink_to(elsewhere)
    refusal = refused_quietly if key == VICTIM else refused_here
    refusal(place, "symbolic link", key)


@pytest.mark.parametrize("key", ["zarr.json", VICTIM, f"{ENTRY}/receipts/index.json"])
def test_a_pipe_is_not_waited_for(place: Place, key: str) -> None:
    (place.source / key).unlink()
    os.mkfifo(place.source / key)
    refused_here(place, key)


@pytest.mark.parametrize(
    ("field", "value"),
    [("positions", 10**15), ("positions", 2**48), ("positions", 2**80), ("positions", 1e300), ("documents", 10**15)],
)
def test_a_shape_that_nothing_has(place: Place, field: str, value: int) -> None:
    change_record(place.source / "zarr.json", lambda record: record["corpus"].update({field: value}))
    refusal = refused_quietly if (field, value) == ("positions", 10**15) else refused_here
    refusal(place, "zarr.json", str(value))


@pytest.mark.parametrize(
    "change",
    [
        {"positions": 10**15},
        {"positions": 2**47, "layout": {"shard": 1, "chunk": 1, "compression": "zstd"}},
        {"layout": {"shard": 1 << 23, "chunk": 1, "compression": "zstd"}},
        {"layout": {"shard": 1 << 40, "chunk": 1 << 40, "compression": "zstd"}},
        {"layout": {"shard": SHARD, "chunk": CHUNK, "compression": "zlib"}},
        {"targets": {"k": 65_535}},
        {"vocabulary_size": 2**40},
    ],
)
def test_an_entry_with_sizes_that_nothing_has(place: Place, change: dict[str, Any]) -> None:
    change_record(place.source / ENTRY / "zarr.json", lambda record: record.update(change))
    refused_here(place, f"{ENTRY}/")


def test_an_index_of_eight_million_chunks(place: Place) -> None:
    """A shard's index is read whole, before anything can be compared."""
    layout = {"shard": 1 << 23, "chunk": 1, "compression": "zstd"}
    change_record(place.source / "zarr.json", lambda record: record.update(tokens_layout=layout))
    refused_here(place, "zarr.json", "chunks")


def test_a_gibibyte_in_a_chunk(place: Place) -> None:
    data = bomb(1 << 30)
    assert len(data) < 2 * SHARD * K, "short enough to be an object of this array"
    put_object(place.source, data)
    refused_quietly(place, VICTIM, f"announces {1 << 30} bytes")


@pytest.mark.parametrize("key", [".zgroup", ".zattrs", ".zmetadata", f"{ENTRY}/token_ids/.zarray", "tokens/c/.zarray"])
def test_metadata_of_zarr_v2(place: Place, key: str) -> None:
    """A v2 array may name a codec that unpickles: reading it would run what its maker wrote."""
    metadata = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "filters": [{"id": "pickle"}]}
    (place.source / key).write_text(json.dumps(metadata))
    refused_here(place, key, "Zarr v2")


def test_a_v2_array_with_a_pickle_filter(place: Place) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(place.top / "attacked"),)

    folder = place.source / "extra"
    folder.mkdir()
    metadata = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "filters": [{"id": "pickle"}]}
    (folder / ".zarray").write_text(json.dumps(metadata))
    (folder / "0").write_bytes(pickle.dumps(Attack()))
    refused_quietly(place, "extra/.zarray", "Zarr v2")


@pytest.mark.parametrize(
    "key", ["zarr.json", "teachers/zarr.json", f"{ENTRY}/zarr.json", f"{ENTRY}/token_ids/zarr.json"]
)
@pytest.mark.parametrize(
    "change",
    [
        {"zarr_format": 2},
        {"filters": [{"id": "pickle"}]},
        {"consolidated_metadata": {"kind": "inline", "metadata": {}}},
        {"storage_transformers": [{"name": "remote"}]},
        {"codecs": [{"name": "vlen-bytes"}]},
    ],
)
def test_metadata_that_says_more_or_else(place: Place, key: str, change: dict[str, Any]) -> None:
    path = place.source / key
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused_here(place, key)


def test_further_attributes_of_a_record(place: Place) -> None:
    path = place.source / "zarr.json"
    data = json.loads(path.read_text())
    data["attributes"]["url"] = "https://elsewhere.example/data"
    path.write_text(json.dumps(data))
    refused_here(place, "zarr.json")


def test_a_receipt_that_does_not_match(place: Place) -> None:
    def other_digest(receipt: dict[str, Any]) -> None:
        receipt["objects"]["token_ids"]["sha256"] = "0" * 64

    change_receipt(place.source, f"{ENTRY}/receipts", 1, other_digest)
    refused_quietly(place, VICTIM, "sha256")


@pytest.mark.parametrize(
    "change",
    [
        {"shard": 0},
        {"stop": 999},
        {"record_sha256": "1" * 64},
        {"objects": {"token_ids": {"bytes": 1, "sha256": "0" * 64, "seal_sha256": "0" * 64}}},
        {"kind": "files"},
        {"run": "rm -rf /"},
    ],
)
def test_a_receipt_of_something_else(place: Place, change: dict[str, Any]) -> None:
    change_receipt(place.source, f"{ENTRY}/receipts", 1, lambda receipt: receipt.update(change))
    refused_here(place, f"{ENTRY}/receipts/00000001.json")


def test_a_receipt_that_states_five_gigabytes(place: Place) -> None:
    def larger(receipt: dict[str, Any]) -> None:
        receipt["objects"]["token_ids"]["bytes"] = 100 << 20

    change_receipt(place.source, f"{ENTRY}/receipts", 1, larger)
    sparse(place.source / VICTIM, 100 << 20)
    refused_here(place, f"{ENTRY}/receipts/00000001.json", "token_ids")


@pytest.mark.parametrize(
    "key",
    [
        "zarr.json",
        f"{ENTRY}/receipts/index.json",
        f"{ENTRY}/receipts/00000001.json",
        VICTIM,
        "tokenizer/tokenizer.json",
    ],
)
def test_five_gigabytes_where_little_belongs(place: Place, key: str) -> None:
    sparse(place.source / key)
    refusal = refused_quietly if key.endswith("index.json") or key == VICTIM else refused_here
    refusal(place, key)


def test_an_object_longer_than_its_receipt(place: Place) -> None:
    with (place.source / VICTIM).open("ab") as file:
        file.write(b"\0")
    refused_quietly(place, VICTIM)


JSON_BOMBS = {
    "deep": b"[" * 900_000,
    "deep objects": b'{"a":' * 180_000,
    "wide": b"[" + b"[]," * 340_000 + b"[]]",
    "a long number": b'{"attributes": ' + b"9" * 900_000 + b"}",
    "a number beyond floats": b'{"attributes": {"logit_cache": 1e999}}',
    "a key twice": b'{"zarr_format": 3, "zarr_format": 3}',
    "no number": b'{"attributes": NaN}',
    "half a character": b'{"attributes": {"logit_cache": {"kind": "\\ud800"}}}',
    "no text": b"\xff\xfe\x00",
    "nothing": b"",
    "a list": b"[1, 2]",
}


@pytest.mark.parametrize(
    "key", ["zarr.json", f"{ENTRY}/zarr.json", f"{ENTRY}/receipts/00000001.json", "tokens/zarr.json"]
)
@pytest.mark.parametrize("name", JSON_BOMBS)
def test_json_that_is_none_of_ours(place: Place, name: str, key: str) -> None:
    (place.source / key).write_bytes(JSON_BOMBS[name])
    refusal = refused_quietly if name in ("deep", "wide") and "receipts" in key else refused_here
    refusal(place, key)


@pytest.mark.parametrize(
    "key", ["zarr.json", f"{ENTRY}/zarr.json", f"{ENTRY}/receipts/00000001.json", "tokenizer.json"]
)
def test_a_record_without_its_digest(place: Place, key: str) -> None:
    path = place.source / (f"receipts/{key}" if key == "tokenizer.json" else key)
    data = json.loads(path.read_text())
    del (data["attributes"][ATTRIBUTE] if path.name == "zarr.json" else data)["sha256"]
    path.write_text(json.dumps(data))
    refused_here(place, path.name, "sha256")


def test_tokens_that_the_targets_were_not_made_from(place: Place) -> None:
    """Everything fits but the text: the digest that targets are bound to is computed from the tokens that came."""
    other = place.top / "other"
    tokens = np.random.default_rng(9).integers(0, V, N).astype(np.uint16)
    make_corpus(str(other), tokens, V)
    stated = json.loads((place.source / "zarr.json").read_text())["attributes"][ATTRIBUTE]["corpus"]["stream_sha256"]
    shutil.copytree(place.source / ENTRY, other / ENTRY)
    change_record(other / "zarr.json", lambda record: record["corpus"].update(stream_sha256=stated))
    record = json.loads((other / "zarr.json").read_text())["attributes"][ATTRIBUTE]["sha256"]
    for name in ("tokens", "document_starts"):
        change_receipt(other, f"receipts/{name}", 0, lambda receipt: receipt.update(record_sha256=record))
        path = other / f"receipts/{name}/index.json"
        path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "record_sha256": record})))
    refused_here(replace(place, source=other), "tokens", stated)


@pytest.mark.parametrize("name", ["../a", "a/../../b", "", "A", ".", "a" * 65])
def test_names_of_entries_that_could_be_paths(place: Place, name: str) -> None:
    refused_here(place, "cannot name a teacher entry", teachers=[name])


class Endless(SimpleHTTPRequestHandler):
    """Serves a folder, but for one key whose body never ends."""

    endless: str

    def do_GET(self) -> None:
        if self.path.lstrip("/") != self.endless:
            super().do_GET()
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(5 << 10):
                self.wfile.write(b" " * (1 << 20))

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("key", ["zarr.json", f"{ENTRY}/receipts/index.json", VICTIM])
def test_a_server_that_never_stops_sending(place: Place, key: str) -> None:
    handler = partial(type("Handler", (Endless,), {"endless": key}), directory=str(place.source))
    with running(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as port:
        refused_quietly(place, key, source=f"http://127.0.0.1:{port}", options=["--teacher", "a"])


def test_a_web_server_is_pulled_from_by_the_name_of_an_entry(place: Place) -> None:
    with serving(place.source) as (url, _):
        refused_quietly(place, "--teacher", source=url)
        done = pull(url, str(place.target), teachers=["a"])
    assert (done.teachers, done.missing) == (["a"], {})
    assert contents(place.target) == contents(place.source)
