"""Folders of finished work as frozen data: recipes (recipe.json), sweeps (sweep.json), training runs (report.json).

Only the fields that a report shows are read, and unknown fields are ignored, so that records of older and newer
versions can be read too. The folders are not trusted: sizes are bounded, and paths in a recipe cannot leave its folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage.errors import InputError
from storage.files import local_path

MAX_JSON_BYTES = 1 << 27
_MOST_SECONDS = 1e12

Role = Literal["teacher", "student", "control", "live"]
Scalar = bool | int | float | str | None


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class TeacherWeight(_Read):
    """A teacher entry and its weight in the mixture."""

    name: str
    weight: float = 1.0


class Job(_Read):
    """The job of a training run; see `student.job.StudentJob`."""

    teachers: tuple[TeacherWeight, ...] = ()
    model: str
    window_tokens: int | None = None
    offset: str | None = None
    loss: str | None = None
    mix: float | None = None
    tail: str | None = None
    alpha: float | None = None
    alpha_end: float | None = None
    temperature: float | None = None
    loss_scale: str | None = None
    seed: int = 0
    training: dict[str, Any] = Field(default_factory=dict)


class KL(_Read):
    """KL(teacher || student), nats per token."""

    nats: float
    lower_bound: bool


class HeldOut(_Read):
    """Held-out metrics: cross-entropy in nats per token, ECE as a fraction."""

    tokens: int
    cross_entropy: float
    perplexity: float
    bits_per_byte: float | None = None
    ece: float
    kl: dict[str, KL] = Field(default_factory=dict)


class PeakMemory(_Read):
    """Peak memory of a run, in bytes."""

    process_bytes: int | None = None
    device_bytes: int | None = None


class TrainingRun(_Read):
    """report.json of `train-student` and `train-teacher`; see `student.report.TrainingReport`."""

    kind: Literal["training report"]
    job: Job
    provenance: dict[str, str] = Field(default_factory=dict)
    isolated_documents: bool | None = None
    parameters: int
    steps: int
    windows_per_step: int | None = None
    tokens_seen: int
    seconds: float = Field(ge=0, le=_MOST_SECONDS)
    resumed_from_step: int = 0
    device: str = ""
    processes: int = 1
    libraries: dict[str, str] = Field(default_factory=dict)
    train_log: list[dict[str, Any]] = Field(default_factory=list)
    eval_log: list[dict[str, Any]] = Field(default_factory=list)
    held_out: HeldOut | None = None
    peak_memory: PeakMemory | None = None


class ScoredText(_Read):
    """Held-out metrics of `logit-cache evaluate`; losses and KL in nats per token."""

    tokens: int
    cross_entropy_per_token: float
    perplexity_per_token: float
    bits_per_byte: float | None = None
    ece: float
    kl: dict[str, KL] = Field(default_factory=dict)


class Group(_Read):
    """Accuracy on the pairs of a group, as a fraction."""

    pairs: int
    accuracy: float


class Pairs(_Read):
    """Scores on minimal pairs; `mean_over_groups` is the BLiMP score of the BabyLM papers."""

    pairs: int
    mean_over_groups: float
    groups: dict[str, Group] = Field(default_factory=dict)
    paradigms: dict[str, Any] = Field(default_factory=dict)


class Scores(_Read):
    """JSON of `logit-cache evaluate --out`; see `student.evaluation.evaluate.EvaluationReport`."""

    kind: Literal["evaluation report"]
    held_out: ScoredText | None = None
    minimal_pairs: Pairs | None = None


class _ModelRecord(_Read):
    role: Role
    name: str
    seed: int
    run: str
    scores: str | None = None


class Caches(_Read):
    """Paths of a recipe's caches, relative to its folder."""

    train: str | None = None
    held_out: str | None = None


class Recipe(_Read):
    """The record of a recipe, recipe.json."""

    kind: Literal["recipe"]
    format: Literal[1]
    recipe: str
    scale: str
    title: str
    settings: dict[str, Any] = Field(default_factory=dict)
    caches: Caches = Field(default_factory=Caches)
    entries: tuple[str, ...] = ()
    models: tuple[_ModelRecord, ...]


class Trial(_Read):
    """One trial of a sweep; `value` is the sweep's metric, None where it was not measured."""

    number: int
    state: Literal["complete", "pruned", "failed", "running"]
    value: float | None = None
    parameters: dict[str, Scalar] = Field(default_factory=dict)
    seconds: float | None = Field(None, ge=0, le=_MOST_SECONDS)
    steps: int | None = None
    error: str | None = None


class Sweep(_Read):
    """The record of a sweep, sweep.json."""

    kind: Literal["sweep"]
    format: Literal[1]
    title: str
    cache: str | None = None
    metric: str
    direction: Literal["minimize", "maximize"]
    backend: str | None = None
    seconds: float | None = Field(None, ge=0, le=_MOST_SECONDS)
    job: dict[str, Any] = Field(default_factory=dict)
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Model:
    """One model of a recipe; `run` and `scores` are None until they exist."""

    role: Role
    name: str
    seed: int
    run: TrainingRun | None
    scores: Scores | None


@dataclass(frozen=True)
class RecipeFolder:
    """A recipe with its finished runs and scores. The caches are paths, which may not exist yet."""

    name: str
    recipe: Recipe
    models: tuple[Model, ...]
    train_cache: Path | None
    held_out_cache: Path | None


@dataclass(frozen=True)
class SweepFolder:
    """A folder with a sweep."""

    name: str
    sweep: Sweep


@dataclass(frozen=True)
class RunFolder:
    """A folder with a single training run."""

    name: str
    run: TrainingRun


Folder = RecipeFolder | SweepFolder | RunFolder
_Record = TypeVar("_Record", bound=_Read)


def read_folder(directory: str | Path) -> Folder:
    """Read a folder. Raises InputError for one that is missing, has none of the three records, or a damaged one."""
    path = local_path(directory)
    if not path.is_dir():
        raise InputError(
            f"{directory}: expected a folder of a recipe, a sweep or a training run, found no folder there"
        )
    # The path may be "." or end in "..": the report shows the folder's own name.
    name = path.resolve().name.encode("utf-8", "replace").decode()
    if (path / "recipe.json").is_file():
        return _read_recipe(path, name)
    if (path / "sweep.json").is_file():
        return SweepFolder(name, _read(path / "sweep.json", Sweep))
    if (path / "report.json").is_file():
        return RunFolder(name, _read(path / "report.json", TrainingRun))
    raise InputError(
        f"{directory}: expected recipe.json, sweep.json or report.json in it, found none of them: give the folder of a "
        "recipe, of a sweep, or of a run of train-student or train-teacher that is finished"
    )


def _read_recipe(path: Path, name: str) -> RecipeFolder:
    file = path / "recipe.json"
    recipe = _read(file, Recipe)
    models = []
    for number, record in enumerate(recipe.models):
        where = f"{file}, model {number} ({record.name!r})"
        report = _inside(path, record.run, where) / "report.json"
        scores = None if record.scores is None else _inside(path, record.scores, where)
        models.append(
            Model(
                role=record.role,
                name=record.name,
                seed=record.seed,
                run=_read(report, TrainingRun) if report.is_file() else None,
                scores=_read(scores, Scores) if scores is not None and scores.is_file() else None,
            )
        )
    seen = set()
    for model in models:
        key = (model.role, model.name, model.seed)
        if key in seen:
            raise InputError(f"{file}: {model.role} {model.name!r} of seed {model.seed} is listed twice: keep one")
        seen.add(key)
    caches = [
        None if cache is None else _inside(path, cache, f"{file}, caches")
        for cache in (recipe.caches.train, recipe.caches.held_out)
    ]
    return RecipeFolder(name, recipe, tuple(models), *caches)


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
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "the file"
        found = repr(first["input"])
        shown = found if len(found) <= 60 else found[:60] + "…"
        literal = kind.model_fields["kind"].annotation
        expected = getattr(literal, "__args__", ("record",))[0]
        raise InputError(
            f"{file}: expected a {expected}; {name}: {first['msg']} (found {shown}): write it again"
        ) from None
