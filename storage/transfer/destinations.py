"""The two ends of a copy: a local folder behind a quarantine, and an object store.

Both take checked objects in any order and make a cache of them at the end. What they promise to whoever reads at the
same time, and to the next run after a kill, is in `storage.transfer.copy`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from storage.cache.checked_array import check_object, fetch_object
from storage.cache.inventory import ROOT_KEY
from storage.cache.reader import LogitCache
from storage.cache.writer import publish_same
from storage.errors import CorruptCache
from storage.format.layout import ArraySpec
from storage.format.manifest import ShardReceipt
from storage.progress import Advance
from storage.stores.base import Store
from storage.stores.local import LocalStore
from storage.transfer.contents import Part, Shipment
from storage.transfer.staging import Quarantine, rename_folder, sync

Check = Callable[[LogitCache], None]

# Whole objects in memory at once, over all workers; one is at most about as large.
_HELD_BYTES = 64 << 20


class Sink(ABC):
    """Takes the objects and receipts of a shipment, then makes a cache of them."""

    def __init__(self, target: Store, new: bool) -> None:
        self.target = target
        self.new = new
        # Parts of which the target has shards with the same objects and other receipts: another run's times.
        self.mixed: set[str] = set()
        self._held = _Budget(_HELD_BYTES)

    @property
    def kept_at(self) -> Path | None:
        """Where objects wait that another run can use, if there are any."""
        return None

    def begin(self, part: Part) -> None:
        """Prepare for a part's objects."""
        return

    @abstractmethod
    def put_object(
        self,
        part: Part,
        shard: int,
        key: str,
        spec: ArraySpec,
        receipt: ShardReceipt,
        committed: bool,
        advance: Advance,
    ) -> None:
        """Copy an object. `committed`: the target has its receipt, and not the object that belongs to it."""

    @abstractmethod
    def put_receipt(self, part: Part, shard: int, receipt: ShardReceipt, data: bytes) -> None:
        """Take a shard's receipt, once all its objects were put."""

    @abstractmethod
    def finish(self, shipment: Shipment, card_files: Mapping[str, bytes], check: Check | None) -> None:
        """Make a cache of what was put. `card_files` go into a new cache only; `check` looks at a new local one."""

    def _publish_record(self, part: Part) -> None:
        for key, data in part.at(self.target).metadata().items():
            publish_same(self.target, key, data)
        if part.record is not None:
            publish_same(self.target, part.record_key, part.record)

    def _publish_index(self, part: Part) -> None:
        at = part.at(self.target).receipts
        if part.index is not None and part.name not in self.mixed:
            if not self.target.publish(at.index_key, part.index):
                _ = at.index  # raises if it is another entry's, or damaged
        elif at.committed().all():
            at.write_index()

    def _publish_report(self, part: Part) -> None:
        # One that is there was measured too; which of two is kept makes no difference.
        if part.report is not None:
            self.target.publish(part.report_key, part.report)


class StoreSink(Sink):
    """An object store: each object is one PUT, and what makes the cache visible is last."""

    def put_object(
        self,
        part: Part,
        shard: int,
        key: str,
        spec: ArraySpec,
        receipt: ShardReceipt,
        committed: bool,
        advance: Advance,
    ) -> None:
        size = receipt.objects[spec.name].bytes
        with self._held.of(size):
            data = fetch_object(part.origin, key, spec, receipt)
            if committed:
                self.target.replace(key, data)
            elif not self.target.publish_new(key, data) and not self._holds(key, data):
                # What a killed run left, unless somebody has committed it since the target was listed.
                _same_shard(part, self.target, shard, receipt)
                self.target.replace(key, data)
        advance(size)

    def begin(self, part: Part) -> None:
        # In a cache that is there, this makes an entry that is not complete, for every reader and for verify; after the
        # data, it would be a record that is missing. A new cache has no root record yet, so nobody sees it.
        self._publish_record(part)

    def put_receipt(self, part: Part, shard: int, receipt: ShardReceipt, data: bytes) -> None:
        key = part.source.receipts.key(shard)
        if not self.target.publish_new(key, data) and not self._holds(key, data):
            _same_shard(part, self.target, shard, receipt)
            self.mixed.add(part.name)

    def finish(self, shipment: Shipment, card_files: Mapping[str, bytes], check: Check | None) -> None:
        for part in shipment.parts:
            self._publish_index(part)
            self._publish_report(part)
        if shipment.with_root:
            for key, data in shipment.small_files():
                publish_same(self.target, key, data)
        if self.new:
            for key, data in card_files.items():
                self.target.replace(key, data)
            publish_same(self.target, ROOT_KEY, shipment.root)

    def _holds(self, key: str, data: bytes) -> bool:
        with contextlib.suppress(CorruptCache, FileNotFoundError):  # a longer one
            return self.target.read(key, len(data)) == data
        return False


class FolderSink(Sink):
    """A local folder, new or not, filled through its quarantine.

    `link`: give objects a second name instead of copying them, where that is possible; for a folder that is only read.
    """

    def __init__(self, target: Store, new: bool, quarantine: Quarantine, link: bool = False) -> None:
        super().__init__(target, new)
        self._quarantine = quarantine
        self._link = link
        self._objects: dict[str, list[tuple[int, str]]] = {}
        self._receipts: dict[str, list[tuple[int, ShardReceipt]]] = {}

    def put_object(
        self,
        part: Part,
        shard: int,
        key: str,
        spec: ArraySpec,
        receipt: ShardReceipt,
        committed: bool,
        advance: Advance,
    ) -> None:
        self._objects.setdefault(part.name, []).append((shard, key))
        source, expected, cache = part.origin, receipt.objects[spec.name], self._quarantine.cache
        with contextlib.suppress(CorruptCache):
            if self._quarantine.has(key, expected):
                check_object(cache, key, spec, receipt)
                advance(expected.bytes)
                return
        if not isinstance(source, LocalStore):
            with self._held.of(expected.bytes):
                self._quarantine.write(key, fetch_object(source, key, spec, receipt))
            advance(expected.bytes)
            return
        try:
            check_object(source, key, spec, receipt)
            linked = self._link and self._quarantine.link(source.local_path / key, key)
            if linked and self._quarantine.has(key, expected):
                advance(expected.bytes)
            elif linked or not self._quarantine.copy(source, key, expected, advance):
                raise CorruptCache(f"{source.where(key)}: not the bytes whose sha256 is in its receipt")
        except FileNotFoundError:
            raise CorruptCache(f"{source.where(key)}: missing, though its receipt exists") from None

    def put_receipt(self, part: Part, shard: int, receipt: ShardReceipt, data: bytes) -> None:
        self._quarantine.write(part.source.receipts.key(shard), data)
        self._receipts.setdefault(part.name, []).append((shard, receipt))

    def finish(self, shipment: Shipment, card_files: Mapping[str, bytes], check: Check | None) -> None:
        for part in shipment.parts:
            self._write_small(part)
        if self.new:
            for key, data in shipment.small_files():
                self._quarantine.write(key, data)
            for key, data in (*card_files.items(), (ROOT_KEY, shipment.root)):
                self._quarantine.write(key, data)
        self._quarantine.keep_only(shipment.keys() | card_files.keys())
        if self.new:
            if check is not None:
                check(LogitCache.open(self._quarantine.cache.url))
            self._quarantine.become(self._folder)
        else:
            self._quarantine.sync()
            for part in shipment.parts:
                self._merge(part)
            if shipment.with_root:
                for key, data in shipment.small_files():
                    publish_same(self.target, key, data)
        self._quarantine.discard()

    @property
    def kept_at(self) -> Path | None:
        return self._quarantine.folder if self._quarantine.holds_objects() else None

    @property
    def _folder(self) -> Path:
        folder = self.target.local_path
        assert folder is not None
        return Path(os.path.realpath(folder))

    def _write_small(self, part: Part) -> None:
        for key, data in part.at(self.target).metadata().items():
            self._quarantine.write(key, data)
        if part.index is not None:
            self._quarantine.write(part.index_key, part.index)
        if part.report is not None:
            self._quarantine.write(part.report_key, part.report)
        if part.record is not None:
            self._quarantine.write(part.record_key, part.record)

    def _merge(self, part: Part) -> None:
        """Move a part into a cache that others may be reading, or completing, at this moment."""
        if part.record is not None and not self.target.names(part.name):
            (self._folder / "teachers").mkdir(exist_ok=True)
            rename_folder(self._quarantine.path(part.name), self._folder / part.name)
            return
        receipts = self._receipts.get(part.name, [])
        with self.target.exclusive(part.source.receipts.folder):
            theirs = {shard for shard, receipt in receipts if _same_shard(part, self.target, shard, receipt)}
            if theirs:
                self.mixed.add(part.name)
            self._move(key for shard, key in self._objects.get(part.name, []) if shard not in theirs)
            self._move(part.source.receipts.key(shard) for shard, _ in receipts if shard not in theirs)
        self._publish_record(part)
        self._publish_index(part)
        self._publish_report(part)

    def _move(self, keys: Iterator[str]) -> None:
        folders: set[Path] = set()
        for key in keys:
            path = self._folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._quarantine.path(key), path)
            folders.update(path.parents[: len(Path(key).parts)])
        sync(folders)


def _same_shard(part: Part, target: Store, shard: int, receipt: ShardReceipt) -> bool:
    """Whether the target has a receipt of the shard; CorruptCache when that commits other bytes."""
    there = part.at(target).receipts.read(shard)
    if there is not None and there.objects != receipt.objects:
        raise other_bytes(part, target, shard)
    return there is not None


def other_bytes(part: Part, target: Store, shard: int) -> CorruptCache:
    """The error for a shard that the target has, made by another run or changed."""
    key = part.source.receipts.key(shard)
    return CorruptCache(
        f"{target.where(key)}: this shard is there with other bytes than {part.origin.where(key)} commits, and what "
        f"is committed is never replaced; logit-cache verify tells whether one of them is damaged"
    )


class _Budget:
    """Bytes that may be in memory at once. One object alone is always let in."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Wait until there is room for `size` bytes, and hold them while the body runs."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + size <= self._most)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()
