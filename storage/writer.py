"""Writing a cache: encode → publish → receipt, one whole shard at a time.

A shard's objects are published first and its receipt last, so a job killed at any instant leaves either a
committed shard or one that will be done again. A committed object is never replaced. Objects without a
receipt are what a killed worker left: equal bytes are kept, others are replaced.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.arrays import metadata_bytes
from storage.claims import claims_in
from storage.encoding import encode_logprobs, round_mantissa
from storage.errors import CorruptCache, FormatError, IdentityMismatch, InputError, MissingObject
from storage.failures import Failures
from storage.fidelity import FIDELITY_FILE, FidelityReport
from storage.format import PER_POSITION_FLOATS, ArraySpec, corpus_arrays, group_metadata, teacher_arrays
from storage.local import PARTIAL
from storage.location import Location, locate
from storage.manifest import (
    ATTRIBUTE,
    CacheRecord,
    FileDigest,
    FilesReceipt,
    ObjectDigest,
    Record,
    ShardReceipt,
    ShardStatistics,
    TeacherEntry,
    differences,
    digest,
    parse_json,
    sealed,
    sealed_bytes,
)
from storage.reader import read_record, teacher_folder, tokenizer_key
from storage.receipts import Receipts
from storage.records import SparseTargets, head_mass
from storage.rules import broken_rule
from storage.shards import encode_shard, object_digest

_MOST_ENCODERS = 4


class ShardWriter:
    """Commits shards of arrays that are cut alike. Safe to use by several workers on one cache."""

    def __init__(
        self, location: Location, group: str, receipts_folder: str, specs: Mapping[str, ArraySpec], record: Record
    ) -> None:
        self.specs = dict(specs)
        self._location = location
        self._group = group
        # A local disk takes one synced file at a time; elsewhere most of the time is waiting for answers.
        self._at_once = 1 if location.local_path is not None else len(self.specs)
        self.receipts = Receipts(location, receipts_folder, specs, digest(record))

    def prepare(self) -> None:
        """Write the arrays' metadata where it is not there yet."""
        for spec in self.specs.values():
            publish_same(self._location, f"{self._group}{spec.name}/zarr.json", metadata_bytes(spec.metadata()))

    def is_committed(self, shard: int) -> bool:
        """Whether the shard has a receipt and objects of the lengths that it states; CorruptCache if they differ."""
        receipt = self.receipts.read(shard)
        if receipt is None:
            return False
        for name, expected in receipt.objects.items():
            key = self._group + self.specs[name].shard_key(shard)
            try:
                found = f"{self._location.known_size(key, 'its receipt exists')} bytes"
            except MissingObject:
                found = "no object"
            if found != f"{expected.bytes} bytes":
                raise CorruptCache(
                    f"{self._location.where(key)}: its receipt states {expected.bytes} bytes, found {found}; run "
                    f"logit-cache verify --repair {self._location.url} and this command again"
                )
        return True

    def commit(
        self,
        shard: int,
        values: Mapping[str, NDArray[Any]],
        statistics: ShardStatistics | None = None,
        began: float | None = None,
    ) -> ShardReceipt:
        """Write one shard of every array and its receipt; returns the receipt that is there afterwards.

        `began` is the `time.monotonic()` at which work on the shard began, for the receipt's `seconds`.
        """
        encoded = encode_objects(self.specs, shard, values)
        objects = {name: object_digest(self.specs[name], data) for name, data in encoded.items()}
        # From the first object to the receipt, no other writer may replace what looks like a leftover.
        with self._location.exclusive(self.receipts.folder), ThreadPoolExecutor(self._at_once) as pool:
            keys = [self._group + self.specs[name].shard_key(shard) for name in encoded]
            list(pool.map(self._publish_object, keys, repeat(shard), encoded.values()))
            return self._publish_receipt(shard, objects, statistics, began)

    def _publish_receipt(
        self, shard: int, objects: dict[str, ObjectDigest], statistics: ShardStatistics | None, began: float | None
    ) -> ShardReceipt:
        start, stop = next(iter(self.specs.values())).shard_range(shard)
        receipt = ShardReceipt(
            record_sha256=self.receipts.record_sha256,
            shard=shard,
            start=start,
            stop=stop,
            objects=objects,
            statistics=statistics,
            seconds=0.0 if began is None else round(time.monotonic() - began, 3),
            written_at=datetime.now(UTC).isoformat(timespec="seconds"),
            host=socket.gethostname(),
        )
        if not self._location.publish(self.receipts.key(shard), sealed_bytes(receipt)):
            other = self.receipts.read(shard)
            if other is None or other.objects != objects:
                raise CorruptCache(
                    f"{self._location.where(self.receipts.key(shard))}: another worker committed this shard with other "
                    f"bytes; workers of one entry must run the same versions on the same type of device"
                )
            return other
        return receipt

    def _publish_object(self, key: str, shard: int, data: bytes) -> None:
        if self._location.publish(key, data):
            return
        if self._location.insist(key, "it was there just now", lambda: self._location.read(key)) == data:
            return
        if self.receipts.read(shard) is not None:
            raise CorruptCache(
                f"{self._location.where(key)}: already committed with other bytes; workers of one entry must run the "
                f"same versions on the same type of device"
            )
        self._location.replace(key, data)


class EntryWriter:
    """One teacher's entry: its record, its shards, its index; who works at which shard, and which were given up."""

    def __init__(self, location: Location, name: str, entry: TeacherEntry, shards: ShardWriter) -> None:
        self.name = name
        self.entry = entry
        self.claims = claims_in(location, shards.receipts.folder)
        self.failures = Failures(location, shards.receipts.folder)
        self._location = location
        self._shards = shards

    @classmethod
    def open(cls, url: str, name: str, entry: TeacherEntry) -> EntryWriter:
        """Create the entry, or go on with it; IdentityMismatch lists the fields in which a stored one differs."""
        location = locate(url)
        folder = teacher_folder(name)
        key = folder + "zarr.json"
        location.publish(key, metadata_bytes(group_metadata({ATTRIBUTE: sealed(entry)})))
        stored = read_record(location, key, TeacherEntry)
        refuse_other(location, name, stored, entry)
        shards = ShardWriter(location, folder, folder + "receipts", teacher_arrays(stored), stored)
        shards.prepare()
        return cls(location, name, stored, shards)

    @property
    def shards(self) -> int:
        """How many shards the entry has."""
        return self._shards.receipts.shards

    def pending(self) -> list[int]:
        """Shards that are still to be done, in order; every committed one is compared with its receipt."""
        committed = self._shards.receipts.committed()
        return [shard for shard in range(self.shards) if not (committed[shard] and self._shards.is_committed(shard))]

    def is_committed(self, shard: int) -> bool:
        """Whether a shard is there, also when another worker wrote it a moment ago."""
        return self._shards.is_committed(shard)

    def commit(self, shard: int, targets: SparseTargets, began: float | None = None) -> ShardReceipt:
        """Encode and commit one shard. `targets` hold exact log-probs of the shard's positions, in order."""
        broken = broken_rule(targets, self.entry)
        if broken:
            raise FormatError(
                f"{self._location.where(teacher_folder(self.name))}: shard {shard} is not written: {broken}"
            )
        return self._shards.commit(shard, shard_values(self.entry, targets), shard_statistics(targets), began)

    def finish(self) -> None:
        """Write the index of receipts once no shard is missing."""
        if self._shards.receipts.committed().all():
            self._shards.receipts.write_index()

    def publish_fidelity(self, report: FidelityReport) -> bool:
        """Put the fidelity report beside the entry, whole or not at all; False if another worker was first."""
        assert report.record_sha256 == digest(self.entry)
        return self._location.publish(teacher_folder(self.name) + FIDELITY_FILE, sealed_bytes(report))


def refuse_other(location: Location, name: str, stored: TeacherEntry, wanted: TeacherEntry) -> None:
    """Raise IdentityMismatch, with the fields that differ, unless an entry that is there is the one that is wanted."""
    folder = teacher_folder(name)
    differing = differences(stored, wanted)
    if differing:
        raise IdentityMismatch(
            f"{location.where(folder)}",
            differing,
            f"A teacher entry holds one teacher's targets made in one way: give this one another --name, or remove "
            f"{location.where(folder.rstrip('/'))} if nothing in it is worth keeping",
        )


def _encoders() -> int:
    """Threads that encode a shard: compressors and NumPy let go of the interpreter."""
    return min(
        _MOST_ENCODERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def shard_values(entry: TeacherEntry, targets: SparseTargets) -> dict[str, NDArray[Any]]:
    """The arrays of a shard's targets as they are stored, by name."""
    # Chunk by chunk: intermediate values stay small, and several threads take part.
    size = entry.layout.chunk
    chunks = [
        targets.rows(start, min(start + size, targets.stop)) for start in range(targets.start, targets.stop, size)
    ]
    with ThreadPoolExecutor(_encoders()) as pool:
        encoded = list(pool.map(partial(encode_targets, entry), chunks))
    return {name: np.concatenate([chunk[name] for chunk in encoded]) for name in encoded[0]}


def encode_objects(specs: Mapping[str, ArraySpec], shard: int, values: Mapping[str, NDArray[Any]]) -> dict[str, bytes]:
    """The objects of one shard by array."""
    with ThreadPoolExecutor(_encoders()) as pool:
        return {name: encode_shard(spec, shard, values[name], pool.map) for name, spec in specs.items()}


def encode_targets(entry: TeacherEntry, targets: SparseTargets) -> dict[str, NDArray[Any]]:
    """The arrays of a range of targets as they are stored, by name."""
    specs = teacher_arrays(entry)
    bits = entry.encoding.mantissa_bits
    values: dict[str, NDArray[Any]] = {
        "token_ids": targets.token_ids.astype(specs["token_ids"].dtype),
        "kept": targets.kept,
        "certain": targets.certain,
        **{name: round_mantissa(getattr(targets, name), bits) for name in PER_POSITION_FLOATS},
    }
    if entry.encoding.kind == "codes":
        assert entry.encoding.step_nats is not None
        values["logprob_codes"] = encode_logprobs(
            targets.logprobs, values["top_logprob"], targets.kept, entry.encoding.step_nats
        )
    else:
        # In memory an unused column is -inf; stored it is 0, because the format keeps infinity for one meaning.
        used = np.arange(targets.k) < targets.kept[:, None]
        values["logprobs"] = np.where(used, targets.logprobs, np.float32(0))
    return {name: values[name] for name in specs}


def shard_statistics(targets: SparseTargets) -> ShardStatistics:
    """What a shard's receipt sums up."""
    mass = head_mass(targets)
    labelled = ~np.isnan(targets.label_logprob)
    return ShardStatistics(
        positions=len(targets),
        labelled=int(labelled.sum()),
        label_nats=-float(targets.label_logprob[labelled].sum(dtype=np.float64)),
        entropy_nats=float(targets.entropy.sum(dtype=np.float64)),
        head_mass=float(mass.sum()),
        head_mass_below_half=int((mass < 0.5).sum()),
        head_mass_below_90=int((mass < 0.9).sum()),
        head_mass_below_99=int((mass < 0.99).sum()),
    )


def write_corpus(
    url: str,
    record: CacheRecord,
    tokenizer_files: Mapping[str, bytes],
    tokens: NDArray[Any],
    document_starts: NDArray[Any],
    loss_mask: NDArray[Any] | None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Make a cache from a token stream, or finish one that was interrupted.

    tokens [N] and loss_mask [N] may be memory maps: one shard is held at a time. `progress` is given the
    number of tokens written so far. Raises IdentityMismatch when `url` holds a cache of other text or
    another tokenizer, InputError when it holds something else; nothing is written then.
    """
    location = locate(url)
    # Receipts bind to the record that is stored, which may name other library versions than this process.
    record = _claim_root(location, record)
    for name, data in tokenizer_files.items():
        publish_same(location, tokenizer_key(name), data)
    files = {n: FileDigest(bytes=len(d), sha256=hashlib.sha256(d).hexdigest()) for n, d in tokenizer_files.items()}
    publish_same(location, "receipts/tokenizer.json", sealed_bytes(FilesReceipt(files=files)))
    publish_same(location, "teachers/zarr.json", metadata_bytes(group_metadata({})))

    arrays = {"tokens": tokens, "document_starts": document_starts, "loss_mask": loss_mask}
    # Tokens last: a cache whose tokens are complete is complete.
    for name, spec in sorted(corpus_arrays(record).items(), key=lambda item: item[0] == "tokens"):
        values = arrays[name]
        assert values is not None, f"the record has {name}"
        assert len(values) == spec.shape[0], f"{name} is as long as the record says"
        writer = ShardWriter(location, "", f"receipts/{name}", {name: spec}, record)
        writer.prepare()
        for shard in range(spec.shards):
            start, stop = spec.shard_range(shard)
            if not writer.is_committed(shard):
                writer.commit(shard, {name: np.asarray(values[start:stop]).astype(spec.dtype, copy=False)})
            if progress is not None and name == "tokens":
                progress(stop)
        writer.receipts.write_index()


def _claim_root(location: Location, record: CacheRecord) -> CacheRecord:
    """Write the root record, or return the one that is there if only library versions differ."""
    names = [name for name in location.names("") if not name.endswith(PARTIAL)]
    if names and "zarr.json" not in names:
        raise InputError(
            f"{location.url} holds {', '.join(names[:3])}{' …' if len(names) > 3 else ''} and is not a cache: "
            f"give an empty or new folder"
        )
    if not names:
        location.publish("zarr.json", metadata_bytes(group_metadata({ATTRIBUTE: sealed(record)})))
    stored = read_record(location, "zarr.json", CacheRecord)
    differing = differences(stored, record)
    if differing:
        raise IdentityMismatch(
            location.url,
            differing,
            "A cache holds one token stream: give another --out, or the text and tokenizer that this one was made of",
        )
    return stored


def publish_same(location: Location, key: str, data: bytes) -> None:
    """Publish an object whose bytes follow from the record; one that is there already must be the same."""
    if location.publish(key, data):
        return
    found = location.insist(key, "it was there just now", lambda: location.read(key))
    where = location.where(key)
    if found == data:
        return
    if (
        key.endswith(".json")
        and not key.startswith("tokenizer/")
        and parse_json(found, where) == parse_json(data, where)
    ):
        return
    raise CorruptCache(f"{where}: differs from what this cache's record implies; it was changed or belongs elsewhere")
