"""The keys that belong to a cache: all that its records and receipts account for.

Checking and copying share this list. It follows from the records, never from a listing: an object that is not in it
does not belong to the cache, even if it is stored there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from storage.cache.reader import LogitCache
from storage.cache.receipts import Receipts
from storage.format.fidelity import FIDELITY_FILE
from storage.format.layout import ArraySpec, corpus_arrays, group_metadata, metadata_bytes
from storage.format.manifest import ShardReceipt

ROOT_KEY = "zarr.json"
TEACHERS_KEY = "teachers/zarr.json"
TOKENIZER_RECEIPT_KEY = "receipts/tokenizer.json"
# The card files: optional files beside the arrays, for people and for hubs; no receipt lists them.
CARD_KEY = "README.md"
SIGNATURE_KEY = "model.sig"
CARD_FILES = (CARD_KEY, ".gitattributes", SIGNATURE_KEY)
TEACHERS_METADATA = metadata_bytes(group_metadata({}))


@dataclass(frozen=True)
class Group:
    """Arrays that share receipts: one of the token stream's, the targets of a teacher entry, or its sampling order.

    name        an array of the token stream (`tokens`, …), `teachers/<name>`, or `teachers/<name>/sampling_order`
    needed_by   of a sampling order, the receipts of the targets, none of which is written before it
    """

    name: str
    receipts: Receipts
    needed_by: Receipts | None = None

    @property
    def folder(self) -> str:
        """Key prefix of its arrays: "" or `teachers/<name>/`."""
        return self.receipts.group

    @property
    def record_key(self) -> str | None:
        """Key of the record of the teacher entry that it belongs to; None for the token stream."""
        return f"{self.folder}{ROOT_KEY}" if self.folder else None

    @property
    def fidelity_key(self) -> str | None:
        """Key of the fidelity report of a teacher entry's targets, which is optional; None for other groups."""
        return f"{self.folder}{FIDELITY_FILE}" if self.name == self.folder.rstrip("/") else None

    def keys(self, shard: int) -> set[str]:
        return {self.receipts.key(shard), *(self.receipts.object_key(name, shard) for name in self.receipts.specs)}

    def objects(self, receipt: ShardReceipt) -> Iterator[tuple[str, ArraySpec]]:
        """Key and array specification of every object that a receipt commits."""
        for name in receipt.objects:
            yield self.receipts.object_key(name, receipt.shard), self.receipts.specs[name]

    def owns(self, key: str) -> bool:
        """Whether a key lies below this group's arrays or receipts."""
        folders = [self.receipts.folder, *(self.folder + name for name in self.receipts.specs)]
        return any(key.startswith(folder + "/") for folder in folders)


def corpus_groups(cache: LogitCache) -> list[Group]:
    """One group per array of the token stream; none when the cache was shared without it."""
    return [Group(name, cache.receipts(name)) for name in corpus_arrays(cache.record)]


def teacher_groups(cache: LogitCache, name: str) -> list[Group]:
    """A teacher entry's groups, in the order in which they are written: its sampling order, if it has one, its targets.

    Raises CacheNotFound, FormatError and CorruptCache, as `LogitCache.teacher` does.
    """
    teacher, entry = cache.teacher(name), f"teachers/{name}"
    order = teacher.order
    first = [] if order is None else [Group(f"{entry}/{order.spec.name}", order.receipts, teacher.receipts)]
    return [*first, Group(entry, teacher.receipts)]
