"""The records of a cache, read and checked: its own, an entry's, the tokenizer's receipt, the fidelity report."""

from __future__ import annotations

import hashlib
import re

from storage.errors import CacheNotFound, CorruptCache, FormatError
from storage.format.fidelity import FIDELITY_FILE, MAX_FIDELITY_BYTES, FidelityReport
from storage.format.manifest.receipts import FileDigest, FilesReceipt
from storage.format.manifest.shared import ATTRIBUTE, TEACHER_NAME
from storage.format.sealing import AnyRecord, parse_json, unseal
from storage.stores.base import Store, check_key

_TOKENIZER_FILE = re.compile(r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}$")


def read_record(store: Store, key: str, kind: type[AnyRecord]) -> AnyRecord:
    """A group's record, checked against its own digest. Raises CacheNotFound, FormatError and CorruptCache."""
    where = store.where(key)
    try:
        data = store.read_json(key)
    except (FileNotFoundError, NotADirectoryError):
        # Confirmed by another kind of request: a job must not end because one response was wrong.
        if store.size(key) is None:
            raise CacheNotFound(f"{store.url}: no cache there (no {key}); make one with logit-cache tokenize") from None
        data = store.insist(key, "the store reports its length", lambda: store.read_json(key))
    except PermissionError as error:
        raise CacheNotFound(f"{where}: {error.strerror}") from None
    if (
        not isinstance(data, dict)
        or not isinstance(data.get("attributes"), dict)
        or ATTRIBUTE not in data["attributes"]
    ):
        raise FormatError(f"{where}: a Zarr group, but not one of logit-cache (no {ATTRIBUTE!r} attribute)")
    if data.get("zarr_format") != 3 or data.get("node_type") != "group":
        raise FormatError(f"{where}: expected a Zarr v3 group")
    return unseal(kind, data["attributes"][ATTRIBUTE], where)


def check_metadata(store: Store, key: str, implied: bytes) -> None:
    """Raise FormatError for a zarr.json other than the one that the record implies: other Zarr readers trust it.

    Raises MissingObject and CorruptCache, too.
    """
    found = store.insist(key, "this cache's record implies it", lambda: store.read_json(key))
    where = store.where(key)
    if found != parse_json(implied, where):
        raise FormatError(f"{where}: not the metadata that this cache's record implies; it was changed")


def read_tokenizer_receipt(store: Store) -> FilesReceipt:
    """The receipt of the tokenizer's files. Raises FormatError, CorruptCache."""
    key = "receipts/tokenizer.json"
    promise = "every cache has one: its tokenizer cannot be trusted"
    data = store.insist(key, promise, lambda: store.read_json(key))
    return unseal(FilesReceipt, data, store.where(key))


def read_tokenizer_file(store: Store, name: str, expected: FileDigest) -> bytes:
    """One of the tokenizer's files; raises CorruptCache where it is not as the receipt states, MissingObject."""
    key = tokenizer_key(name)

    def request() -> bytes:
        data = store.read(key, expected.bytes)
        found = hashlib.sha256(data).hexdigest()
        if (len(data), found) != (expected.bytes, expected.sha256):
            raise CorruptCache(f"{store.where(key)}: expected sha256 {expected.sha256}, found {found}")
        return data

    return store.insist(key, "its receipt exists", request)


def teacher_folder(name: str) -> str:
    """Key prefix of a teacher entry, `teachers/<name>/`. Raises FormatError for an invalid name."""
    if not re.fullmatch(TEACHER_NAME, name):
        raise FormatError(
            f"{name!r} cannot name a teacher entry: lower-case letters, digits, '_' and '-', at most 64, "
            f"beginning with a letter or digit"
        )
    return f"teachers/{name}/"


def tokenizer_key(name: str) -> str:
    """Key of a tokenizer file. Raises FormatError for a name that could be anything but a plain file."""
    if not _TOKENIZER_FILE.match(name):
        raise FormatError(f"{name!r} cannot be a tokenizer file")
    return check_key(f"tokenizer/{name}", frozenset({name}))


def read_fidelity(store: Store, folder: str, record_sha256: str) -> FidelityReport | None:
    """The report in an entry's folder (with a slash at the end), or None where there is none.

    Raises FormatError for a file that is not a report, CorruptCache for a changed one or that of another entry.
    """
    key = folder + FIDELITY_FILE
    where = store.where(key)
    try:
        data = store.read_json(key, MAX_FIDELITY_BYTES)
    except FileNotFoundError:
        return None
    report = unseal(FidelityReport, data, where)
    if report.record_sha256 != record_sha256:
        raise CorruptCache(
            f"{where}: it is the report of another entry (record {report.record_sha256[:16]}…, this one is "
            f"{record_sha256[:16]}…): logit-cache verify --repair removes it"
        )
    return report
