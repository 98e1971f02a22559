"""The demo: a recipe for two cores and some minutes, on text that every Python has: the source of its own library.

Text is scarce and epochs are many, as in the papers: the teachers stop improving after some of them, and a student of
their mean, of the same size, continues from there, since it learns a distribution from each token and not one id.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from logit_cache.recipes.commands import RecipeJob
from logit_cache.recipes.published import Recipe, llama, model
from logit_cache.recipes.run import RECORD, SOURCE, RecipeRun, check_folder, files_of
from storage.errors import InputError
from storage.files import local_path, replace_file

TRAIN_BYTES, HELD_OUT_BYTES = 400_000, 80_000
_NOT_LIBRARY = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "__phello__"}
_MOST_FILE_BYTES = 200_000


def demo_recipe() -> Recipe:
    """Three equal Llamas of 2.0M parameters: two teachers of other seeds than the student's."""
    network = llama(3, 192, 6, 512, kv_heads=2)
    one, two, student = (
        model(name, network, 2e-3, 8, epochs, decay=0.5) for name, epochs in (("one", 6), ("two", 6), ("student", 8))
    )
    return Recipe(
        name="demo",
        title="A student of two teachers",
        scale="tiny",
        vocabulary_size=2_048,
        teachers=(one, two),
        student=student,
        offset="fixed",
        temperature=1.0,
        alpha=0.0,
        loss_scale="token",
        kept_ids=64,
        scored=False,
    )


def run_demo(out: str, text: Sequence[str]) -> Path:
    """Run the remaining stages in the folder `out`; returns the path of the report.

    text: files or patterns to use instead of the library's source.
    Raises InputError for a folder of something else or of other text, and for a stage that fails.
    """
    folder = local_path(out)
    check_folder(folder)
    train, held_out = _split_lines(text) if text else _library()
    sources = {folder / SOURCE / "train.txt": train, folder / SOURCE / "held-out.txt": held_out}
    for path, content in sources.items():
        _write_same(path, content, (folder / RECORD).exists())
    own, other = (glob.escape(str(path)) for path in sources)
    fields = {"recipe": "demo", "scale": "tiny", "text": (own,), "eval_text": (other,), "out": str(folder)}
    return RecipeRun(RecipeJob.model_validate(fields), recipe=demo_recipe()).run()


def _library() -> tuple[str, str]:
    """Training and held-out text of the standard library: whole files, the same ones wherever its files are."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in library.rglob("*.py")
        if not _NOT_LIBRARY & set(path.relative_to(library).parts) and 0 < path.stat().st_size < _MOST_FILE_BYTES
    ]
    # Sorted by a hash of their names, so that both parts mix all of the library.
    files.sort(key=lambda path: hashlib.sha256(path.relative_to(library).as_posix().encode()).digest())
    held_out = _take(files, HELD_OUT_BYTES)
    return _joined(_take(files[len(held_out) :], TRAIN_BYTES)), _joined(held_out)


def _take(files: Sequence[Path], least_bytes: int) -> list[Path]:
    sizes_before = itertools.accumulate((path.stat().st_size for path in files), initial=0)
    return [path for path, before in zip(files, sizes_before, strict=False) if before < least_bytes]


def _joined(files: Sequence[Path]) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def _split_lines(patterns: Sequence[str]) -> tuple[str, str]:
    """The last sixth of the lines of each file is held out; long files are cut so that the demo stays short."""
    files = files_of("--text", patterns)
    parts: tuple[list[str], list[str]] = ([], [])
    for path in files:
        try:
            with path.open(encoding="utf-8") as file:
                lines = file.readlines((TRAIN_BYTES + HELD_OUT_BYTES) // len(files))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text at byte {error.start}: convert it first") from None
        cut = len(lines) - max(1, len(lines) * HELD_OUT_BYTES // (TRAIN_BYTES + HELD_OUT_BYTES))
        parts[0].extend(lines[:cut])
        parts[1].extend(lines[cut:])
    if not parts[0]:
        raise InputError("--text: too few lines to hold any out; give files of at least two lines")
    return "".join(parts[0]), "".join(parts[1])


def _write_same(path: Path, content: str, started: bool) -> None:
    """Write a text of the run. Raises InputError where a started run has another one."""
    data = content.encode()
    if path.exists() and path.read_bytes() == data:
        return
    if started:
        raise InputError(f"{path} is of other text: give another --out, or remove the old run to start again")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data)
