"""Writing a cache: encode → publish → receipt, one whole shard at a time.

A shard's objects are published first and its receipt last, so a job killed at any instant leaves either a committed
shard or one that will be computed again. A committed object is never replaced. Objects without a receipt are leftovers
of a killed worker: equal bytes are kept, others are replaced.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.cache.failures import Failures
from storage.cache.leases import leases_in
from storage.cache.reader import ORDER_IS_GONE, LogitCache, checked_order, read_order
from storage.cache.receipts import Receipts
from storage.cache.records import read_record, teacher_folder
from storage.errors import CorruptCache, FormatError, IdentityMismatch, InputError, MissingObject
from storage.format.fidelity import FIDELITY_FILE, FidelityReport
from storage.format.layout import record_bytes, teacher_arrays
from storage.format.manifest.entry import TeacherEntry
from storage.format.manifest.receipts import ObjectDigest, ShardReceipt, ShardStatistics
from storage.format.sealing import differences, digest, parse_json, sealed_bytes
from storage.format.shard import encode_objects, object_digest, shard_statistics, shard_values
from storage.format.targets import SparseTargets, is_order
from storage.stores import Url, open_store
from storage.stores.base import Store


class OtherBytes(CorruptCache):
    """A shard is committed already, with other bytes than those that were to be written."""


class ShardWriter:
    """Commits shards of arrays that have the same shards. Safe to use by several workers on one cache."""

    def __init__(self, receipts: Receipts) -> None:
        self.receipts = receipts
        self.leases = leases_in(receipts.store, receipts.folder)
        self._store = receipts.store
        # A local disk syncs one file at a time; on other stores most of the time is spent waiting for responses.
        self._at_once = 1 if self._store.local_path is not None else len(receipts.specs)

    def prepare(self) -> None:
        """Write each array's zarr.json unless it exists; CorruptCache if an existing one differs."""
        for key, data in self.receipts.metadata().items():
            publish_same(self._store, key, data)

    def is_committed(self, shard: int) -> bool:
        """Whether the shard has a receipt and objects of the lengths that it states; CorruptCache if they differ."""
        receipt = self.receipts.read(shard)
        if receipt is None:
            return False
        for name, expected in receipt.objects.items():
            key = self.receipts.object_key(name, shard)
            try:
                found = f"{self._store.known_size(key, 'its receipt exists')} bytes"
            except MissingObject:
                found = "no object"
            if found != f"{expected.bytes} bytes":
                raise CorruptCache(
                    f"{self._store.where(key)}: its receipt states {expected.bytes} bytes, found {found}; run "
                    f"logit-cache verify --repair {self._store.url} and this command again"
                )
        return True

    def commit(
        self,
        shard: int,
        values: Mapping[str, NDArray[Any]],
        statistics: ShardStatistics | None = None,
        began: float | None = None,
    ) -> ShardReceipt:
        """Write one shard of every array, then its receipt; returns the stored receipt, which may be another worker's.

        `began` is the `time.monotonic()` at which work on the shard began, for the receipt's `seconds`. Raises
        OtherBytes where the shard was committed with other bytes.
        """
        specs = self.receipts.specs
        encoded = encode_objects(specs, shard, values)
        objects = {name: object_digest(specs[name], data) for name, data in encoded.items()}
        # From the first object to the receipt, no other writer may replace these objects as leftovers.
        with self.leases.committing(shard), ThreadPoolExecutor(self._at_once) as pool:
            keys = [self.receipts.object_key(name, shard) for name in encoded]
            list(pool.map(self._publish_object, keys, repeat(shard), encoded.values()))
            return self._publish_receipt(shard, objects, statistics, began)

    def _publish_receipt(
        self, shard: int, objects: dict[str, ObjectDigest], statistics: ShardStatistics | None, began: float | None
    ) -> ShardReceipt:
        start, stop = self.receipts.first_array.shard_range(shard)
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
        if not self._store.publish(self.receipts.key(shard), sealed_bytes(receipt)):
            other = self.receipts.read(shard)
            if other is None or other.objects != objects:
                raise OtherBytes(
                    f"{self._store.where(self.receipts.key(shard))}: another worker committed this shard with other "
                    f"bytes; workers of one entry must run the same versions on the same type of device"
                )
            return other
        return receipt

    def _publish_object(self, key: str, shard: int, data: bytes) -> None:
        if self._store.publish(key, data):
            return
        if self._store.insist(key, "it was there just now", lambda: self._store.read(key)) == data:
            return
        if self.receipts.read(shard) is not None:
            raise OtherBytes(
                f"{self._store.where(key)}: already committed with other bytes; workers of one entry must run the "
                f"same versions on the same type of device"
            )
        self._store.replace(key, data)


class EntryWriter:
    """One teacher's entry: its record, shards and index, its leases, and the notes on permanently failed shards.

    `created`: whether it was not there before.
    """

    def __init__(self, store: Store, name: str, entry: TeacherEntry, shards: ShardWriter, created: bool) -> None:
        self.name = name
        self.entry = entry
        self.created = created
        self.leases = shards.leases
        self.failures = Failures(store, shards.receipts.folder)
        self._store = store
        self._shards = shards
        self._order = checked_order(store, name, entry)

    @classmethod
    def open(cls, url: Url, name: str, entry: TeacherEntry) -> EntryWriter:
        """Create the entry, or resume a stored one; IdentityMismatch lists the fields in which that one differs."""
        store = open_store(url)
        folder = teacher_folder(name)
        key = folder + "zarr.json"
        created = store.publish(key, record_bytes(entry))
        stored = read_record(store, key, TeacherEntry)
        refuse_other(store, name, stored, entry)
        shards = ShardWriter(Receipts(store, folder + "receipts", teacher_arrays(stored), digest(stored)))
        shards.prepare()
        return cls(store, name, stored, shards, created)

    @property
    def shards(self) -> int:
        return self._shards.receipts.shards

    def missing(self) -> list[int]:
        """Shards without a receipt, in order: one listing."""
        return np.flatnonzero(~self._shards.receipts.committed()).tolist()

    def pending(self) -> list[int]:
        """Shards that are not committed yet, in order; every committed one is compared with its receipt."""
        committed = self._shards.receipts.committed()
        return [shard for shard in range(self.shards) if not (committed[shard] and self._shards.is_committed(shard))]

    def is_committed(self, shard: int) -> bool:
        """Whether a shard is committed, by this worker or, a moment ago, by another; see `ShardWriter.is_committed`."""
        return self._shards.is_committed(shard)

    def sampling_order(self, make: Callable[[], NDArray[Any]]) -> NDArray[np.uint32] | None:
        """uint32 [V]: the ids in the order in which they lie when some are sampled; None where that is theirs.

        Where none is stored yet, the one that `make` gives is, unless another worker is first: all work with the one
        that is committed. Raises CorruptCache for a damaged one, and where it is gone though shards were sampled by it.
        """
        if self._order is None:
            return None
        spec, writer = self._order.spec, ShardWriter(self._order.receipts)
        begun = self._shards.receipts.committed().any()  # looked for first: no shard is committed before the order
        if not writer.is_committed(0):
            if begun:
                raise CorruptCache(f"{self._order.where}: {ORDER_IS_GONE}")
            order = make()
            assert is_order(order), "an order holds each id once"
            writer.prepare()
            with contextlib.suppress(OtherBytes):  # another worker was first
                writer.commit(0, {spec.name: order.astype(spec.dtype)})
        writer.receipts.write_index()
        return read_order(self._order)

    def commit(self, shard: int, targets: SparseTargets, began: float | None = None) -> ShardReceipt:
        """Encode and commit one shard from the targets of its positions, which hold all that the entry stores."""
        stored = shard_values(self.entry, targets)
        broken = stored.broken_rule()
        if broken is None and self._order is not None and self._order.receipts.recent(0) is None:
            broken = f"the entry has no {self._order.spec.name} yet"
        if broken:
            raise FormatError(f"{self._store.where(teacher_folder(self.name))}: shard {shard} is not written: {broken}")
        return self._shards.commit(shard, stored.arrays, shard_statistics(targets), began)

    def finish(self) -> None:
        """Write the index of receipts once no shard is missing."""
        if self._shards.receipts.committed().all():
            self._shards.receipts.write_index()

    def publish_fidelity(self, report: FidelityReport) -> bool:
        """Publish the entry's fidelity report atomically; False if another worker was first."""
        assert report.record_sha256 == digest(self.entry)
        return self._store.publish(teacher_folder(self.name) + FIDELITY_FILE, sealed_bytes(report))


def check_destination(url: Url, name: str) -> None:
    """Raise InputError, before slow work, where an entry that is not complete cannot be written."""
    store = open_store(url)
    try:
        store.check_writable()
    except InputError:
        if store.size(f"{teacher_folder(name)}zarr.json") is None or LogitCache.open(url).teacher(name).missing():
            raise


def refuse_other(store: Store, name: str, stored: TeacherEntry, wanted: TeacherEntry) -> None:
    """Raise IdentityMismatch, which lists the fields that differ, unless the stored entry is the wanted one."""
    folder = teacher_folder(name)
    differing = differences(stored, wanted)
    if differing:
        raise IdentityMismatch(
            f"{store.where(folder)}",
            differing,
            f"A teacher entry holds one teacher's targets made in one way: give this one another --name, or remove "
            f"{store.where(folder.rstrip('/'))} if nothing in it is worth keeping",
        )


def publish_same(store: Store, key: str, data: bytes) -> None:
    """Publish an object whose bytes follow from the record; CorruptCache if an existing one differs."""
    if store.publish(key, data):
        return
    found, where = store.insist(key, "it was there just now", lambda: store.read(key)), store.where(key)
    is_ours = key.endswith(".json") and not key.startswith("tokenizer/")
    if found != data and not (is_ours and parse_json(found, where) == parse_json(data, where)):
        raise CorruptCache(f"{where}: not what this cache's record implies; it was changed or belongs to another cache")
