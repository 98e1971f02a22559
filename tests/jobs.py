"""Jobs of `cache-logits` inside the test's process: what the command does, without three seconds of imports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from logit_cache.job import CacheJob, open_job
from logit_cache.this_process import run_local
from storage import LogitCache
from storage.config import build_config
from storage.errors import LogitCacheError
from storage.reader import TeacherTargets
from storage.records import SparseTargets


def cache_logits(cache: Path, name: str, *teachers: Path, **fields: Any) -> tuple[TeacherTargets, SparseTargets]:
    """Run a job to its end; the entry and all its targets."""
    sources = [str(teacher) for teacher in teachers]
    given = {"cache": str(cache), "name": name, "teacher": sources, "context_tokens": 64, **fields}
    opened = open_job(build_config(CacheJob, given, {}, "cache-logits"))
    run_local(opened, opened.writer.pending())
    return whole(cache, name)


def whole(cache: Path, name: str) -> tuple[TeacherTargets, SparseTargets]:
    """An entry and all its targets."""
    opened = LogitCache.open(str(cache))
    targets = opened.teacher(name)
    return targets, targets.read(0, len(opened.tokens))


def refusal(cache: Path, name: str, *teachers: Path, **fields: Any) -> str:
    """The one line that a user gets for a job that is refused."""
    with pytest.raises(LogitCacheError) as caught:
        cache_logits(cache, name, *teachers, **fields)
    return str(caught.value)
