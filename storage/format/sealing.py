"""Records as JSON that carries its own digest: canonical bytes, sha256, strict parsing, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from storage.errors import CorruptCache, FormatError

MAX_RECORD_BYTES = 1 << 20
# What an error shows of a value in which two records differ.
_MOST_SHOWN = 120
_DIGEST = re.compile(r"\b[0-9a-f]{40,64}\b")


class Record(BaseModel):
    """Base class of all records: frozen, refuses unknown fields, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=False)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def canonical_json(value: Any) -> bytes:
    """The JSON whose bytes are hashed: sorted keys, no white space, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(record: Record) -> str:
    """sha256 of the record's canonical JSON."""
    return hashlib.sha256(canonical_json(record.model_dump(mode="json"))).hexdigest()


def sealed(record: Record) -> dict[str, Any]:
    """The record as JSON data with its own digest under `sha256`."""
    return {**record.model_dump(mode="json"), "sha256": digest(record)}


def sealed_bytes(record: Record) -> bytes:
    """The sealed record as the bytes of a file."""
    return json.dumps(sealed(record), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def unseal(kind: type[AnyRecord], data: Any, where: str) -> AnyRecord:
    """Parse the output of `sealed`; raises `FormatError` for a wrong shape, `CorruptCache` for a wrong digest."""
    if not isinstance(data, dict):
        raise FormatError(f"{where}: expected a JSON object, found {type(data).__name__}")
    body = {key: value for key, value in data.items() if key != "sha256"}
    try:
        record = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the record"
        raise FormatError(
            f"{where}: {field}: {first['msg']} (found {str(first['input'])[:80]!r}); "
            f"this is no record of a format that this logit-cache knows: it was changed, or written by a newer one"
        ) from None
    # The digest is of the stored JSON, not of the record that was parsed from it.
    found = hashlib.sha256(canonical_json(body)).hexdigest()
    if data.get("sha256") != found:
        raise CorruptCache(f"{where}: its sha256 is {found}, the record states {data.get('sha256')}: it was changed")
    return record


def parse_json(data: bytes, where: str, max_bytes: int = MAX_RECORD_BYTES) -> Any:
    """JSON without duplicate keys, NaN or infinity, at most `max_bytes` long; `FormatError` otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            raise ValueError("a key appears twice")
        return dict(pairs)

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    if len(data) > max_bytes:
        raise FormatError(f"{where}: {len(data)} bytes of JSON, at most {max_bytes} are read")
    try:
        return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON ({error})") from None


def differences(
    stored: Record,
    wanted: Record,
    ignore: tuple[str, ...] = ("created_with",),
    names: tuple[str, str] = ("the cache", "this job"),
) -> list[str]:
    """The fields in which two records differ, each as `field: the cache has A, this job has B`.

    Those that people can read come first: digests, of which the first digits are shown, follow from other things.
    """

    def flat(prefix: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for name, item in value.items() for k, v in flat(f"{prefix}{name}.", item).items()}
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            return {k: v for i, item in enumerate(value) for k, v in flat(f"{prefix}{i}.", item).items()}
        return {prefix.rstrip("."): value}

    a = flat("", stored.model_dump(mode="json", exclude=set(ignore)))
    b = flat("", wanted.model_dump(mode="json", exclude=set(ignore)))
    different = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    different.sort(key=lambda name: any(_DIGEST.search(str(found.get(name))) is not None for found in (a, b)))
    return [f"{name}: {names[0]} has {_shown(a.get(name))}, {names[1]} has {_shown(b.get(name))}" for name in different]


def _shown(value: Any) -> str:
    text = _DIGEST.sub(lambda match: f"{match[0][:12]}…", repr(value))
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
