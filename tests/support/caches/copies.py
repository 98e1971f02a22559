"""push and pull in this process, with the fields of a CopyJob as arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from logit_cache.sharing import push_pull
from storage.transfer.copy import CopyJob, Delivery


def push(source: Path | str, target: Path | str, **options: Any) -> Delivery:
    return push_pull.push(*_job(source, target, options), **options)


def pull(source: Path | str, target: Path | str, **options: Any) -> Delivery:
    return push_pull.pull(*_job(source, target, options), **options)


def _job(source: Path | str, target: Path | str, options: dict[str, Any]) -> list[CopyJob]:
    fields = {name: options.pop(name) for name in CopyJob.model_fields if name in options}
    return [CopyJob(source=str(source), target=str(target), **fields)]
