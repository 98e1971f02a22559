"""The tables of a report about a recipe, from its findings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from logit_cache.report.cells import NOT_MEASURED, Cell, Table, distinct, number, over_seeds, scalar, software, words
from logit_cache.report.findings import (
    Entry,
    Metric,
    RecipeFindings,
    best_epoch,
    kl_mean,
    kl_of,
    pairs_mean,
    run_seconds,
)
from logit_cache.report.folders import Model, TrainingRun
from logit_cache.report.statistics import Spread, spread
from logit_cache.text import columns
from storage.progress import duration

_BLIMP = (12, 67)


def is_blimp(models: Iterable[Model]) -> bool:
    """Whether the minimal pairs are BLiMP's, judged by their 12 groups and 67 paradigms."""
    pairs = [m.scores.minimal_pairs for m in models if m.scores is not None and m.scores.minimal_pairs is not None]
    return bool(pairs) and all((len(p.groups), len(p.paradigms)) == _BLIMP for p in pairs)


def models_table(findings: RecipeFindings) -> Table:
    """All models: size, tokens seen, and every held-out metric."""

    def held_out(name: str) -> Metric:
        return lambda model: findings.held_out(model).get(name)

    rows = []
    for series in findings.series:
        sizes = {run.parameters for _, run in series.runs}
        bound = any(kl.lower_bound for model in series.models for kl in kl_of(model).values())
        kl = over_seeds(series.spread(kl_mean), 4)
        rows.append(
            (
                Cell(series.label, style=series.style),
                Cell(f"{len(series.runs)} of {len(series.models)}"),
                number(max(sizes), 2, " M", 1e-6) if sizes else NOT_MEASURED,
                over_seeds(
                    series.spread(lambda m: None if m.run is None else m.run.tokens_seen), 2, " M", 1e-6, exact=True
                ),
                over_seeds(series.spread(findings.loss), 4),
                over_seeds(series.spread(best_epoch), 1),
                over_seeds(series.spread(held_out("perplexity")), 2),
                over_seeds(series.spread(held_out("bits_per_byte")), 4),
                over_seeds(series.spread(held_out("ece")), 2, " %", 100),
                Cell("≥ " + kl.text, kl.below) if bound else kl,
                over_seeds(series.spread(pairs_mean), 1, " %", 100),
            )
        )
    pairs = "BLiMP" if is_blimp(findings.models) else "minimal pairs"
    source = "logit-cache evaluate" if findings.scored_by_evaluate else "the runs' own reports"
    note = (
        f"Mean over seeds; ± is their standard deviation. Loss and KL in nats per token; metrics from {source}. "
        "The best epoch is that of the kept weights. KL is that from a student's teachers, ≥ where all ids beyond the "
        f"stored ones count as one outcome. {pairs[0].upper()}{pairs[1:]}: unweighted mean over groups."
    )
    head = ("model", "seeds", "parameters", "tokens seen", "held-out loss", "best epoch")
    metrics = ("perplexity", "bits per byte", "ECE", "KL to teachers", pairs)
    return Table("Models", (*head, *metrics), tuple(rows), note=note, wide=True)


def summary(findings: RecipeFindings) -> tuple[str, ...]:
    """The models in lines for a terminal: size, held-out loss, best epoch, time."""
    rows: list[tuple[str, ...]] = [("", "parameters", "held-out loss, nats", "best epoch", "seconds")]
    for series in findings.series:
        sizes = {run.parameters for _, run in series.runs}
        cells = (
            number(max(sizes), 2, " M", 1e-6) if sizes else NOT_MEASURED,
            over_seeds(series.spread(findings.loss), 4),
            over_seeds(series.spread(best_epoch), 1),
            over_seeds(series.spread(run_seconds), 0),
        )
        rows.append((series.label, *(f"{cell.text} {cell.below}".rstrip() for cell in cells)))
    return (*columns(rows), "")


def settings_tables(findings: RecipeFindings) -> list[Table]:
    """Teachers, targets, corpus and student of the distillation, and the recipe's own settings."""
    students = [run for series in findings.of("student") for _, run in series.runs]
    rows: list[tuple[str, str]] = []
    made = [entry.found for entry in findings.entries if entry.found is not None]
    if made:
        rows.append(("teachers", distinct(_teachers(found) for found in made)))
        rows.append(("entries", ", ".join(entry.name for entry in findings.entries)))
        rows.append(("targets", distinct(_targets(found["targets"]) for found in made)))
        rows.append(("teachers' windows", distinct(_windowing(found["windowing"]) for found in made)))
    else:
        rows.append(("entries", ", ".join(f"{entry.name} (not cached yet)" for entry in findings.entries) or "none"))
    if findings.corpus is not None:
        corpus = findings.corpus
        rows.append(
            (
                "corpus",
                f"{corpus['tokens']:,} tokens, {corpus['documents']:,} document{'s' * (corpus['documents'] != 1)}",
            )
        )
        rows.append(("text", f"{corpus['text_bytes']:,} bytes"))
        rows.append(("vocabulary", f"{corpus['vocabulary_size']:,} ids"))
    else:
        rows.append(("corpus", "not tokenized yet"))
    for name, of in (
        ("student", lambda run: f"{run.job.model.rstrip('/').split('/')[-1]}, {run.parameters:,} parameters"),
        ("learns from", _learns_from),
        ("loss", lambda run: run.job.loss),
        ("alpha", _alpha),
        ("temperature", lambda run: run.job.temperature and f"{run.job.temperature:g}"),
        ("tail", lambda run: run.job.tail),
        ("student's windows", lambda run: run.job.window_tokens and f"{run.job.window_tokens} tokens"),
        ("windows per step", lambda run: run.windows_per_step and f"{run.windows_per_step:,}"),
        ("steps", lambda run: f"{run.steps:,}"),
    ):
        text = distinct(of(run) for run in students)
        rows.append((name, text or "not measured"))
    found = [Table("Distillation", ("", ""), words(rows), names=2)]
    if findings.recipe.settings:
        settings = [(str(name), scalar(value)) for name, value in findings.recipe.settings.items()]
        found.append(Table("Settings of the recipe", ("", ""), words(settings), names=2))
    return found


def _alpha(run: TrainingRun) -> str | None:
    if run.job.alpha is None:
        return None
    end = "" if run.job.alpha_end is None else f", linear to {run.job.alpha_end:g} at the last step"
    return f"{run.job.alpha:g}{end}"


def _learns_from(run: TrainingRun) -> str:
    if len(run.job.teachers) == 1:
        return run.job.teachers[0].name
    return ", ".join(f"{teacher.name} (weight {teacher.weight:g})" for teacher in run.job.teachers)


def _teachers(found: dict[str, Any]) -> str:
    members = [f"{m['source']} ({m['architecture']}, {m['parameters']:,} parameters)" for m in found["teacher"]]
    if found["combine"] == "single":
        return members[0]
    shares = ", ".join(f"{weight:g}" for weight in found["weights"])
    return f"{found['combine']} of {' and '.join(members)}, weights {shares}"


def _targets(targets: dict[str, Any]) -> str:
    text = f"{targets['method']}, k = {targets['k']}"
    if targets["head_ids"]:
        text += f", {targets['head_ids']} of them certain"
    if targets["top_p"]:
        text += f", cut at a mass of {targets['top_p']:g}"
    return text + (f", for temperature {targets['temperature']:g}" if targets["method"] == "varopt" else "")


def _windowing(windowing: dict[str, Any]) -> str:
    isolated = ", documents isolated" if windowing["isolate_documents"] else ""
    return f"{windowing['context_tokens']} tokens every {windowing['stride_tokens']}{isolated}"


def pairs_table(findings: RecipeFindings) -> Table | None:
    """Accuracy on minimal pairs, a row for each group."""
    series = [one for one in findings.series if one.spread(pairs_mean) is not None]
    groups = group_names(findings)
    if not groups:
        return None
    rows = [
        (Cell(readable(group)), *(over_seeds(one.spread(group_accuracy(group)), 1, " %", 100) for one in series))
        for group in groups
    ]
    rows.append((Cell("mean over groups"), *(over_seeds(one.spread(pairs_mean), 1, " %", 100) for one in series)))
    return Table("As numbers", ("group", *(one.label for one in series)), tuple(rows), folded=True, wide=True)


def group_names(findings: RecipeFindings) -> list[str]:
    """Sorted names of the groups of minimal pairs that any model was scored on."""
    return sorted({name for m in findings.models if m.scores and m.scores.minimal_pairs for name in _groups(m)})


def group_accuracy(group: str) -> Metric:
    """The metric that is the accuracy on one group, a fraction."""
    return lambda model: _groups(model).get(group)


def _groups(model: Model) -> dict[str, float]:
    if model.scores is None or model.scores.minimal_pairs is None:
        return {}
    return {name: group.accuracy for name, group in model.scores.minimal_pairs.groups.items()}


def readable(name: str) -> str:
    """A group's name with spaces for underscores."""
    return name.replace("_", " ")


def kl_table(findings: RecipeFindings) -> Table | None:
    """Held-out KL from each teacher entry; entries that serve one seed each share a row."""
    rows = []
    for series in findings.series:
        by_seed = [found for model in series.models if (found := kl_of(model))]
        if not by_seed:
            continue
        names = dict.fromkeys(name for kl in by_seed for name in kl)
        columns: dict[str, list[Any]] = {name: [kl[name] for kl in by_seed if name in kl] for name in names}
        if len(names) > 1 and all(len(kl) == 1 for kl in by_seed):
            columns = {"its seed's entry": [item for kl in by_seed for item in kl.values()]}
        for name, items in columns.items():
            kind = "lower bound" if any(item.lower_bound for item in items) else "unbiased estimate"
            nats = spread(item.nats for item in items)
            rows.append((Cell(series.label, style=series.style), Cell(name), over_seeds(nats, 4), Cell(kind)))
    if not rows:
        return None
    return Table("Held-out KL to the teachers", ("model", "entry", "nats per token", ""), tuple(rows), names=2)


def fidelity_table(entries: Sequence[Entry]) -> Table | None:
    """The entries' own fidelity reports, a row for each entry."""
    rows = []
    for entry in entries:
        report = entry.found["fidelity"] if entry.found is not None else None
        if report is None:
            rows.append((Cell(entry.name), *[NOT_MEASURED] * 8))
            continue
        used = "sampled" if "sampled" in report["gradients"] else "bucket"
        angle = report["gradients"][used]["tempered"]["mean"]
        rows.append(
            (
                Cell(entry.name),
                number(report["positions"], 0),
                number(report["residual_mass"]["mean"], 2, " %", 100),
                number(report["residual_mass"]["q95"], 2, " %", 100),
                _or(number(report["divergences"]["bucket"]["forward"], 4), "infinite"),
                _or(number(report["divergences"][used]["mean_forward"], 5), "infinite"),
                Cell(f"{report['quantisation']:.1e}"),
                _or(number(angle, 2, "°"), "not defined"),
                number(report["calibration"] and report["calibration"]["full"], 2, " %", 100),
            )
        )
    if all(row[1].missing for row in rows):
        return None
    head = ("entry", "positions", "mass outside", "in 95 % at most", "KL, even tail", "KL of the means")
    return Table(
        "How close the stored targets are to the teacher's full distributions",
        (*head, "quantisation", "gradient off by", "teacher's ECE"),
        tuple(rows),
        note="Measured on a sample when the entry was made. KL and quantisation in nats. Gradient: the angle between "
        "the mean gradients of stored and dense loss, with the tail treatment that these targets are made for.",
        wide=True,
    )


def _or(cell: Cell, reason: str) -> Cell:
    """The cell, or `reason` for a metric that was measured and is not a number."""
    return Cell(reason, missing=True) if cell.missing else cell


def cost_table(findings: RecipeFindings) -> Table:
    """Time of every stage, in order."""
    rows = [
        _stage(series.label, "training", series.style, series.spread(run_seconds)) for series in findings.of("teacher")
    ]
    for entry in findings.entries:
        rows.append(_stage(entry.name, "caching of the training text", "", spread([entry.seconds])))
        rows.append(_stage(entry.name, "caching of the held-out text", "", spread([entry.held_out_seconds])))
    for series in findings.series:
        if series.role != "teacher":
            activity = "training from the cache" if series.role == "student" else "training"
            rows.append(_stage(series.label, activity, series.style, series.spread(run_seconds)))
    return Table(
        "Time",
        ("stage", "seconds", "runs", "hours in all"),
        tuple(rows),
        note="Runs include their evaluations. Caching: the sum of its shards' receipts, over all workers.",
    )


def _stage(name: str, activity: str, style: str, found: Spread | None) -> tuple[Cell, ...]:
    if found is None:
        return (Cell(name, activity, style), NOT_MEASURED, Cell("–"), NOT_MEASURED)
    total = sum(found.values)
    hours = f"{total / 3600:,.{2 if total >= 360 else 4}f}"
    return (Cell(name, activity, style), over_seeds(found, 1), Cell(str(found.number)), Cell(hours, duration(total)))


def memory_table(findings: RecipeFindings) -> Table:
    """Peak memory of each series, of the process and of the device."""
    rows = []
    for series in findings.series:
        peaks = [run.peak_memory for _, run in series.runs if run.peak_memory is not None]
        rows.append(
            (
                Cell(series.label, style=series.style),
                over_seeds(spread(peak.process_bytes for peak in peaks), 1, " MB", 1e-6),
                over_seeds(spread(peak.device_bytes for peak in peaks), 1, " MB", 1e-6),
            )
        )
    return Table("Peak memory", ("model", "process", "device"), tuple(rows), note="MB are 10⁶ bytes.")


def storage_table(entries: Sequence[Entry]) -> Table:
    """Size of the targets on disk."""
    rows = []
    for entry in entries:
        found = entry.found or dict.fromkeys(("bytes_per_token", "bytes_per_kept_id", "stored_bytes"))
        rows.append(
            (
                Cell(entry.name),
                number(found["bytes_per_token"], 1),
                number(found["bytes_per_kept_id"], 2),
                number(found["stored_bytes"], 2, " MB", 1e-6),
            )
        )
    return Table("Storage", ("entry", "bytes per token", "bytes per id", "in all"), tuple(rows))


def break_even_table(findings: RecipeFindings) -> Table | None:
    """Seconds of n students, from the cache and with live teachers."""
    found = findings.break_even
    if found is None:
        return None
    rows = tuple(
        (Cell(str(n)), number(cached, 1), number(live, 1), number(cached / live if live else None, 2, " ×"))
        for n, cached, live in found.rows()
    )
    head = ("students", "from the cache, seconds", "live, seconds", "ratio")
    return Table("As numbers", head, rows, folded=True, wide=True)


def provenance_tables(findings: RecipeFindings) -> list[Table]:
    """Digests of data and weights, library versions, devices."""
    digests: list[tuple[str, str]] = []
    if findings.corpus is not None:
        digests.append(("token stream", findings.corpus["stream_sha256"]))
        digests.append(("tokenizer", findings.corpus["tokenizer_fingerprint"]))
    for entry in findings.entries:
        if entry.found is not None:
            digests.append((f"record of {entry.name}", entry.found["record_sha256"]))
            digests += [
                (f"weights of {member['source']} in {entry.name}", member["weights_sha256"])
                for member in entry.found["teacher"]
            ]
    for name in sorted({name for run in findings.runs for name in run.provenance}):
        digests.append((f"runs' {name}", distinct(run.provenance.get(name) for run in findings.runs)))
    made = [("runs", run.libraries) for run in findings.runs]
    made += [(f"entry {entry.name}", entry.found["created_with"]) for entry in findings.entries if entry.found]
    return [
        Table("sha256", ("", ""), words(digests), names=2, folded=len(digests) > 12),
        software(made, findings.runs),
    ]
