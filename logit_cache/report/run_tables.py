"""The tables of a report about single training runs and about sweeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from logit_cache.report.cells import NOT_MEASURED, Cell, Table, number, scalar, software, words
from logit_cache.report.folders import RunFolder, Scalar, Sweep, Trial

_MOST_TRIALS = 500


def runs_table(runs: Sequence[tuple[str, RunFolder]]) -> Table:
    """Training runs, one per row; each comes with its style."""
    rows = []
    for style, folder in runs:
        run = folder.run
        held = run.held_out
        teachers = ", ".join(teacher.name for teacher in run.job.teachers) or "none"
        kl = "; ".join(f"{'≥ ' if v.lower_bound else ''}{v.nats:.4f}" for v in held.kl.values()) if held else ""
        rows.append(
            (
                Cell(folder.name, f"teachers: {teachers}; seed {run.job.seed}", style),
                number(run.parameters, 2, " M", 1e-6),
                number(run.tokens_seen, 2, " M", 1e-6),
                number(run.steps, 0),
                number(held.cross_entropy if held else None, 4),
                number(held.perplexity if held else None, 2),
                number(held.bits_per_byte if held else None, 4),
                number(held.ece if held else None, 2, " %", 100),
                Cell(kl) if kl else NOT_MEASURED,
                number(run.seconds, 1),
            )
        )
    head = ("run", "parameters", "tokens seen", "steps", "held-out loss", "perplexity", "bits per byte", "ECE")
    note = (
        "Loss and KL in nats per token. Runs may differ in text, tokenizer and seed; they are not a paired comparison."
    )
    return Table("Runs", (*head, "KL to teachers", "seconds"), tuple(rows), note=note, wide=True)


def run_provenance(runs: Sequence[RunFolder]) -> list[Table]:
    """Digests, library versions and devices of single runs."""
    digests = [(f"{one.name}: {name}", value) for one in runs for name, value in sorted(one.run.provenance.items())]
    made = [(one.name, one.run.libraries) for one in runs]
    return [
        Table("sha256", ("", ""), words(digests), names=2, folded=len(digests) > 12),
        software(made, [one.run for one in runs]),
    ]


def sorted_trials(sweep: Sweep) -> list[Trial]:
    """The trials, best first; those without a finite value last, in their order."""
    sign = 1 if sweep.direction == "minimize" else -1
    return sorted(
        sweep.trials,
        key=lambda t: (t.state != "complete", t.value is None or not math.isfinite(t.value), sign * (t.value or 0)),
    )


def trial_value(value: Scalar) -> str:
    """A parameter of a trial as text; floats, which a search samples with all digits, with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else scalar(value)


def trials_table(sweep: Sweep) -> Table:
    """The trials sorted by value, the first 500."""
    names = list(dict.fromkeys(name for trial in sweep.trials for name in trial.parameters))
    rows = []
    for rank, trial in enumerate(sorted_trials(sweep)[:_MOST_TRIALS]):
        best = rank == 0 and trial.state == "complete"
        values = [trial_value(trial.parameters[name]) if name in trial.parameters else "–" for name in names]
        rows.append(
            (
                Cell(str(trial.number), "best" if best else ""),
                Cell(trial.state, trial.error or ""),
                number(trial.value, 4),
                *(Cell(value) for value in values),
                number(trial.steps, 0),
                number(trial.seconds, 1),
            )
        )
    more = len(sweep.trials) - len(rows)
    note = f"Sorted by {sweep.metric}, best first" + (f"; {more:,} more are left out." if more > 0 else ".")
    head = ("trial", "state", sweep.metric, *names, "steps", "seconds")
    return Table("Trials", head, tuple(rows), names=2, note=note, wide=True)


def sweep_settings(sweep: Sweep) -> Table:
    """The settings that all trials share."""
    rows = [("cache", (sweep.cache or "not recorded").rstrip("/").split("/")[-1]), ("metric", sweep.metric)]
    rows.append(("direction", sweep.direction))
    for name, value in sweep.job.items():
        if isinstance(value, dict):
            rows += [(f"{name}.{inner}", scalar(item)) for inner, item in value.items()]
        else:
            rows.append((str(name), scalar(value)))
    return Table("Settings", ("", ""), words(rows), names=2)
