"""A whole recipe in one folder: text → tokens → teachers → cache → student and control → scores → report.

    DIR/recipe.json          the requested run; another recipe in the same folder is refused
    DIR/logit-cache.lock     held while the recipe runs
    DIR/source/…             the demo's own copy of its text
    DIR/text/…               the cleaned text
    DIR/train, DIR/valid     token streams with the teachers' targets, one entry for each seed
    DIR/models/…             model configurations
    DIR/seed-S/…             teachers, student, control and live student of a seed, each with its scores beside it
    DIR/seed-S/sweeps/…      sweeps of schedules: NAME.yaml as asked, NAME the sweep's folder
    DIR/report.html          the report

Every stage is a public command in a process of its own and resumes where it stopped; so does the recipe.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from logit_cache.recipes import estimate
from logit_cache.recipes.commands import RecipeCommands, RecipeJob, entry_name
from logit_cache.recipes.machine import Machine, probe
from logit_cache.recipes.published import WINDOW_TOKENS, Recipe, find_recipe
from logit_cache.recipes.record import Caches, ModelRecord, RecipeRecord, SweepRecord
from logit_cache.recipes.stages import Pipeline
from logit_cache.recipes.sweeps import sweep_folder
from storage.errors import IdentityMismatch, InputError
from storage.files import PARTIAL, local_path, replace_file
from storage.locks import LOCK, locked
from storage.text import size

AGAIN = "run the same command again to resume"
RECORD = "recipe.json"
SOURCE = "source"
"""Folder of a run's own copy of its text; the demo has one."""

# Fields that a later start of the same run may change: seeds, a live student, sweeps are added, machines differ.
_GROWING = {"entries", "models", "sweeps", "micro_batches", "at_once", "threads"}


class RecipeRun:
    """A checked job: its files exist and its models fit into this machine. Nothing is written before `run`.

    Raises InputError for missing, overlapping or too little text and for too little memory or disk; `run` raises
    IdentityMismatch for a folder with another recipe's run.
    """

    def __init__(self, job: RecipeJob, machine: Machine | None = None, recipe: Recipe | None = None) -> None:
        """`recipe`: one that is not published; else the job names it."""
        recipe = recipe or find_recipe(job.recipe, job.scale)
        if job.stride_tokens is not None:
            recipe = recipe.model_copy(update={"stride_tokens": job.stride_tokens})
        if len(set(job.seeds)) < len(job.seeds):
            raise InputError(f"each seed can be given once; got {', '.join(map(str, job.seeds))}")
        if job.sweep_trials is not None and importlib.util.find_spec("optuna") is None:
            raise InputError("--sweep-trials needs optuna: pip install 'logit-cache[tune]'")
        self.job, self.recipe, self.folder = job, recipe, local_path(job.out)
        self.text, self.eval_text = files_of("--text", job.text), files_of("--eval-text", job.eval_text)
        _check_text(self.text, self.eval_text)
        self.machine = machine or probe()
        self.half = self.machine.device == "cuda"
        self.at_once, self.threads, self.batches = self._stored_division() or self._divide()
        sizes = _bytes_taken(self.text, recipe.text_bytes), _bytes_taken(self.eval_text, recipe.eval_text_bytes)
        v = recipe.vocabulary_size
        self.tokens = estimate.tokens_of(sizes[0], v), estimate.tokens_of(sizes[1], v)
        self.commands = RecipeCommands(
            costs=estimate.Costs(recipe, *self.tokens, _pair_tokens(job, v), self.batches, self.half),
            folder=self.folder,
            text=self.text,
            eval_text=self.eval_text,
            sizes=sizes,
            job=job,
        )
        self.stages = list(self.commands.stages())
        self._check_tokens()
        self._check_disk()

    @property
    def forecast(self) -> str:
        """The estimate as text; see `estimate`."""
        about = f"{self.recipe.title}: about {self.tokens[0]:,} tokens of training text"
        return f"{about}, {self.tokens[1]:,} held out\n{estimate.table(self.stages, self.machine)}"

    def run(self) -> Path:
        """Run the remaining stages; returns the path of the report.

        Raises InputError where another process runs the recipe in this folder.
        """
        check_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder, "another run of a recipe") as held:
            self._write_record()
            for name, network in self.recipe.models.items():
                _write_changed(self.folder / "models" / f"{name}.json", json.dumps(network.config, indent=1).encode())
            for path, content in self.commands.sweep_files():
                _write_changed(path, content)
            for seed in self.job.seeds:
                (self.folder / f"seed-{seed}").mkdir(exist_ok=True)
            Pipeline(self.stages, AGAIN, self.at_once, self.threads, (held,)).run()
        return self.folder / "report.html"

    def _divide(self) -> tuple[int, int, dict[str, int]]:
        """How many stages run at once, the threads of each, and micro-batches that fit into its share of the memory."""
        at_once, cores = self.machine.at_once, self.machine.cores
        if at_once > 1:
            with contextlib.suppress(InputError):
                batches = estimate.choose_batches(self.recipe, self.machine, self.job.live, at_once)
                return at_once, cores // at_once, batches
        return 1, cores, estimate.choose_batches(self.recipe, self.machine, self.job.live, 1)

    def _record(self) -> RecipeRecord:
        recipe, job = self.recipe, self.job
        settings = {
            "vocabulary": recipe.vocabulary_size,
            "window_tokens": WINDOW_TOKENS,
            "offset": recipe.offset,
            "stride_tokens": recipe.stride_tokens,
            "kept_ids": recipe.kept_ids,
            "temperature": recipe.temperature,
            "alpha": recipe.alpha,
            "loss_scale": recipe.loss_scale,
            "combine": "logit-mean",
            "precision": "float16, mixed" if self.half else "float32",
        }
        for model in (*recipe.teachers, recipe.student):
            settings |= {f"{model.name}.{name}": value for name, value in model.training.model_dump().items()}
        return RecipeRecord(
            recipe=recipe.name,
            scale=recipe.scale,
            title=recipe.title,
            settings=settings,
            text=tuple(map(self._recorded_path, self.text)),
            eval_text=tuple(map(self._recorded_path, self.eval_text)),
            pairs=job.pairs,
            pairs_limit=job.limit,
            micro_batches=self.batches,
            at_once=self.at_once,
            threads=self.threads,
            caches=Caches(train="train", held_out="valid"),
            entries=tuple(map(entry_name, job.seeds)),
            models=tuple(
                ModelRecord(
                    role=role, name=name, seed=seed, run=f"seed-{seed}/{name}", scores=f"seed-{seed}/{name}.scores.json"
                )
                for seed in job.seeds
                for name, role in self.commands.runs.items()
            ),
            sweeps=tuple(
                SweepRecord(
                    role=schedule.role,
                    name=schedule.name,
                    seed=job.seeds[0],
                    folder=sweep_folder(job.seeds[0], schedule),
                )
                for schedule in self.commands.schedules
            ),
        )

    def _recorded_path(self, file: Path) -> str:
        """Of a file in the run's own folder, which may be moved, the path in it."""
        return str(file.relative_to(self.folder) if file.is_relative_to(self.folder) else file)

    def _write_record(self) -> None:
        """Write recipe.json; a folder of another recipe is refused. Seeds and a live run may be added later."""
        record, stored = self._record(), self._stored()
        if stored is not None:
            pairs = {name: (getattr(stored, name), getattr(record, name)) for name in RecipeRecord.model_fields}
            differing = [
                f"{name}: {there!r} there, {requested!r} requested"
                for name, (there, requested) in pairs.items()
                if name not in _GROWING and there != requested
            ]
            if differing:
                raise IdentityMismatch(f"{self.folder} holds another run", differing, "Give another --out")
            joined = {
                name: tuple(dict.fromkeys([*pairs[name][0], *pairs[name][1]]))
                for name in ("entries", "models", "sweeps")
            }
            record = record.model_copy(update=joined)
        replace_file(self.folder / RECORD, (record.model_dump_json(indent=1) + "\n").encode())

    def _stored(self) -> RecipeRecord | None:
        path = self.folder / RECORD
        if not path.exists():
            return None
        try:
            return RecipeRecord.model_validate_json(path.read_bytes(), extra="ignore")
        except ValidationError:
            raise InputError(
                f"{path}: expected a recipe record of this version, found another: give another --out"
            ) from None

    def _stored_division(self) -> tuple[int, int, dict[str, int]] | None:
        """That of a started run: another one, chosen for the memory free now, would make it another run."""
        stored = self._stored()
        wanted = {*self.recipe.models, *(["live"] if self.job.live else [])}
        if stored is None or not wanted <= stored.micro_batches.keys():
            return None
        return stored.at_once, stored.threads, stored.micro_batches

    def _check_tokens(self) -> None:
        batch = max(model.training.batch for model in (*self.recipe.teachers, self.recipe.student))
        needed = 2 * batch * WINDOW_TOKENS
        if self.tokens[0] < needed:
            raise InputError(
                f"the training text is about {self.tokens[0]:,} tokens, fewer than two steps of {batch} windows "
                f"({needed:,}): give more text{'' if self.recipe.scale == 'tiny' else ', or a smaller --scale'}"
            )
        if self.tokens[1] < 2 * WINDOW_TOKENS:
            raise InputError(
                f"the held-out text is about {self.tokens[1]:,} tokens, fewer than two windows: give more of it"
            )

    def _check_disk(self) -> None:
        needed = estimate.peak_disk(self.stages, self.recipe)
        there = self.folder.absolute()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        done = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        if needed - done > free:
            raise InputError(
                f"{self.folder}: the run will take about {size(needed)}, and {size(free)} are free "
                f"there: give another --out{'' if self.recipe.scale == 'tiny' else ', or a smaller --scale'}"
            )


def _write_changed(path: Path, content: bytes) -> None:
    """An equal file is not rewritten: a finished recipe that is run again changes nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        replace_file(path, content)


def check_folder(folder: Path) -> None:
    """Raise InputError where a folder holds something else than a recipe's run."""
    try:
        names = {path.name for path in folder.iterdir() if path.suffix != PARTIAL}
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; expected a folder of a recipe: give another --out") from None
    if RECORD not in names and names - {LOCK, SOURCE}:
        raise InputError(f"{folder}: expected a recipe's run, found other files: give another --out")


def files_of(option: str, patterns: Sequence[str]) -> tuple[Path, ...]:
    """The files that paths and patterns match, in order, each once. Raises InputError for none or an empty one."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = local_path(pattern)
        # A file that is there is meant itself, whatever its name has of a pattern.
        matches = [path] if path.is_file() else map(Path, sorted(glob.glob(str(path), recursive=True)))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise InputError(f"{option} {pattern}: expected files of text, found none")
        found |= dict.fromkeys(files)
    for file in found:
        if not file.stat().st_size:
            raise InputError(f"{option} {file}: the file is empty: leave it out")
    return tuple(found)


def _bytes_taken(files: Sequence[Path], limit: int | None) -> int:
    sizes = [file.stat().st_size for file in files]
    return sum(sizes) if limit is None else sum(min(size, limit // len(files)) for size in sizes)


def _pair_tokens(job: RecipeJob, vocabulary_size: int) -> int:
    """Estimated number of tokens in the minimal pairs. Raises InputError where `evaluate` would, hours later."""
    if job.pairs is None:
        return 0
    from student.evaluation.minimal_pairs import read_pairs, sentences_of

    sentences = sentences_of(read_pairs(job.pairs, job.limit))
    return len(sentences) + estimate.tokens_of(sum(len(text.encode()) for text in sentences), vocabulary_size)


def _check_text(text: Sequence[Path], eval_text: Sequence[Path]) -> None:
    both = {file.resolve() for file in text} & {file.resolve() for file in eval_text}
    if both:
        raise InputError(f"{min(both)} is both --text and --eval-text: held-out text must not be trained on")
    for option, files in (("--text", text), ("--eval-text", eval_text)):
        names = [file.name for file in files]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise InputError(f"{option}: two files are called {min(twice)}: rename one of them")
