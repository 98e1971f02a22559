"""The commands of a recipe: the title and the arguments of each stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from logit_cache.recipes.estimate import Costs
from logit_cache.recipes.published import WINDOW_TOKENS, Model, Scale
from logit_cache.recipes.record import Role
from logit_cache.recipes.stages import Cost, Stage
from logit_cache.recipes.sweeps import SWEPT, Schedule, schedules, sweep_file, sweep_folder
from storage.config import Settings

# A line every few seconds of a small model, and still a curve of 15 points for the shortest schedule.
_LOGGING_STEPS = 20


class RecipeJob(Settings):
    """The arguments of `logit-cache recipe`.

    text, eval_text   files or patterns of training and of held-out text
    pairs             folder of minimal pairs; `limit`: the first so many of each paradigm only
    seeds             each trains its own teachers, student and control
    live              also train the student with live teachers, for comparison
    stride_tokens     from one window of the teachers to the next when they are cached; the recipe's by default
    sweep_trials      also search the schedules, by so many trials of each, with the first seed
    """

    recipe: str
    scale: Scale
    text: tuple[str, ...] = Field(min_length=1)
    eval_text: tuple[str, ...] = Field(min_length=1)
    out: str
    pairs: str | None = None
    limit: int | None = Field(None, ge=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    live: bool = False
    stride_tokens: int | None = Field(None, ge=1, le=WINDOW_TOKENS)
    sweep_trials: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class RecipeCommands:
    """The commands that run a recipe on given text in a folder.

    text, eval_text   the files that the job's patterns match; `sizes`: the bytes that are taken of each
    """

    costs: Costs
    folder: Path
    text: tuple[Path, ...]
    eval_text: tuple[Path, ...]
    sizes: tuple[int, int]
    job: RecipeJob

    def stages(self) -> Iterator[Stage]:
        train, valid = str(self.folder / "train"), str(self.folder / "valid")
        yield from self._text_stages(train, valid)
        for seed in self.job.seeds:
            yield from self._seed_stages(seed, train, valid)
        yield from self._sweep_stages()
        report = self.folder / "report.html"
        yield Stage("report", ("logit-cache", "report", str(self.folder), "--out", str(report)), self.costs.text(0))

    def _text_stages(self, train: str, valid: str) -> Iterator[Stage]:
        cleaned = {}
        recipe, (train_bytes, valid_bytes) = self.costs.recipe, self.sizes
        for part, files, share, size in (
            ("train", self.text, recipe.text_bytes, train_bytes),
            ("valid", self.eval_text, recipe.eval_text_bytes, valid_bytes),
        ):
            out = self.folder / "text" / part
            cut = [] if share is None else ["--limit-bytes", str(max(1, share // len(files)))]
            yield Stage(
                f"{'held-out' if part == 'valid' else 'training'} text, cleaned",
                ("logit-cache", "clean", *_repeated("--text", map(str, files)), "--out", str(out), *cut),
                self.costs.text(size),
            )
            cleaned[part] = _repeated("--text", (str(out / file.name) for file in files))
        ids = str(recipe.vocabulary_size)
        yield Stage(
            f"token stream, with a new tokenizer of {ids} ids",
            ("logit-cache", "tokenize", *cleaned["train"], "--train-tokenizer", ids, "--out", train),
            self.costs.text(train_bytes, passes=2),
        )
        yield Stage(
            "held-out token stream, same tokenizer",
            ("logit-cache", "tokenize", *cleaned["valid"], "--tokenizer", f"{train}/tokenizer", "--out", valid),
            self.costs.text(valid_bytes),
        )

    def _seed_stages(self, seed: int, train: str, valid: str) -> Iterator[Stage]:
        costs, recipe = self.costs, self.costs.recipe
        of_seed = f" (seed {seed})" if len(self.job.seeds) > 1 else ""
        home = self.folder / f"seed-{seed}"
        entry = entry_name(seed)
        caches = ("--cache", train, "--eval-cache", valid)
        data = (*caches, "--window-tokens", str(WINDOW_TOKENS), "--offset", recipe.offset)
        teachers = [str(home / teacher.name) for teacher in recipe.teachers]
        for number, teacher in enumerate(recipe.teachers, 1):
            own = ("--seed", str(len(recipe.teachers) * seed + number))
            yield _training_stage(
                f"teacher {teacher.name}: training from scratch{of_seed}",
                ("train-teacher", *data, *self._training(teacher, "loss"), *own),
                costs.training(teacher),
                home / teacher.name,
                f"teachers {seed}",
            )
        members = (*_repeated("--teacher", teachers), "--combine", "logit-mean")
        for text, cache, tokens in (
            ("training", train, costs.train_tokens),
            ("held-out", valid, costs.held_out_tokens),
        ):
            targets = ("-k", str(recipe.kept_ids), "--target-temperature", f"{recipe.temperature:g}")
            windows = ("--context-tokens", str(WINDOW_TOKENS), "--stride-tokens", str(recipe.stride_tokens))
            yield Stage(
                f"teachers: run once over the {text} stream{of_seed}",
                ("cache-logits", "--cache", cache, *members, "--name", entry, *targets, *windows),
                costs.caching(tokens),
                beside=f"entries {seed}",
            )
        objective = (
            *("--temperature", f"{recipe.temperature:g}", "--alpha", f"{recipe.alpha:g}"),
            *("--loss-scale", recipe.loss_scale),
        )
        students = [
            ("student", "student from the cache, no teacher loaded", "train-student", ("--teacher", entry, *objective)),
            ("control", "the same student without distillation", "train-student", ()),
        ]
        if self.job.live:
            # The longest first, so that the others run beside it.
            live = (*_repeated("--live-teacher", teachers), "--combine", "logit-mean", *objective)
            students.insert(0, ("live", "the same student with live teachers", "train-teacher", live))
        for name, title, program, learns_from in students:
            best_by = "distillation_loss" if learns_from else "loss"
            settings = self._training(recipe.student, best_by, live=name == "live")
            yield _training_stage(
                f"{title}{of_seed}",
                (program, *data, "--seed", str(seed), *settings, *learns_from),
                costs.training(recipe.student, live=name == "live"),
                home / name,
                f"students {seed}",
            )
        if not recipe.scored:
            return
        measured: tuple[str, ...] = ("--cache", valid, "--teacher", entry, "--window-tokens", str(WINDOW_TOKENS))
        if self.job.pairs is not None:
            measured += ("--pairs", self.job.pairs)
            measured += () if self.job.limit is None else ("--limit", str(self.job.limit))
        for name in self.runs:
            scores = home / f"{name}.scores.json"
            yield Stage(
                f"scores of {name}{of_seed}",
                ("logit-cache", "evaluate", str(home / name), *measured, "--out", str(scores)),
                costs.scoring(recipe.models.get(name, recipe.student.network)),
                makes=scores,
                beside=f"scores {seed}",
            )

    def _sweep_stages(self) -> Iterator[Stage]:
        for schedule in self.schedules:
            file, trials = self._sweep_file(schedule), self.job.sweep_trials or 0
            yield Stage(
                f"schedules of the {schedule.title}: a sweep of {trials} trials",
                ("train-student", "--sweep", str(file)),
                self.costs.sweep(schedule.model, trials),
                beside="sweeps",
            )

    @property
    def schedules(self) -> list[Schedule]:
        """Those to search."""
        return [] if self.job.sweep_trials is None else schedules(self.costs.recipe)

    def _sweep_file(self, schedule: Schedule) -> Path:
        return self.folder / f"{sweep_folder(self.job.seeds[0], schedule)}.yaml"

    def sweep_files(self) -> Iterator[tuple[Path, bytes]]:
        """The files of the sweeps: the runs of student and control, but for what a trial decides."""
        recipe, seed = self.costs.recipe, self.job.seeds[0]
        for schedule in self.schedules:
            path, distilled = self._sweep_file(schedule), schedule.role == "student"
            training = self._training_fields(schedule.model, "distillation_loss" if distilled else "loss")
            job: dict[str, Any] = {
                "cache": str(self.folder / "train"),
                "eval_cache": str(self.folder / "valid"),
                "window_tokens": WINDOW_TOKENS,
                "offset": recipe.offset,
                "seed": seed,
                "model": str(self.folder / "models" / f"{schedule.model.name}.json"),
                "output_dir": str(path.with_suffix("")),
                "training": {name: value for name, value in training.items() if name not in SWEPT},
            }
            if distilled:
                objective = {name: getattr(recipe, name) for name in ("temperature", "alpha", "loss_scale")}
                job |= {"teachers": [entry_name(seed)], **objective}
            yield path, sweep_file(schedule, job, self.job.sweep_trials or 1, self.job.pairs, self.job.limit)

    @property
    def runs(self) -> dict[str, Role]:
        """The role of each model, by the name of its folder."""
        roles: dict[str, Role] = {teacher.name: "teacher" for teacher in self.costs.recipe.teachers}
        roles |= {"student": "student", "control": "control"}
        return roles | {"live": "live"} if self.job.live else roles

    def _training(self, model: Model, best_by: str, live: bool = False) -> tuple[str, ...]:
        """Options of a training command: network and schedule; `best_by` is the held-out loss that selects an epoch."""
        fields = self._training_fields(model, best_by, live)
        settings = (f"{name}={str(value).lower() if value is True else value}" for name, value in fields.items())
        return ("--model", str(self.folder / "models" / f"{model.name}.json"), *_repeated("--set", settings))

    def _training_fields(self, model: Model, best_by: str, live: bool = False) -> dict[str, Any]:
        schedule, micro = model.training, self.costs.batches["live" if live else model.name]
        return {
            "learning_rate": schedule.learning_rate,
            "num_train_epochs": schedule.epochs,
            "warmup_steps": schedule.warmup_steps,
            "weight_decay": schedule.weight_decay,
            "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": schedule.batch // micro,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": best_by,
            "logging_steps": _LOGGING_STEPS,
        } | ({"fp16": True} if self.costs.half else {})


def entry_name(seed: int) -> str:
    return f"ensemble-{seed}"


def _training_stage(title: str, arguments: tuple[str, ...], cost: Cost, out: Path, beside: str) -> Stage:
    """A training command that writes a model and its report into `out`."""
    return Stage(title, (*arguments, "--output-dir", str(out)), cost, out / "report.json", beside)


def _repeated(option: str, values: Any) -> tuple[str, ...]:
    return tuple(part for value in values for part in (option, value))
