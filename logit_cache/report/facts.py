"""Facts that the page lists, as rows of a name and its text: how a recipe was set up, and what identifies its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from logit_cache.describe import member_in_words, targets_in_words, windowing_in_words
from logit_cache.report.findings import RecipeFindings
from logit_cache.report.folders import RunFolder
from logit_cache.report.numbers import distinct, scalar
from storage.text import counted
from student.report import TrainingReport
from student.sweep.record import SweepReport

Facts = list[tuple[str, str]]


def setup(findings: RecipeFindings) -> Facts:
    """Teachers, targets, corpus and student of the distillation."""
    made = [entry.found for entry in findings.entries if entry.found is not None]
    if made:
        rows = [
            ("teachers", distinct(_teachers(found) for found in made)),
            ("entries", ", ".join(entry.name for entry in findings.entries)),
            ("targets", distinct(targets_in_words(found["targets"]) for found in made)),
            ("teachers' windows", distinct(windowing_in_words(found["windowing"]) for found in made)),
        ]
    else:
        rows = [("entries", ", ".join(f"{entry.name} (not cached yet)" for entry in findings.entries) or "none")]
    if findings.cache is None:
        rows.append(("corpus", "not tokenized yet"))
    else:
        corpus, tokenizer = findings.cache.corpus, findings.cache.tokenizer
        rows += [
            ("corpus", f"{counted(corpus.positions, 'token')}, {counted(corpus.documents, 'document')}"),
            ("text", counted(corpus.text_bytes, "byte")),
            ("vocabulary", counted(tokenizer.vocabulary_size, "id")),
        ]
    students = [run for series in findings.of("student") for _, run in series.runs]
    return rows + [(name, distinct(map(of, students)) or "not measured") for name, of in _OF_STUDENTS.items()]


def settings(findings: RecipeFindings) -> Facts:
    return [(name, scalar(value)) for name, value in findings.recipe.settings.items()]


def sweep_settings(sweep: SweepReport) -> Facts:
    """The settings that all trials share."""
    rows = [("cache", sweep.cache.rstrip("/").split("/")[-1]), ("metric", sweep.metric), ("direction", sweep.direction)]
    for name, value in sweep.job.items():
        if isinstance(value, dict):
            rows += [(f"{name}.{inner}", scalar(item)) for inner, item in value.items()]
        else:
            rows.append((name, scalar(value)))
    return rows


def recipe_digests(findings: RecipeFindings) -> Facts:
    """sha256 of the data and weights of a recipe."""
    rows = []
    if findings.cache is not None:
        rows.append(("token stream", findings.cache.corpus.stream_sha256))
        rows.append(("tokenizer", findings.cache.tokenizer.fingerprint))
    for entry in findings.entries:
        if entry.found is not None:
            rows.append((f"record of {entry.name}", entry.found["record_sha256"]))
            for member in entry.found["teacher"]:
                digest = member.get("weights_sha256", "not verified")
                rows.append((f"weights of {member['source']} in {entry.name}", digest))
    for name in sorted({name for run in findings.runs for name in run.provenance}):
        rows.append((f"runs' {name}", distinct(run.provenance.get(name) for run in findings.runs)))
    return rows


def run_digests(runs: Sequence[RunFolder]) -> Facts:
    """sha256 of the data that single runs read."""
    return [(f"{one.name}: {name}", value) for one in runs for name, value in sorted(one.run.provenance.items())]


def software(runs: Sequence[TrainingReport], others: Iterable[dict[str, str]] = ()) -> Facts:
    """Library versions of runs and of `others`; devices and process counts of the runs."""
    libraries = [*(run.libraries for run in runs), *others]
    names = sorted({name for versions in libraries for name in versions})
    return [
        *((name, distinct(versions.get(name) for versions in libraries)) for name in names),
        ("devices of the runs", distinct(run.device for run in runs) or "not recorded"),
        ("processes per run", distinct(run.processes for run in runs)),
    ]


def _scheduled(name: str) -> Callable[[TrainingReport], str | None]:
    """A field of the loss that may change during a run."""

    def shown(run: TrainingReport) -> str | None:
        first, last = getattr(run.job, name), getattr(run.job, f"{name}_end")
        return f"{first:g}" + ("" if last is None else f", linear to {last:g} at the last step")

    return shown


def _windows(run: TrainingReport) -> str:
    share = "" if run.available is None else f", in {run.available.positions / run.available.of:.1%} of the text"
    return counted(run.job.window_tokens, "token") + share


def _learns_from(run: TrainingReport) -> str:
    teachers = run.job.teachers
    if len(teachers) == 1 and teachers[0].sources is None:
        return teachers[0].name
    found = []
    for teacher in teachers:
        taught = "" if teacher.sources is None else f", {run.taught_by(teacher)}"
        found.append(f"{teacher.name} (weight {teacher.weight:g}{taught})")
    return ", ".join(found)


def _teachers(found: dict[str, Any]) -> str:
    members = [member_in_words(member) for member in found["teacher"]]
    if found["combine"] == "single":
        return members[0]
    shares = ", ".join(f"{weight:g}" for weight in found["weights"])
    return f"{found['combine']} of {' and '.join(members)}, weights {shares}"


_OF_STUDENTS: dict[str, Callable[[TrainingReport], Any]] = {
    "student": lambda run: f"{run.job.model.rstrip('/').split('/')[-1]}, {run.parameters:,} parameters",
    "learns from": _learns_from,
    "loss": lambda run: run.job.loss,
    "alpha": _scheduled("alpha"),
    "temperature": _scheduled("temperature"),
    "tail": lambda run: run.job.tail,
    "student's windows": _windows,
    "windows per step": lambda run: f"{run.windows_per_step:,}",
    "steps": lambda run: f"{run.steps:,}",
}
