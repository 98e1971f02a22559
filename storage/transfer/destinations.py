"""The two destinations of a copy: a local folder, filled through a staging folder, and an object store.

Both take checked objects in any order and publish a cache of them at the end. `storage.transfer.copy` states the
guarantees for concurrent readers, and for the next run after a kill.
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
from storage.transfer.contents import Contents, Part
from storage.transfer.staging import StagingFolder, rename_folder, sync

Check = Callable[[LogitCache], None]

# Bytes of whole objects in memory at once, over all workers; one object is at most about as large.
_HELD_BYTES = 64 << 20


class Destination(ABC):
    """Takes the objects and receipts of a copy, then publishes a cache of them."""

    def __init__(self, target: Store, new: bool) -> None:
        self.target = target
        self.new = new
        # Parts of which the target has shards with the same objects under receipts of another run (other times).
        self.mixed: set[str] = set()
        self._held = _Budget(_HELD_BYTES)

    @property
    def kept_at(self) -> Path | None:
        """The staging folder, if it holds objects that another run can use."""
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
        """Take a shard's receipt, after all its objects."""

    @abstractmethod
    def finish(self, contents: Contents, card_files: Mapping[str, bytes], check: Check | None) -> None:
        """Publish the copy. `card_files` are for a new cache only; `check` runs on a new local one first."""

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
        # An existing report was measured too; either may be kept.
        if part.report is not None:
            self.target.publish(part.report_key, part.report)


class StoreDestination(Destination):
    """An object store: each object is one PUT, and the record that makes the cache visible is last."""

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
                # A killed run's leftover, unless another worker has committed it since the target was listed.
                _same_shard(part, self.target, shard, receipt)
                self.target.replace(key, data)
        advance(size)

    def begin(self, part: Part) -> None:
        # First, so that in an existing cache every reader, and verify, sees an incomplete entry and not one without a
        # record. A new cache has no root record yet, so nobody sees it.
        self._publish_record(part)

    def put_receipt(self, part: Part, shard: int, receipt: ShardReceipt, data: bytes) -> None:
        key = part.source.receipts.key(shard)
        if not self.target.publish_new(key, data) and not self._holds(key, data):
            _same_shard(part, self.target, shard, receipt)
            self.mixed.add(part.name)

    def finish(self, contents: Contents, card_files: Mapping[str, bytes], check: Check | None) -> None:
        for part in contents.parts:
            self._publish_index(part)
            self._publish_report(part)
        if contents.with_root:
            for key, data in contents.small_files():
                publish_same(self.target, key, data)
        if self.new:
            for key, data in card_files.items():
                self.target.replace(key, data)
            publish_same(self.target, ROOT_KEY, contents.root)

    def _holds(self, key: str, data: bytes) -> bool:
        with contextlib.suppress(CorruptCache, FileNotFoundError):  # a longer one
            return self.target.read(key, len(data)) == data
        return False


class FolderDestination(Destination):
    """A local folder, new or existing, filled through its staging folder.

    `link`: hard-link objects instead of copying them, where that is possible; for a folder that is only read.
    """

    def __init__(self, target: Store, new: bool, staging: StagingFolder, link: bool = False) -> None:
        super().__init__(target, new)
        self._staging = staging
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
        source, expected, cache = part.origin, receipt.objects[spec.name], self._staging.cache
        with contextlib.suppress(CorruptCache):
            if self._staging.has(key, expected):
                check_object(cache, key, spec, receipt)
                advance(expected.bytes)
                return
        if not isinstance(source, LocalStore):
            with self._held.of(expected.bytes):
                self._staging.write(key, fetch_object(source, key, spec, receipt))
            advance(expected.bytes)
            return
        try:
            check_object(source, key, spec, receipt)
            linked = self._link and self._staging.link(source.local_path / key, key)
            if linked and self._staging.has(key, expected):
                advance(expected.bytes)
            elif linked or not self._staging.copy(source, key, expected, advance):
                raise CorruptCache(f"{source.where(key)}: not the bytes whose sha256 is in its receipt")
        except FileNotFoundError:
            raise CorruptCache(f"{source.where(key)}: missing, though its receipt exists") from None

    def put_receipt(self, part: Part, shard: int, receipt: ShardReceipt, data: bytes) -> None:
        self._staging.write(part.source.receipts.key(shard), data)
        self._receipts.setdefault(part.name, []).append((shard, receipt))

    def finish(self, contents: Contents, card_files: Mapping[str, bytes], check: Check | None) -> None:
        for part in contents.parts:
            self._write_small(part)
        if self.new:
            for key, data in contents.small_files():
                self._staging.write(key, data)
            for key, data in (*card_files.items(), (ROOT_KEY, contents.root)):
                self._staging.write(key, data)
        self._staging.keep_only(contents.keys() | card_files.keys())
        if self.new:
            if check is not None:
                check(LogitCache.open(self._staging.cache.url))
            self._staging.become(self._folder)
        else:
            self._staging.sync()
            for part in contents.parts:
                self._merge(part)
            if contents.with_root:
                for key, data in contents.small_files():
                    publish_same(self.target, key, data)
        self._staging.discard()

    @property
    def kept_at(self) -> Path | None:
        return self._staging.folder if self._staging.holds_objects() else None

    @property
    def _folder(self) -> Path:
        folder = self.target.local_path
        assert folder is not None
        return Path(os.path.realpath(folder))

    def _write_small(self, part: Part) -> None:
        for key, data in part.at(self.target).metadata().items():
            self._staging.write(key, data)
        if part.index is not None:
            self._staging.write(part.index_key, part.index)
        if part.report is not None:
            self._staging.write(part.report_key, part.report)
        if part.record is not None:
            self._staging.write(part.record_key, part.record)

    def _merge(self, part: Part) -> None:
        """Move a part into a cache that other processes may be reading or completing."""
        if part.record is not None and not self.target.names(part.name):
            (self._folder / "teachers").mkdir(exist_ok=True)
            rename_folder(self._staging.path(part.name), self._folder / part.name)
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
            os.replace(self._staging.path(key), path)
            folders.update(path.parents[: len(Path(key).parts)])
        sync(folders)


def _same_shard(part: Part, target: Store, shard: int, receipt: ShardReceipt) -> bool:
    """Whether the target has a receipt of the shard. Raises CorruptCache if it commits other bytes."""
    there = part.at(target).receipts.read(shard)
    if there is not None and there.objects != receipt.objects:
        raise other_bytes(part, target, shard)
    return there is not None


def other_bytes(part: Part, target: Store, shard: int) -> CorruptCache:
    """The error for a shard that the target has with other bytes, made by another run or changed."""
    key = part.source.receipts.key(shard)
    return CorruptCache(
        f"{target.where(key)}: this shard is there with other bytes than {part.origin.where(key)} commits, and "
        f"committed shards are never replaced; logit-cache verify shows whether one of them is damaged"
    )


class _Budget:
    """A limit on the bytes in memory at once. One object alone is always admitted."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Wait until `size` bytes fit into the limit, and count them while the body runs."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + size <= self._most)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()
