"""Progress and speed of a caching job, from the store alone: names of receipts, and a few receipts themselves.

Only the store is read, so this works beside any number of workers, and after they have ended. The cost is bounded,
whatever the cache's size::

    complete entry     known by its receipt index: one small read (of a large index only the end, not the whole)
    otherwise          the names in the folder of receipts, listed once as a stream: a byte of memory for each shard
    receipts           the newest 64, by the store's modification times; more, up to 1,024, only where so many workers
                       commit that 64 receipts span only a moment
    leases, failures   their names are listed with the receipts; at most 256 leases and 8 failures are read
    started shards     the names in one array's folder; not listed in entries of more than 100,000 shards

Legend: a receipt records when its shard was committed (to the second, by its worker's clock) and how many seconds the
worker took for it, from its first window to its receipt.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from statistics import median
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logit_cache.caching.commit_rate import Commit, joint_rate, own_rate, patience, without_pauses
from storage.cache.failures import FailedShard, Failures, failed_shard
from storage.cache.leases import leased_shard, leases_in
from storage.cache.reader import LogitCache
from storage.cache.receipts import Receipts
from storage.errors import CorruptCache, InputError
from storage.format.manifest.receipts import ShardReceipt
from storage.format.sealing import unseal

_RECEIPTS, _MOST_RECEIPTS = 64, 1_024
_AT_ONCE = 16
_MOST_SHARDS_LISTED = 100_000
_MOST_LEASES, _MOST_FAILURES = 256, 8
# An index up to this length is read and checked whole: 240,000 shards.
_WHOLE_INDEX_BYTES = 16 << 20
_INDEX_TAIL_BYTES = 4_096

State = Literal["complete", "in progress", "stalled", "not begun", "not known"]
Known = dict[str, ShardReceipt]


@dataclass(frozen=True)
class HostStatus:
    """Commits of one host among the recent ones; `positions_per_second` of one of its workers, by its own seconds."""

    host: str
    shards: int
    last_commit: str
    positions_per_second: float | None


@dataclass(frozen=True)
class EntryStatus:
    """One teacher entry. A field is None where the store does not show it, or nothing has been committed yet.

    shards_in_flight      shards that a worker holds a lease on at this moment, where the store supports leases
    shards_failed         shards that failed permanently and were not committed since; failed: the first few of them
    shards_begun          shards with objects or a writer's temporary files, and no receipt: being written at this
                          moment, or left by a worker that was killed
    positions_per_second  of all workers together, over the recent commits; `..._per_worker` by their own seconds
    seconds_left          at that rate
    shard_seconds         a worker's time for one shard, the median of the recent ones
    receipts_read         number of receipts behind these figures
    """

    name: str
    state: State
    complete: bool
    positions: int
    positions_done: int | None
    share: float | None
    shards: int
    shards_done: int | None
    shards_missing: int | None
    shards_begun: int | None
    shards_in_flight: int | None = 0
    shards_failed: int | None = 0
    failed: tuple[FailedShard, ...] = ()
    positions_per_second: float | None = None
    positions_per_second_per_worker: float | None = None
    seconds_left: float | None = None
    shard_seconds: float | None = None
    last_commit: str | None = None
    seconds_since_last_commit: float | None = None
    hosts: tuple[HostStatus, ...] = ()
    receipts_read: int = 0


def status_of(url: str, names: Sequence[str], now: float, known: Known | None = None) -> list[EntryStatus]:
    """The status of the named entries of a cache, or of all. `now` is in seconds since 1970.

    `known` caches receipts between calls, as they do not change. Raises CacheNotFound, and CorruptCache for a damaged
    receipt.
    """
    cache = LogitCache.open(url)
    kept: Known = {} if known is None else known
    return [_entry_status(cache.teacher(name).receipts, name, now, kept) for name in names or cache.teachers]


def _entry_status(receipts: Receipts, name: str, now: float, known: Known) -> EntryStatus:
    first, shards = receipts.first_array, receipts.shards
    positions, size = first.shape[0], first.layout.shard
    started: int | None = 0
    leased: list[int] = []
    failed: list[int] = []
    covered, done = positions, shards
    if _is_complete(receipts):
        # Workers take shards in order, so the highest numbers include every worker's last commit.
        newest = list(range(shards - 1, max(-1, shards - 1 - _RECEIPTS), -1))
    else:
        try:
            committed, newest, leased, failed = _scan_receipts(receipts)
        except InputError:  # a plain web server
            return EntryStatus(name, "not known", False, positions, None, None, shards, None, None, None, None, None)
        done = int(committed.sum())
        # The last shard may be shorter.
        covered = done * size - int(committed[-1]) * (size * shards - positions)
        started = _started(receipts, committed)
    in_flight = _held(receipts, leased)
    found, read = _recent_commits(receipts, newest, known)
    bare = EntryStatus(
        name=name,
        state="complete" if done == shards else "in progress" if done or started or in_flight else "not begun",
        complete=done == shards,
        positions=positions,
        positions_done=covered,
        share=covered / positions,
        shards=shards,
        shards_done=done,
        shards_missing=shards - done,
        shards_begun=started,
        shards_in_flight=in_flight,
        shards_failed=len(failed),
        failed=_notes_of(receipts, failed),
        receipts_read=read,
    )
    return _with_commits(bare, found, now) if found else bare


def _with_commits(bare: EntryStatus, found: list[Commit], now: float) -> EntryStatus:
    last = found[-1].time
    since = max(0.0, now - last)
    rate = joint_rate(found)
    stalled = not bare.complete and not bare.shards_in_flight and since > patience(found)
    assert bare.positions_done is not None
    return replace(
        bare,
        state="stalled" if stalled else bare.state,
        positions_per_second=rate,
        positions_per_second_per_worker=own_rate(found),
        seconds_left=None if bare.complete or not rate else (bare.positions - bare.positions_done) / rate,
        shard_seconds=median(commit.seconds for commit in found) or None,
        last_commit=_iso(last),
        seconds_since_last_commit=since,
        hosts=_hosts(found),
    )


def _is_complete(receipts: Receipts) -> bool:
    """Whether the receipt index exists. A large one takes seconds and much memory to parse, so only its end is read."""
    size = receipts.store.size(receipts.index_key)
    if size is not None and size > _WHOLE_INDEX_BYTES:
        (tail,) = receipts.store.read_ranges(receipts.index_key, [(size - _INDEX_TAIL_BYTES, size)])
        if receipts.record_sha256.encode() in tail:
            return True
    return receipts.index is not None


def _scan_receipts(receipts: Receipts) -> tuple[NDArray[np.bool_], list[int], list[int], list[int]]:
    """Which shards have a receipt; the newest of them first; and of those without one, which have a lease, or a note
    that they failed permanently.

    Newest by the store's modification times, or by the highest numbers where it has none.
    """
    committed = np.zeros(receipts.shards, dtype=bool)
    newest: list[tuple[float, int]] = []
    leased: list[int] = []
    failed: list[int] = []
    for name, written in receipts.store.listing(receipts.folder):
        shard = receipts.shard_of(name)
        if shard is None:
            for noted, into in ((leased_shard(name), leased), (failed_shard(name), failed)):
                if noted is not None and noted < receipts.shards:
                    into.append(noted)
            continue
        committed[shard] = True
        item = (written or 0.0, shard)
        if len(newest) < _MOST_RECEIPTS:
            heapq.heappush(newest, item)
        else:
            heapq.heappushpop(newest, item)
    leased, failed = (sorted(shard for shard in noted if not committed[shard]) for noted in (leased, failed))
    return committed, [shard for _, shard in sorted(newest, reverse=True)], leased, failed


def _held(receipts: Receipts, leased: Sequence[int]) -> int:
    """Number of leases held by live workers (a killed one leaves its own behind); beyond `_MOST_LEASES`, all count."""
    leases = leases_in(receipts.store, receipts.folder)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return sum(pool.map(leases.is_held, leased[:_MOST_LEASES])) + len(leased[_MOST_LEASES:])


def _notes_of(receipts: Receipts, failed: Sequence[int]) -> tuple[FailedShard, ...]:
    failures = Failures(receipts.store, receipts.folder)
    return tuple(note for note in map(failures.read, failed[:_MOST_FAILURES]) if note is not None)


def _started(receipts: Receipts, committed: NDArray[np.bool_]) -> int | None:
    if receipts.shards > _MOST_SHARDS_LISTED:
        return None
    shards = set()
    # A writer starts with the first array; below its name, a shard is an object or a folder.
    folder = f"{receipts.folder.removesuffix('receipts')}{receipts.first_array.name}/c"
    for name, _ in receipts.store.listing(folder):
        number = name.partition(".")[0]
        if number.isdecimal() and int(number) < receipts.shards and not committed[int(number)]:
            shards.add(int(number))
    return len(shards)


def _recent_commits(receipts: Receipts, newest: Sequence[int], known: Known) -> tuple[list[Commit], int]:
    """The latest commits without a long pause between them, oldest first, and the number of receipts read.

    With few workers 64 receipts span many shard times; with more than 64 workers, less than one, so more are read.
    """
    count = _RECEIPTS
    while True:
        commits = sorted(_commits(receipts, newest[:count], known), key=lambda commit: commit.time)
        recent = without_pauses(commits)
        span = recent[-1].time - recent[0].time if recent else 0.0
        enough = len(recent) < len(commits) or not recent or span >= 3 * median(item.seconds for item in recent)
        if enough or count >= len(newest):
            return recent, min(count, len(newest))
        count *= 4


def _commits(receipts: Receipts, shards: Sequence[int], known: Known) -> Iterable[Commit]:
    # A known receipt is not read again: only a repair rewrites one.
    wanted = [shard for shard in shards if receipts.store.where(receipts.key(shard)) not in known]
    with ThreadPoolExecutor(1 if receipts.store.local_path is not None else _AT_ONCE) as pool:
        for receipt in pool.map(lambda shard: _receipt(receipts, shard), wanted):
            if receipt is not None:
                known[receipts.store.where(receipts.key(receipt.shard))] = receipt
    for shard in shards:
        receipt = known.get(receipts.store.where(receipts.key(shard)))
        time = None if receipt is None else _seconds(receipt.written_at)
        if receipt is not None and time is not None:
            yield Commit(time, receipt.stop - receipt.start, receipt.seconds, receipt.host)


def _receipt(receipts: Receipts, shard: int) -> ShardReceipt | None:
    """A shard's receipt, checked without the receipt index, which is large in an entry of millions of shards."""
    key = receipts.key(shard)
    try:
        data = receipts.store.read_json(key)
    except FileNotFoundError:  # re-opened by a repair since the names were listed
        return None
    receipt = unseal(ShardReceipt, data, receipts.store.where(key))
    expected = (receipts.record_sha256, shard, *receipts.first_array.shard_range(shard))
    if (receipt.record_sha256, receipt.shard, receipt.start, receipt.stop) != expected:
        where = receipts.store.where(key)
        raise CorruptCache(f"{where}: it is the receipt of something else; run logit-cache verify")
    return receipt


def _hosts(commits: Sequence[Commit]) -> tuple[HostStatus, ...]:
    by_host: dict[str, list[Commit]] = {}
    for commit in commits:
        by_host.setdefault(commit.host, []).append(commit)
    found = [
        HostStatus(host, len(own), _iso(max(commit.time for commit in own)), own_rate(own))
        for host, own in by_host.items()
    ]
    return tuple(sorted(found, key=lambda item: (-item.shards, item.host)))


def _seconds(written_at: str) -> float | None:
    """Seconds since 1970 of a receipt's time; None for a text that is no time."""
    try:
        time = datetime.fromisoformat(written_at)
    except ValueError:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def as_json(url: str, entries: Sequence[EntryStatus]) -> dict[str, Any]:
    """The output of `--json`: the cache, and each entry's status by its name."""
    return {
        "url": url,
        "complete": is_complete(entries),
        "teachers": {
            entry.name: {name: value for name, value in asdict(entry).items() if name != "name"} for entry in entries
        },
    }


def is_complete(entries: Sequence[EntryStatus]) -> bool:
    """Whether there are entries, and all of them are complete."""
    return bool(entries) and all(entry.complete for entry in entries)
