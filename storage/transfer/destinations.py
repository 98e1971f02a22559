"""The two destinations of a copy: an object store, and a local folder, which is filled through a staging folder.

Both take a copy in one order, so that a copy that is killed at any instant is nowhere a false cache, and resumes:
objects, the receipts that commit them, and the root record last. Nothing committed is replaced.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

from storage.cache.inventory import ROOT_KEY
from storage.cache.reader import LogitCache
from storage.cache.writer import publish_same
from storage.errors import CorruptCache
from storage.stores.base import Store
from storage.stores.local import LocalStore
from storage.transfer.compatibility import check_stream
from storage.transfer.contents import Contents, Object, Part, Shard
from storage.transfer.staging import StagingFolder, rename_folder, sync


class Destination(ABC):
    """Takes checked objects in any order, each shard's receipt after its objects, and publishes a cache at the end."""

    def __init__(self, target: Store, *, new: bool) -> None:
        self.target = target
        self.new = new  # there is no cache yet
        # Parts of which the target has shards with the same objects under receipts of another run (other times).
        self.mixed: set[str] = set()

    def begin(self, part: Part) -> None:
        return

    @abstractmethod
    def put_object(self, item: Object) -> None:
        """Copy an object, compared with its receipt. Raises CorruptCache if it differs at the source."""

    @abstractmethod
    def put_receipt(self, shard: Shard) -> None:
        """Take a shard's receipt, after all its objects."""

    @abstractmethod
    def publish(self, contents: Contents, card_files: Mapping[str, bytes]) -> None:
        """Make a cache of it. `card_files` are for a new cache only."""

    @property
    def kept_at(self) -> Path | None:
        """The staging folder, if it holds objects that another run can use."""
        return None

    def _publish_record(self, part: Part) -> None:
        for key in (*part.group.metadata(), part.group.record_key):
            if key is not None:
                publish_same(self.target, key, part.manifest.read(key))

    def _publish_index(self, part: Part) -> None:
        """Publish the index of a part's receipts, and its fidelity report."""
        there = part.group.at(self.target)
        if part.complete and part.group.name not in self.mixed:
            key = there.index_key
            if not self.target.publish(key, part.manifest.read(key)):
                _ = there.index  # raises if it is another entry's, or damaged
        elif there.committed().all():
            there.write_index()
        report = part.group.fidelity_key
        if report is not None and part.manifest.size(report) is not None:
            # An existing report was measured too; either may be kept.
            self.target.publish(report, part.manifest.read(report))

    def _publish_root(self, contents: Contents) -> None:
        for key in contents.root_files() if contents.with_root else ():
            if self.new or key != ROOT_KEY:
                publish_same(self.target, key, contents.manifest.read(key))


class StoreDestination(Destination):
    """An object store: each object is one PUT, and the record that makes the cache visible is last."""

    def begin(self, part: Part) -> None:
        # First, so that in an existing cache every reader, and verify, sees an incomplete entry and not one without a
        # record. A new cache has no root record yet, so nobody sees it.
        self._publish_record(part)

    def put_object(self, item: Object) -> None:
        data = item.fetch()
        if not self.target.publish_new(item.key, data) and not self._holds(item.key, data):
            # A killed run's leftover, or damage, unless a worker has committed it since the target was listed.
            item.shard.committed(item.shard.part.group.at(self.target))
            self.target.replace(item.key, data)

    def put_receipt(self, shard: Shard) -> None:
        data = shard.part.manifest.read(shard.key)
        if not self.target.publish_new(shard.key, data) and not self._holds(shard.key, data):
            shard.committed(shard.part.group.at(self.target))
            self.mixed.add(shard.part.group.name)

    def publish(self, contents: Contents, card_files: Mapping[str, bytes]) -> None:
        for part in contents.parts:
            self._publish_index(part)
        for key, data in card_files.items():
            self.target.replace(key, data)
        self._publish_root(contents)

    def _holds(self, key: str, data: bytes) -> bool:
        with contextlib.suppress(CorruptCache, FileNotFoundError):  # a longer one
            return self.target.read(key, len(data)) == data
        return False


class FolderDestination(Destination):
    """A local folder: the copy is staged, checked as a whole, and renamed into place.

    `link`: hard-link objects instead of copying them, where that is possible; for a folder that is only read.
    """

    def __init__(self, target: Store, staging: StagingFolder, *, new: bool, link: bool = False) -> None:
        super().__init__(target, new=new)
        self._staging = staging
        self._link = link
        self._staged: set[str] = set()
        self._receipts: set[str] = set()

    @property
    def kept_at(self) -> Path | None:
        return self._staging.folder if self._staging.holds_objects() else None

    def put_object(self, item: Object) -> None:
        self._staged.add(item.key)
        if item.is_whole(self._staging.cache):
            return  # an earlier run's
        source = item.shard.part.origin
        if isinstance(source, LocalStore) and source.size(item.key) == item.size:
            # By the kernel, then compared block by block: cheaper than whole objects in memory.
            self._staging.copy(source, item.key, item.size, link=self._link)
            if item.is_whole(self._staging.cache):
                return
        self._staging.write(item.key, item.fetch())

    def put_receipt(self, shard: Shard) -> None:
        self._receipts.add(shard.key)

    def publish(self, contents: Contents, card_files: Mapping[str, bytes]) -> None:
        entries = dict.fromkeys(part.group.prefix for part in contents.parts if part.group.record_key is not None)
        absent = [folder for folder in entries if not self.target.names(folder.rstrip("/"))]
        for key in contents.manifest.walk():
            if self.new or key in self._receipts or key.startswith(tuple(absent)):
                self._stage(key, contents.manifest.read(key))
        for key, data in card_files.items():
            self._stage(key, data)
        self._staging.keep_only(self._staged)
        if self.new:
            check_stream(LogitCache(self._staging.cache, contents.record), contents.parts)
            self._staging.become_target()
        else:
            self._staging.sync()
            for folder in absent:
                self._move_entry(folder.rstrip("/"))
            for part in contents.parts:
                if part.group.prefix not in absent:
                    self._merge(part)
            self._publish_root(contents)
        self._staging.discard()

    def _stage(self, key: str, data: bytes) -> None:
        self._staged.add(key)
        self._staging.write(key, data)

    def _move_entry(self, name: str) -> None:
        (self._staging.target / "teachers").mkdir(exist_ok=True)
        rename_folder(self._staging.path(name), self._staging.target / name)

    def _merge(self, part: Part) -> None:
        """Move a part into a cache that other processes may be reading or completing."""
        self._publish_record(part)
        with self.target.exclusive(part.group.folder):
            there, keys = part.group.at(self.target), []
            for number in part.shards:
                if there.key(number) in self._receipts and part.shard(number).committed(there):
                    self.mixed.add(part.group.name)
                else:
                    keys += [key for key in part.group.keys(number) if key in self._staged]
            self._move(key for key in keys if key not in self._receipts)
            self._move(key for key in keys if key in self._receipts)
        self._publish_index(part)

    def _move(self, keys: Iterable[str]) -> None:
        folders: set[Path] = set()
        for key in keys:
            path = self._staging.target / key
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._staging.path(key), path)
            folders.update(path.parents[: len(Path(key).parts)])
        sync(folders)
