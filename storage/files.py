"""Small files on this machine, replaced by atomic rename."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".partial"  # suffix of temporary files, which no reader looks at


def replace_file(path: Path, data: bytes) -> None:
    """Replace a small file beside a cache or run: a killed writer leaves the old one or the new one, never half.

    Without fsync: only for files that a program can write again. A cache's own objects go through `LocalStore`.
    """
    temporary = path.with_name(path.name + PARTIAL)
    temporary.write_bytes(data)
    os.replace(temporary, path)
