"""Anything may happen to a cache in any order; every read gives the truth or an error that says why not.

A hypothesis state machine writes the token stream and three entries, one of them of version 2, with one worker or
several, of the same and of other bytes; copies the cache to another folder and back; kills all of them before any step
that they take on the disk; cuts the power; flips, truncates, extends, deletes, copies and swaps files; verifies,
repairs, resumes. After every rule, each part of both caches is read through a freshly opened one. What was acknowledged
and not damaged must be readable; what was damaged must not pass for data.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.caches import known
from support.caches.model import CacheModel, is_receipt, original
from support.crash_disk import Crash, Disk

from storage import LogitCache
from storage.cache.verify import verify
from storage.cache.writer import EntryWriter
from storage.errors import LogitCacheError
from storage.transfer.copy import CopyJob, prepare

pytestmark = pytest.mark.usefixtures("encoded_once")
NAMES = st.sampled_from(["a", "b", "v2"])
VARIANTS = st.integers(0, 1)
SLOTS = st.integers(0, 1)
PICK = st.integers(0, 10_000)
# Most caches are the one that workers write to; the other is its copy.
SITES = st.sampled_from(["home", "home", "away"])
# As many steps as the longest of the acts takes; with more, it comes to its end.
DIES_AT = st.none() | st.integers(0, 140)
STRAYS = ("teachers/a/kept/c/3", "tokens/c/3", "teachers/a/token_ids/c/0/1", "teachers/c", "receipts/x", "notes.txt")


class CacheMachine(RuleBasedStateMachine):
    """`home` is the cache that workers write to, `away` one that is only copied to and from."""

    @initialize(begun=st.sampled_from(["complete", "stream", "nothing"]))
    def start(self, begun: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="machine-"))
        top = self.folder / "disk"
        top.mkdir()
        self.disk = Disk(top, self.folder / "graves")
        self.sites = {name: CacheModel(top / name) for name in ("home", "away")}
        self.home = self.sites["home"]
        self.workers: dict[int, tuple[str, EntryWriter]] = {}
        self.seen: dict[tuple[str, str], list[bytes | None]] = {}
        if begun != "nothing":
            self.tokenise(None)
        if begun == "complete":
            self.resume("a", None)
            self.resume("b", None)
            self.resume("v2", None)

    @contextlib.contextmanager
    def process(self, dies_at: int | None, *touched: CacheModel, may_refuse: bool = False) -> Iterator[list[str]]:
        """A process that may be killed, and that ends with an error only where something is wrong."""
        ended: list[str] = []
        faulty = may_refuse or any(site.still_damaged() for site in touched)
        try:
            with self.disk.process(dies_at):
                yield ended
        except Crash:
            for site in touched:
                site.interrupted = True
            ended.append("killed")
        except LogitCacheError:
            if not faulty:
                raise  # an error, though nothing is damaged
            ended.append("refused")

    # What workers do.

    @precondition(
        lambda self: self.home.damaged or any(p.name not in self.home.acknowledged for p in known.corpus_parts())
    )
    @rule(dies_at=DIES_AT)
    def tokenise(self, dies_at: int | None) -> None:
        with self.process(dies_at, self.home) as ended:
            known.write_stream(self.home.root)
        if not ended:
            for part in known.corpus_parts():
                self.home.acknowledge(part)

    @precondition(lambda self: self.home.has_stream)
    @rule(slot=SLOTS, name=NAMES, dies_at=DIES_AT)
    def open_worker(self, slot: int, name: str, dies_at: int | None) -> None:
        with self.process(dies_at, self.home) as ended:
            self.workers[slot] = (name, EntryWriter.open(str(self.home.root), name, original()[1][name]))
        if ended:
            self.workers.pop(slot, None)

    @precondition(lambda self: self.home.has_stream)
    @rule(slot=SLOTS, name=NAMES, shard=st.integers(0, 2), variant=VARIANTS, dies_at=DIES_AT)
    def commit(self, slot: int, name: str, shard: int, variant: int, dies_at: int | None) -> None:
        if slot not in self.workers:
            self.open_worker(slot, name, None)
        if slot not in self.workers:
            return
        name, writer = self.workers[slot]
        shard %= writer.shards
        entry = original()[1][name]
        receipt = f"teachers/{name}/receipts/{shard:08d}.json"
        there = self.home.on_disk(receipt)
        other = there is not None and self.home.variant(name, shard) != variant
        with self.process(dies_at, self.home, may_refuse=other) as ended:
            writer.sampling_order(known.order)
            writer.commit(shard, known.rows(entry, shard, variant))
        if "killed" in ended:
            del self.workers[slot]
        if not ended:
            assert self.home.still_damaged() or not other, "another worker's shard was committed over"
            assert there is None or self.home.on_disk(receipt) == there, "a receipt was replaced"
            self.home.acknowledge(known.shard_part(name, entry, shard, variant), variant)

    @precondition(lambda self: self.workers)
    @rule(slot=SLOTS, dies_at=DIES_AT)
    def finish(self, slot: int, dies_at: int | None) -> None:
        if slot not in self.workers:
            return
        name, writer = self.workers[slot]
        with self.process(dies_at, self.home) as ended:
            writer.finish()
        if "killed" in ended:
            del self.workers[slot]
        index = f"teachers/{name}/receipts/index.json"
        if not ended and index not in self.home.still_damaged() and (data := self.home.on_disk(index)) is not None:
            self.home.pristine[index] = data

    @precondition(lambda self: self.home.has_stream)
    @rule(name=NAMES, dies_at=DIES_AT)
    def resume(self, name: str, dies_at: int | None) -> None:
        """The whole command: what it leaves is complete, whoever wrote it."""
        with self.process(dies_at, self.home) as ended:
            known.complete(EntryWriter.open(str(self.home.root), name, original()[1][name]))
        if not ended and not self.home.still_damaged():
            self.home.acknowledge_entry(name)

    @precondition(lambda self: any(site.exists for site in self.sites.values()))
    @rule(push=st.booleans(), dies_at=DIES_AT)
    def copy(self, push: bool, dies_at: int | None) -> None:
        source, target = (self.sites[name] for name in (("home", "away") if push else ("away", "home")))
        before = known.contents(source.root) if source.exists else {}
        theirs = {part.name: part for part in source.parts()}
        strange = not source.has_stream or any(
            # Other bytes of a shard are refused; so is a receipt that its index does not list.
            target.is_committed(part) and target.variant(*numbered(part)) != source.variant(*numbered(part))
            for part in theirs.values()
            if part.name.startswith(("a/", "b/", "v2/")) and source.is_committed(part)
        )
        strange |= any(part.name not in source.acknowledged for part in known.corpus_parts())
        for site in (source, target):
            strange |= any(not site.index_fits(part) for part in site.parts() if part.name in site.acknowledged)
        with (
            self.process(dies_at, source, target, may_refuse=strange) as ended,
            prepare(CopyJob(source=str(source.root), target=str(target.root), workers=1)) as transfer,
        ):
            transfer.deliver()
        assert (known.contents(source.root) if source.exists else {}) == before
        if not ended:
            for name, part in theirs.items():
                if source.is_sound(part):
                    target.acknowledge(part, source.acknowledged[name])
            # What is damaged at the source is refused or left behind, never handed on.
            known_there = [part for part in target.parts() if part.name in target.acknowledged]
            if not target.still_damaged() and all(target.index_fits(part) for part in known_there):
                assert verify(str(target.root), deep=True, workers=1).problems == []

    # What happens to caches.

    @precondition(lambda self: self.home.root.exists())
    @rule(spared=st.sampled_from([0.0, 0.5]), seed=PICK)
    def cut_power(self, spared: float, seed: int) -> None:
        self.workers.clear()
        chance = random.Random(seed)
        self.disk.cut_power(lambda: chance.random() < spared)
        for site in self.sites.values():
            site.interrupted = True

    @precondition(lambda self: self.home.has_stream)
    @rule(site=SITES, pick=PICK, how=st.sampled_from(["flip", "flip", "empty", "halve", "cut", "extend", "delete"]))
    def damage(self, site: str, pick: int, how: str) -> None:
        def changed(data: bytes) -> bytes | None:
            at = pick // 7 % max(1, len(data))
            flipped = data[:at] + bytes([data[at] ^ 1 << pick % 8]) + data[at + 1 :] if data else b"\0"
            changes = {"flip": flipped, "empty": b"", "halve": data[: len(data) // 2], "cut": data[:-1]}
            return changes[how] if how in changes else None if how == "delete" else data + b"\0"

        if keys := self.sites[site].committed_keys():
            self.sites[site].damage(keys[pick % len(keys)], changed)

    @precondition(lambda self: self.home.has_stream)
    @rule(site=SITES, pick=PICK, other=PICK, both=st.booleans())
    def swap(self, site: str, pick: int, other: int, both: bool) -> None:
        """Two objects of one array or of two of the same name, or two receipts; or one is copied over the other."""
        model = self.sites[site]
        keys = [key for key in model.committed_keys() if "/c/" in key or is_receipt(key)]
        if not keys:
            return
        first = keys[pick % len(keys)]
        alike = [key for key in keys if kind(key) == kind(first)]
        second = alike[other % len(alike)]
        a, b = (model.root / first).read_bytes(), (model.root / second).read_bytes()
        model.damage(second, lambda data: a)
        if both:
            model.damage(first, lambda data: b)

    @precondition(lambda self: self.home.has_stream)
    @rule(site=SITES, stray=st.sampled_from(STRAYS))
    def put_stray(self, site: str, stray: str) -> None:
        """An object that nothing lists, at a key where a reader could look."""
        path = self.sites[site].root / stray
        if self.sites[site].exists and path.parent.is_dir():
            path.write_bytes(b"stray")

    @precondition(lambda self: any(site.damaged for site in self.sites.values()))
    @rule(site=SITES)
    def restore(self, site: str) -> None:
        self.sites[site].restore()
        assert not self.sites[site].still_damaged()

    # What people look at.

    @precondition(lambda self: self.home.has_stream)
    @rule(site=SITES, deep=st.booleans())
    def verify(self, site: str, deep: bool) -> None:
        if self.sites[site].has_stream:
            before = known.contents(self.sites[site].root)
            found = self.look(self.sites[site], deep)
            assert known.contents(self.sites[site].root) == before
            assert found is None or found.repaired == []

    def look(self, site: CacheModel, deep: bool, repair: bool = False) -> Any:
        """`verify`, and whether it finds what is damaged and nothing else; None where there is no root record."""
        damaged = site.still_damaged()
        # A part whose receipt is gone, with no index to tell, is one that was never committed.
        committed = [part for part in site.parts() if part.name in site.acknowledged and site.is_committed(part)]
        broken = {key for part in committed for key in part.keys & damaged}
        fit = all(site.index_fits(part) for part in committed)
        try:
            found = verify(str(site.root), deep=deep, repair=repair, workers=1)
        except LogitCacheError:
            assert "zarr.json" in damaged
            return None
        if broken and deep:
            assert not found.sound, f"{sorted(broken)} are damaged, and verify finds nothing"
        if not damaged and fit:
            assert found.sound, found.problems
        return found

    @precondition(lambda self: self.home.has_stream)
    @rule(site=SITES, dies_at=DIES_AT)
    def repair(self, site: str, dies_at: int | None) -> None:
        """Sound shards stay; damaged ones are open again."""
        model = self.sites[site]
        if not model.has_stream:
            return
        sound = {part.name for part in model.parts() if model.is_sound(part)}
        with self.process(dies_at, model):
            self.look(model, True, repair=True)
        model.forget_repaired(sound)

    @invariant()
    def every_read_is_the_truth_or_an_error(self) -> None:
        for name, site in getattr(self, "sites", {}).items():
            if site.exists:
                self.read_all(name, site)
            else:
                assert not site.acknowledged or "zarr.json" in site.still_damaged()

    def read_all(self, name: str, site: CacheModel) -> None:
        try:
            opened = LogitCache.open(str(site.root))
        except LogitCacheError:
            assert "zarr.json" in site.still_damaged()
            return
        for part in site.parts():
            # What has not changed since the last rule reads as it did then.
            state = [site.on_disk(key) for key in (*sorted(part.keys), part.index) if key]
            if self.seen.get((name, part.name)) == state:
                continue
            self.seen[name, part.name] = state
            error = part.outcome(opened)
            if site.is_sound(part):
                assert error is None, f"{part.name} was acknowledged, nobody damaged it, and now: {error}"
                if part.name.startswith("v2/"):
                    assert known.order_part().outcome(opened) is None, "ids were sampled in an order that is gone"

    def teardown(self) -> None:
        """Whatever happened: a backup of the records, a repair and the same commands make it whole."""
        if not hasattr(self, "sites"):
            return
        try:
            self.make_whole(self.home)
            if self.sites["away"].has_stream:
                self.check_repaired(self.sites["away"])
        finally:
            shutil.rmtree(self.folder)

    def make_whole(self, site: CacheModel) -> None:
        if site.has_stream:
            self.check_repaired(site)
        with self.process(None):
            known.write_whole(site.root)
        found = verify(str(site.root), deep=True, workers=1)
        assert (found.problems, found.missing) == ([], {})
        leftovers = {address for address in found.leftovers if not address.endswith(".partial")}
        assert leftovers <= {f"{site.root}/{key}" for key in STRAYS}
        opened = LogitCache.open(str(site.root))
        for part in site.parts():
            assert part.outcome(opened) is None, part.outcome(opened)

    def check_repaired(self, site: CacheModel) -> None:
        """After a backup of what has no shards, a repair leaves nothing damaged."""
        site.restore(lambda key: not is_receipt(key) and "/c/" not in key)
        verify(str(site.root), deep=True, repair=True, workers=1)
        assert verify(str(site.root), deep=True, workers=1).problems == []


def kind(key: str) -> str:
    """The array whose object a key is, of whichever entry; or what else it is."""
    return key.split("/c/")[0].rsplit("/", 1)[-1] if "/c/" in key else "receipt"


def numbered(part: known.Part) -> tuple[str, int]:
    name, _, shard = part.name.partition("/")
    return name, int(shard)


def run_machine(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_every_read_is_the_truth_or_an_error() -> None:
    run_machine(examples=20, steps=15)


@pytest.mark.soak
def test_every_read_is_the_truth_or_an_error_at_length() -> None:
    run_machine(examples=300, steps=25)
