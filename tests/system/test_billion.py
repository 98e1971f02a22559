"""A cache of 10^9 positions opens in a second and in a hundred megabytes, and every receipt of it is real.

The objects are real, too, but few: each of the 15,259 shards' names is a hard link to one of some encoded objects, and
its receipt lists that object's digests. So the folder is as large as a billion positions make it, and the disk holds
some hundred megabytes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.caches.billion import SHARD, N, head, make_cache, token_of
from support.commands import TESTS, environment

from storage import LogitCache


@pytest.mark.slow
def test_a_billion_positions_open_in_a_second(tmp_path: Path) -> None:
    try:
        check(tmp_path / "cache")
    finally:
        shutil.rmtree(tmp_path / "cache")


def check(path: Path) -> None:
    record = make_cache(path)
    seen = [cost(path, position) for position in (731_234_567, N - 1, 0)]
    for found in seen:
        print(f"\n{found['seconds']:.3f} s, {found['bytes'] / 1e6:.1f} MB beyond the imports: {found['laps']}")
    targets = LogitCache.open(str(path)).teacher("a")
    assert targets.receipts.shards == 15_259
    for found, position in zip(seen, (731_234_567, N - 1, 0), strict=True):
        shard, row = divmod(position, SHARD)
        assert found["missing"] == []
        assert found["statistics"] == N
        assert found["token_ids"] == head(shard)[row].tolist()
        assert found["token"] == token_of(position)
        assert found["bytes"] < 100e6
    # Five times what it has to be on a machine that does nothing else.
    assert min(found["seconds"] for found in seen) < 5.0
    assert seen[0]["stored"] == sum(
        digest["bytes"]
        for shard in (0, 1, targets.receipts.shards - 1)
        for digest in json.loads((path / f"teachers/a/receipts/{shard:08d}.json").read_bytes())["objects"].values()
        for _ in range({0: 7_629, 1: 7_629}.get(shard, 1))
    )
    assert record.corpus.positions == N


def cost(path: Path, position: int) -> dict[str, Any]:
    """What a fresh process needs."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "support/programs/billion.py"), str(path), str(position)],
        capture_output=True, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
