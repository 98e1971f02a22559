"""Small files on this machine, written so that a killed writer leaves the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".partial"


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file beside a cache or run so that a killed writer leaves the old one or the new one, never half.

    Without a sync: for what a program can write again. A cache's own objects go through `LocalStore`.
    """
    temporary = path.with_name(path.name + PARTIAL)
    temporary.write_bytes(data)
    os.replace(temporary, path)
