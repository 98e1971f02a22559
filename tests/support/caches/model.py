"""What has been promised about one cache: which parts a writer has returned for, and which keys a test has damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from support.caches import known

from storage.format.layout import teacher_arrays
from storage.format.manifest.entry import TeacherEntry
from storage.format.stored import StoredTargets


@cache
def original() -> tuple[dict[str, bytes], dict[str, TeacherEntry]]:
    """The files of a complete cache, and its entries."""
    with TemporaryDirectory() as home:
        record = known.write_whole(f"{home}/cache")
        return known.contents(Path(home) / "cache"), known.entries(record)


def objects(name: str, shard: int, variant: int) -> dict[str, bytes]:
    """The objects of a shard by key, as a worker of that variant writes them."""
    entry = original()[1][name]
    values = StoredTargets.of(entry, known.rows(entry, shard, variant)).arrays
    return {
        f"teachers/{name}/{spec.shard_key(shard)}": known.encode_once(spec, shard, values[spec.name])
        for spec in teacher_arrays(entry).values()
    }


def is_receipt(key: str) -> bool:
    """Whether a key is that of a shard's receipt, or of an index of them: what differs from run to run."""
    return "receipts/" in key and key != "receipts/tokenizer.json"


def says_the_same(key: str, found: bytes | None, pristine: bytes | None) -> bool:
    """Whether an object has the same bytes; a record or receipt may lose the line feed at its end."""
    if found is None or pristine is None or not key.endswith(".json") or key.startswith("tokenizer/"):
        return found == pristine
    return found.rstrip(b"\n") == pristine.rstrip(b"\n")


@dataclass
class CacheModel:
    """One cache at `root`.

    acknowledged   parts that must be readable while nobody damages them, with the variant that was written
    pristine       bytes of the objects that those depend on, as they were written
    damaged        keys that a test has damaged; what else differs is the cache's own fault
    interrupted    whether a writer was killed, or the power cut, since it was last known to be whole
    """

    root: Path
    acknowledged: dict[str, int] = field(default_factory=dict)
    pristine: dict[str, bytes] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    interrupted: bool = False

    @property
    def exists(self) -> bool:
        """Whether there is a cache to open."""
        return self.on_disk("zarr.json") is not None

    @property
    def has_stream(self) -> bool:
        """Whether the token stream was complete once; a repair may have opened shards of it again."""
        return "tokenizer" in self.acknowledged

    def parts(self) -> list[known.Part]:
        """All parts; those of entries with the variant that is committed."""
        found = known.corpus_parts()
        for name, entry in original()[1].items():
            found += [
                known.shard_part(name, entry, shard, self.variant(name, shard))
                for shard in range(-(-known.N // entry.layout.shard))
            ]
        return found

    def variant(self, name: str, shard: int) -> int:
        """The variant that a receipt commits; a receipt that commits neither cannot be read, so either will do."""
        try:
            receipt = json.loads((self.root / f"teachers/{name}/receipts/{shard:08d}.json").read_bytes())
            listed = {array: digest["sha256"] for array, digest in receipt["objects"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return 0
        theirs = known.digests(original()[1][name], shard, 1)
        return int(listed == {array: digest.sha256 for array, digest in theirs.items()})

    def on_disk(self, key: str) -> bytes | None:
        """An object's bytes, None where there is none."""
        path = self.root / key
        return path.read_bytes() if path.is_file() else None

    def still_damaged(self) -> set[str]:
        """Keys that a test has damaged and nothing has made good since."""
        self.damaged = {
            key for key in self.damaged if not says_the_same(key, self.on_disk(key), self.pristine.get(key))
        }
        return self.damaged

    def is_committed(self, part: known.Part) -> bool:
        """Whether a part's receipt is there, in whatever state."""
        return all((self.root / key).is_file() for key in part.keys if is_receipt(key))

    def index_fits(self, part: known.Part) -> bool:
        """Whether there is no index, or one that nobody damaged and that lists this part's receipt.

        A worker that looked for an index before there was one may commit a shard whose receipt was deleted after the
        index had listed it. The new receipt differs (it states its time), and readers refuse it.
        """
        data = self.on_disk(part.index) if part.index else None
        if data is None:
            return part.index not in self.damaged
        if part.index in self.still_damaged():
            return False
        (receipt,) = (key for key in part.keys if is_receipt(key))
        return json.loads(self.pristine[receipt])["sha256"] in json.loads(data)["receipts"]

    def is_sound(self, part: known.Part) -> bool:
        """Whether a part was acknowledged, and nothing that it depends on is damaged."""
        return part.name in self.acknowledged and not part.keys & self.still_damaged() and self.index_fits(part)

    def acknowledge(self, part: known.Part, variant: int = 0) -> None:
        """A writer has returned: the part is there from now on."""
        name, _, shard = part.name.partition("/")
        mine = objects(name, int(shard), variant) if name in original()[1] else {}
        for key in part.keys - self.still_damaged():
            found = self.on_disk(key) if is_receipt(key) else mine.get(key, original()[0].get(key))
            assert found is not None, f"{key} is not there, though what needs it was acknowledged"
            self.pristine[key] = found
        if part.index and part.index not in self.still_damaged() and (index := self.on_disk(part.index)) is not None:
            self.pristine[part.index] = index
        self.acknowledged[part.name] = variant

    def acknowledge_entry(self, name: str) -> None:
        """All shards of an entry, whoever wrote them."""
        entry = original()[1][name]
        for shard in range(-(-known.N // entry.layout.shard)):
            variant = self.variant(name, shard)
            self.acknowledge(known.shard_part(name, entry, shard, variant), variant)

    def forget_repaired(self, sound_before: set[str]) -> None:
        """A repair has opened parts again; AssertionError where it did that to sound ones."""
        for part in self.parts():
            if part.name in self.acknowledged and not self.is_committed(part):
                assert part.name not in sound_before, f"{part.name} was sound, and repair removed its receipt"
                del self.acknowledged[part.name]
                self._forget({key for key in part.keys if is_receipt(key) or "/c/" in key})
            if part.index and self.on_disk(part.index) is None:
                self._forget({part.index})

    def _forget(self, keys: set[str]) -> None:
        for key in keys:
            self.pristine.pop(key, None)
        self.damaged -= keys

    def committed_keys(self) -> list[str]:
        """What damage can hit: everything acknowledged that is there."""
        return sorted(key for key in self.pristine if (self.root / key).is_file())

    def damage(self, key: str, change: Callable[[bytes], bytes | None]) -> None:
        """Change an object's bytes, or remove it."""
        path = self.root / key
        data = change(path.read_bytes())
        # Not in place: the power may be cut later, and what the disk remembers of this file is not the damage.
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        self.damaged.add(key)

    def restore(self, of: Callable[[str], bool] = lambda key: True) -> None:
        """Damaged objects from a backup."""
        for key in filter(of, sorted(self.still_damaged())):
            (self.root / key).parent.mkdir(parents=True, exist_ok=True)
            (self.root / key).unlink(missing_ok=True)
            (self.root / key).write_bytes(self.pristine[key])
