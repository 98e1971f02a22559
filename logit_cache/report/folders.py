"""Folders of finished work: recipes (recipe.json), sweeps (sweep.json), training runs (report.json).

The records are those of the commands that write them. Fields of newer versions are ignored. The folders are not
trusted: sizes are bounded, and paths in a recipe cannot leave its folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from logit_cache.recipes.record import RecipeRecord, Role
from storage.errors import InputError
from storage.files import local_path
from student.evaluation.report import EvaluationReport, PairScores
from student.report import PASSAGE_FILE, Passage, TrainingReport
from student.sweep.record import SweepReport

MAX_JSON_BYTES = 1 << 27


@dataclass(frozen=True)
class Model:
    """One model of a recipe; `run`, `scores` and `passage` are None until they exist, `passage` in earlier runs too."""

    role: Role
    name: str
    seed: int
    run: TrainingReport | None
    scores: EvaluationReport | None
    passage: Passage | None = None

    @property
    def pairs(self) -> PairScores | None:
        return None if self.scores is None else self.scores.minimal_pairs


@dataclass(frozen=True)
class ScheduleSweep:
    """A recipe's sweep of the schedule of one of its models."""

    role: Role
    name: str
    seed: int
    report: SweepReport


@dataclass(frozen=True)
class RecipeFolder:
    """A recipe with its finished runs and scores, and the sweeps that have begun. The caches are paths, which may not
    exist yet."""

    recipe: RecipeRecord
    models: tuple[Model, ...]
    train_cache: Path | None
    held_out_cache: Path | None
    sweeps: tuple[ScheduleSweep, ...]


@dataclass(frozen=True)
class RunFolder:
    name: str
    run: TrainingReport


Folder = RecipeFolder | SweepReport | RunFolder
_Record = TypeVar("_Record", bound=BaseModel)


def read_folder(directory: str | Path) -> Folder:
    """Read a folder. Raises InputError for one that is missing, has none of the three records, or a damaged one."""
    path = local_path(directory)
    if not path.is_dir():
        raise InputError(
            f"{directory}: expected a folder of a recipe, a sweep or a training run, found no folder there"
        )
    if (path / "recipe.json").is_file():
        return _read_recipe(path)
    if (path / "sweep.json").is_file():
        return _read(path / "sweep.json", SweepReport)
    if (path / "report.json").is_file():
        # The path may be "." or end in "..": the report shows the folder's own name.
        name = path.resolve().name.encode("utf-8", "replace").decode()
        return RunFolder(name, _read(path / "report.json", TrainingReport))
    raise InputError(
        f"{directory}: expected recipe.json, sweep.json or report.json in it, found none of them: give the folder of a "
        "recipe, of a sweep, or of a run of train-student or train-teacher that is finished"
    )


def _read_recipe(path: Path) -> RecipeFolder:
    file = path / "recipe.json"
    recipe = _read(file, RecipeRecord)
    models = []
    for number, record in enumerate(recipe.models):
        where = f"{file}, model {number} ({record.name!r})"
        run = _inside(path, record.run, where)
        report, passage = run / "report.json", run / PASSAGE_FILE
        scores = None if record.scores is None else _inside(path, record.scores, where)
        models.append(
            Model(
                role=record.role,
                name=record.name,
                seed=record.seed,
                run=_read(report, TrainingReport) if report.is_file() else None,
                scores=_read(scores, EvaluationReport) if scores is not None and scores.is_file() else None,
                passage=_read(passage, Passage) if report.is_file() and passage.is_file() else None,
            )
        )
    seen = set()
    for model in models:
        key = (model.role, model.name, model.seed)
        if key in seen:
            raise InputError(f"{file}: {model.role} {model.name!r} of seed {model.seed} is listed twice: keep one")
        seen.add(key)
    train, held_out = (
        None if cache is None else _inside(path, cache, f"{file}, caches")
        for cache in (recipe.caches.train, recipe.caches.held_out)
    )
    sweeps = []
    for number, swept in enumerate(recipe.sweeps):
        found = _inside(path, swept.folder, f"{file}, sweep {number} ({swept.name!r})") / "sweep.json"
        if found.is_file():
            sweeps.append(ScheduleSweep(swept.role, swept.name, swept.seed, _read(found, SweepReport)))
    return RecipeFolder(recipe, tuple(models), train, held_out, tuple(sweeps))


def _inside(folder: Path, relative: str, where: str) -> Path:
    """A relative path of a recipe, joined to its folder. Raises InputError for one that leaves the folder."""
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts or "://" in relative or "\0" in relative or not parts.parts:
        raise InputError(f"{where}: expected a path inside the folder of the recipe, found {relative!r}: correct it")
    return folder / parts


def _whole(text: str) -> int | float:
    """An integer; one of more than 18 digits, which no counter reaches, becomes a float to keep arithmetic bounded."""
    return int(text) if len(text) <= 18 else float(text)


def _read(file: Path, kind: type[_Record]) -> _Record:
    """A JSON file as a record. Raises InputError for one that is too large, not JSON, or not of this kind."""
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise InputError(f"{file}: expected at most {MAX_JSON_BYTES:,} bytes of JSON, found {size:,}")
    try:
        data = json.loads(file.read_bytes(), parse_int=_whole)
        # A lone surrogate cannot be encoded in the page.
        json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: expected JSON, found something else ({error}): is it partially written?") from None
    try:
        return kind.model_validate(data, extra="ignore")
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "the file"
        found = repr(first["input"])
        shown = found if len(found) <= 60 else found[:60] + "…"
        expected = kind.model_fields["kind"].default
        raise InputError(
            f"{file}: expected a {expected}; {name}: {first['msg']} (found {shown}): write it again"
        ) from None
