"""A disk that stops a writer at any of its steps, and that can lose power.

`Disk` counts what a process does to the files below a folder: create, write, sync, link, rename, unlink, mkdir. Before
a given step the process dies: `Crash` is raised there and at every further step, because a killed process cleans
nothing up, whatever its `finally` clauses say.

It also remembers what has not been synced. `cut_power` undoes any part of that: a file that was not synced is cut
short, and the names that were made, changed or removed in a folder that was not synced are as they were before. Few
file systems are that harsh; POSIX allows it.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

_open, _os_open, _fsync, _link, _replace, _unlink, _mkdir, _rmdir = (
    io.open, os.open, os.fsync, os.link, os.replace, os.unlink, os.mkdir, os.rmdir,
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Crash(BaseException):
    """The process was killed here. No `except Exception` outlives it."""


class Disk:
    """The files below `root`. `graves` is a folder beside it on the same file system, for what may have to come back.

    steps    what the last process did, one line each
    """

    def __init__(self, root: Path, graves: Path) -> None:
        self.root = root
        self.steps: list[str] = []
        self._graves = graves
        self._buried = 0
        self._dies_at: int | None = None
        self._dead = False
        self._die: Callable[[], object] | None = None
        self._changes: list[tuple[int, Callable[[], None]]] = []  # inode of a folder, and how to undo a change of it
        self._unsynced: dict[int, Path] = {}  # inode of a file, and a name of it in `graves`
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def process(self, dies_at: int | None = None, die: Callable[[], object] | None = None) -> Iterator[None]:
        """A process whose steps are counted from 0 and that dies before step `dies_at`; `die` instead of Crash.

        Syncs are counted, not done: they cost time, and nothing here depends on them.
        """
        self.steps.clear()
        self._dies_at, self._dead, self._die = dies_at, False, die
        with contextlib.ExitStack() as patches:
            for module, name, ours in (
                (io, "open", self.open),
                (builtins, "open", self.open),
                (os, "open", self.os_open),
                (os, "fsync", self.fsync),
                (os, "link", self.link),
                (os, "replace", self.replace),
                (os, "rename", self.replace),
                (os, "unlink", self.unlink),
                (os, "remove", self.unlink),
                (os, "mkdir", self.mkdir),
                (os, "rmdir", self.rmdir),
            ):
                patches.enter_context(mock.patch.object(module, name, ours))
            yield

    def cut_power(self, survives: Callable[[], bool]) -> None:
        """Lose what was not synced, except what `survives` spares. Call it while no process runs."""
        for _, undo in reversed(self._changes):
            if not survives():
                undo()
        for path in self._unsynced.values():
            if not survives():
                os.truncate(path, path.stat().st_size // 2)
        self._changes.clear()
        self._unsynced.clear()
        shutil.rmtree(self._graves, ignore_errors=True)

    def step(self, what: str, path: Any, last_act: Callable[[], object] | None = None) -> bool:
        """Whether the path is below the root; the process dies here if it is time, after its last act."""
        absolute = os.path.abspath(path)
        if not absolute.startswith(f"{self.root}/") and absolute != str(self.root) and not self._dead:
            return False
        with self._lock:
            if self._dead or len(self.steps) == self._dies_at:
                if last_act is not None and not self._dead:
                    last_act()
                self._dead = True
                if self._die is not None:
                    self._die()
                raise Crash(f"before {what} {absolute}")
            self.steps.append(f"{what} {os.path.relpath(absolute, self.root)}")
        return True

    def open(self, path: Any, mode: str = "r", *others: Any, **named: Any) -> Any:
        if isinstance(path, int) or not set(mode) & set("wxa+") or not self.step("create", path):
            return _open(path, mode, *others, **named)
        file = _open(path, mode, *others, **named)
        with self._lock:
            self._unsynced[os.stat(path).st_ino] = self._bury(path)
            self._changed(path, lambda: Path(path).unlink(missing_ok=True))
        return _Written(file, lambda half: self.step("write", path, half))

    def os_open(self, path: Any, flags: int, *others: Any, **named: Any) -> int:
        # A lease is in nobody's way when it is lost, or left behind.
        lease = not isinstance(path, int) and os.fspath(path).endswith(".claim")
        watched = not isinstance(path, int) and not lease and os.path.abspath(path).startswith(f"{self.root}/")
        assert not (flags & _WRITING and watched), f"{path}: opened for writing in a way that is not followed here"
        return _os_open(path, flags, *others, **named)

    def fsync(self, descriptor: int) -> None:
        self.step("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
        inode = os.fstat(descriptor).st_ino
        with self._lock:
            self._unsynced.pop(inode, None)
            self._changes[:] = [change for change in self._changes if change[0] != inode]

    def link(self, source: Any, target: Any, **named: Any) -> None:
        watched = self.step("link", target)
        _link(source, target, **named)
        if watched:
            self._changed(target, lambda: Path(target).unlink(missing_ok=True))

    def replace(self, source: Any, target: Any) -> None:
        if not self.step("replace", target):
            return _replace(source, target)
        if os.path.isdir(source):
            _replace(source, target)
            return self._changed(target, lambda: _replace(target, source) if os.path.isdir(target) else None)
        moved, before = self._bury(source), self._bury(target) if os.path.lexists(target) else None
        _replace(source, target)

        def undo() -> None:
            Path(target).unlink(missing_ok=True)
            if before is not None:
                _bring_back(before, target)
            _bring_back(moved, source)

        return self._changed(target, undo)

    def unlink(self, path: Any, **named: Any) -> None:
        if named.get("dir_fd") is not None or not os.path.lexists(path):
            # Of a whole folder at once, which nothing relies on; or of nothing.
            self.step("unlink", "/")
            return _unlink(path, **named)
        if not self.step("unlink", path):
            return _unlink(path, **named)
        kept = self._bury(path)
        _unlink(path, **named)
        return self._changed(path, lambda: _bring_back(kept, path))

    def mkdir(self, path: Any, *others: Any, **named: Any) -> None:
        watched = self.step("mkdir", path)
        _mkdir(path, *others, **named)
        if watched:
            self._changed(path, lambda: shutil.rmtree(path, ignore_errors=True))

    def rmdir(self, path: Any, **named: Any) -> None:
        self.step("rmdir", "/" if named.get("dir_fd") is not None else path)
        _rmdir(path, **named)

    def _bury(self, path: Any) -> Path:
        """Another name for a file, so that its bytes can come back."""
        with self._lock:
            if not self._graves.exists():
                _mkdir(self._graves)
            self._buried += 1
            grave = self._graves / str(self._buried)
        _link(path, grave)
        return grave

    def _changed(self, path: Any, undo: Callable[[], None]) -> None:
        with self._lock:
            self._changes.append((os.stat(os.path.dirname(os.path.abspath(path))).st_ino, undo))


def _bring_back(grave: Path, path: Any) -> None:
    if os.path.isdir(os.path.dirname(path)) and not os.path.lexists(path):
        _link(grave, path)


class _Written:
    """A file open for writing; each write is a step, and a process that dies there has written half of it."""

    def __init__(self, file: Any, step: Callable[[Callable[[], object]], object]) -> None:
        self._file = file
        self._step = step

    def write(self, data: bytes) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._step(half)
        return int(self._file.write(data))

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
