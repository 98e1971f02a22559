"""The receipts of one group of arrays: which shards are committed, and with which bytes.

A shard exists only if its receipt does. Once all do, `index.json` holds the digests of all receipts, so that a cache of
a billion positions opens with one read and checks each receipt when its shard is opened.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterable, Mapping
from functools import cached_property

import numpy as np

from storage.errors import CorruptCache
from storage.format.fidelity import FIDELITY_FILE
from storage.format.layout import ArraySpec, metadata_bytes
from storage.format.manifest.receipts import MAX_INDEX_BYTES, ReceiptIndex, ShardReceipt, ShardStatistics
from storage.format.sealing import sealed, sealed_bytes, unseal
from storage.stores.base import Store

_RECENT = 8
_NAME = re.compile(r"^(\d{8,})\.json$")


class Receipts:
    """Receipts under `folder` for arrays with the same shards, which belong to the record of digest `record_sha256`.

    The arrays are one of the token stream's, the targets of a teacher entry, or its sampling order.

    prefix      key prefix of the arrays: "" or `teachers/<name>/`
    name        an array of the token stream (`tokens`, …), `teachers/<name>`, or `teachers/<name>/sampling_order`
    needed_by   of a sampling order, the receipts of the targets, none of which is written before it
    """

    def __init__(self, store: Store, folder: str, specs: Mapping[str, ArraySpec], record_sha256: str) -> None:
        self.store = store
        self.folder = folder
        entry = re.match(r"teachers/[^/]+/", folder)
        self.prefix = entry[0] if entry else ""
        array = folder.removeprefix(f"{self.prefix}receipts").lstrip("/")
        self.name = f"{self.prefix}{array}".rstrip("/")
        self.needed_by: Receipts | None = None
        self.specs = dict(specs)
        self.record_sha256 = record_sha256
        # Whose object a writer publishes first; all arrays have the same shards.
        self.first_array = next(iter(self.specs.values()))
        self.shards = self.first_array.shards
        self._listed = np.zeros(self.shards, dtype=bool)
        self._recent: dict[int, ShardReceipt] = {}
        self._lock = threading.Lock()

    def key(self, shard: int) -> str:
        return f"{self.folder}/{shard:08d}.json"

    def object_key(self, name: str, shard: int) -> str:
        return self.prefix + self.specs[name].shard_key(shard)

    def metadata(self) -> dict[str, bytes]:
        """The bytes of each array's zarr.json, by key, as the record implies them."""
        return {f"{self.prefix}{spec.name}/zarr.json": metadata_bytes(spec.metadata()) for spec in self.specs.values()}

    @property
    def record_key(self) -> str | None:
        """Key of the record of the teacher entry that the arrays belong to; None for the token stream."""
        return f"{self.prefix}zarr.json" if self.prefix else None

    @property
    def fidelity_key(self) -> str | None:
        """Key of the fidelity report of a teacher entry's targets, which is optional; None for other arrays."""
        return f"{self.prefix}{FIDELITY_FILE}" if self.name == self.prefix.rstrip("/") else None

    def keys(self, shard: int) -> set[str]:
        return {self.key(shard), *(self.object_key(name, shard) for name in self.specs)}

    def owns(self, key: str) -> bool:
        """Whether a key lies below the arrays or their receipts."""
        folders = (self.folder, *(self.prefix + name for name in self.specs))
        return key.startswith(tuple(f"{folder}/" for folder in folders))

    def at(self, store: Store) -> Receipts:
        """Those of the same arrays in another store."""
        return Receipts(store, self.folder, self.specs, self.record_sha256)

    def shard_of(self, name: str) -> int | None:
        """The shard of a receipt, from its file name; None for anything else."""
        match = _NAME.match(name)
        return int(match[1]) if match and int(match[1]) < self.shards else None

    @property
    def index_key(self) -> str:
        return f"{self.folder}/index.json"

    @cached_property
    def index(self) -> ReceiptIndex | None:
        """The index, or None while shards are missing. Raises CorruptCache, FormatError."""
        try:
            data = self.store.read_json(self.index_key, min(MAX_INDEX_BYTES, 4096 + 128 * self.shards))
        except FileNotFoundError:
            return None
        where = self.store.where(self.index_key)
        index = unseal(ReceiptIndex, data, where)
        if index.record_sha256 != self.record_sha256 or len(index.receipts) != self.shards:
            raise CorruptCache(f"{where}: it belongs to another entry, or to another number of shards")
        return index

    def committed(self) -> np.ndarray:
        """bool [shards]: which shards have a receipt."""
        if self.index is not None:
            return np.ones(self.shards, dtype=bool)
        found = np.zeros(self.shards, dtype=bool)
        for name in self.store.names(self.folder):
            shard = self.shard_of(name)
            if shard is not None:
                found[shard] = True
        self._listed = found.copy()
        return found

    def missing_ranges(self) -> list[tuple[int, int]]:
        """Ranges of positions without a receipt, adjacent ones merged."""
        return self._ranges(~self.committed())

    def committed_ranges(self) -> list[tuple[int, int]]:
        """Ranges of positions with a receipt, adjacent ones merged."""
        return self._ranges(self.committed())

    def _ranges(self, chosen: np.ndarray) -> list[tuple[int, int]]:
        ranges: list[tuple[int, int]] = []
        for shard in np.flatnonzero(chosen):
            start, stop = self.first_array.shard_range(int(shard))
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((start, stop))
        return ranges

    def read(self, shard: int) -> ShardReceipt | None:
        """A shard's receipt, checked against its own digest, its record, and the index; None if there is none."""
        where = self.store.where(self.key(shard))
        receipt = self._stored(shard)
        if receipt is None:
            return None
        expected = (self.record_sha256, shard, *self.first_array.shard_range(shard), set(self.specs))
        found = (receipt.record_sha256, receipt.shard, receipt.start, receipt.stop, set(receipt.objects))
        if expected != found:
            raise CorruptCache(f"{where}: it is the receipt of something else (another entry, shard or set of arrays)")
        for name, item in receipt.objects.items():
            least, most = self.specs[name].index_bytes, self.specs[name].most_object_bytes
            if not least <= item.bytes <= most:
                raise CorruptCache(
                    f"{where}: states {item.bytes} bytes for {name}, where an object has {least} to {most}"
                )
        if self.index is not None and self.index.receipts[shard] != sealed(receipt)["sha256"]:
            raise CorruptCache(f"{where}: it differs from the digest that the index of receipts holds")
        return receipt

    def _stored(self, shard: int) -> ShardReceipt | None:
        """The stored receipt, or None; MissingObject if there is none though the index or the last listing has it."""
        key = self.key(shard)

        def request() -> ShardReceipt:
            return unseal(ShardReceipt, self.store.read_json(key), self.store.where(key))

        if self.index is not None:
            return self.store.insist(key, "the index of receipts lists it", request)
        if self._listed[shard]:
            return self.store.insist(key, "it was listed", request)
        with contextlib.suppress(FileNotFoundError):
            return request()
        return None

    def recent(self, shard: int) -> ShardReceipt | None:
        """`read` with a small cache, for readers: the arrays of an entry need the same receipt one after the other."""
        with self._lock:
            if shard not in self._recent:
                receipt = self.read(shard)
                if receipt is None and self.committed()[shard]:
                    receipt = self.read(shard)
                if receipt is None:
                    return None
                self._recent[shard] = receipt
                while len(self._recent) > _RECENT:
                    self._recent.pop(next(iter(self._recent)))
            return self._recent[shard]

    def forget_index(self) -> None:
        """Drop the cached index and listing, so that the next call reads the store again."""
        self.__dict__.pop("index", None)
        self._listed[:] = False

    def write_index(self) -> ReceiptIndex:
        """Write the index; every shard must be committed. Returns the stored one, which may be another worker's."""
        if self.index is not None:
            return self.index
        index = self._sums_of(range(self.shards))
        assert len(index.receipts) == self.shards, "an index is written when nothing is missing"
        self.store.publish(self.index_key, sealed_bytes(index))
        self.forget_index()
        found = self.index
        assert found is not None
        return found

    def totals(self) -> ReceiptIndex:
        """The index, or one of the receipts that there are; its sums are over the committed shards."""
        return self.index or self._sums_of(np.flatnonzero(self.committed()).tolist())

    def _sums_of(self, shards: Iterable[int]) -> ReceiptIndex:
        digests, object_bytes, seconds = [], 0, 0.0
        statistics: ShardStatistics | None = None
        for receipt in map(self.read, shards):
            if receipt is None:
                continue
            digests.append(sealed(receipt)["sha256"])
            object_bytes += sum(item.bytes for item in receipt.objects.values())
            seconds += receipt.seconds
            if receipt.statistics is not None:
                statistics = receipt.statistics if statistics is None else statistics + receipt.statistics
        return ReceiptIndex(
            record_sha256=self.record_sha256,
            receipts=tuple(digests),
            object_bytes=object_bytes,
            statistics=statistics,
            seconds=seconds,
        )
