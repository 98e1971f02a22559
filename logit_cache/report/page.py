"""One self-contained HTML page about recipes, sweeps and training runs: sections of text, charts and tables.

The page has no script and makes no request: its Content-Security-Policy allows only its own style sheet. Everything
from the folders is text, and Jinja2 escapes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from logit_cache.report import figures
from logit_cache.report import recipe_tables as tables
from logit_cache.report.cells import Table
from logit_cache.report.figures import Figure
from logit_cache.report.findings import BreakEven, RecipeFindings, gather_recipe
from logit_cache.report.folders import Folder, RecipeFolder, RunFolder, SweepFolder, read_folder
from logit_cache.report.run_tables import (
    run_provenance,
    runs_table,
    sorted_trials,
    sweep_settings,
    trial_value,
    trials_table,
)
from logit_cache.report.svg import swatch
from logit_cache.report.verdict import pairs_sentences, verdicts
from storage.errors import InputError
from storage.files import check_output, write_output
from storage.progress import duration

_RUN_STYLES = ("student", "teacher-0", "teacher-1", "live", "teacher-2", "teacher-3", "control")
_PAIRED = "Differences are paired by seed; ± is their standard deviation over seeds, intervals are Student's t."


@dataclass(frozen=True)
class Section:
    """A part of an article: text, a legend of (style, label), figures, tables. Empty ones are left out."""

    title: str
    text: tuple[str, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Article:
    """The part of the page about one folder: `verdict` first, then its context, warnings, and sections.

    summary: lines of a table, for a terminal.
    """

    kind: str
    title: str
    verdict: tuple[str, ...]
    context: tuple[str, ...]
    warnings: tuple[str, ...]
    sections: tuple[Section, ...]
    summary: tuple[str, ...] = ()


def make_report(directories: Sequence[str | Path], out: str | Path) -> list[str]:
    """Write the page about some folders to `out`; returns its summary for a terminal: tables of models and verdicts.

    Raises InputError for a folder without a recipe, sweep or run, and where none of them has a finished run or trial.
    """
    folders = [read_folder(directory) for directory in directories]
    if not any(_is_finished(folder) for folder in folders):
        names = ", ".join(str(directory) for directory in directories)
        raise InputError(
            f"{names}: expected at least one finished run or trial, found none: run the command again once there is one"
        )
    path = check_output(out, "--out")
    articles = [_recipe(gather_recipe(folder)) for folder in folders if isinstance(folder, RecipeFolder)]
    articles += [_sweep(folder) for folder in folders if isinstance(folder, SweepFolder)]
    runs = [folder for folder in folders if isinstance(folder, RunFolder)]
    if runs:
        articles.append(_runs(runs))
    write_output(path, render(articles).encode())
    return [line for article in articles for line in (*article.summary, *article.verdict)]


def render(articles: Sequence[Article]) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("logit_cache.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bound"] = _bound
    title = articles[0].title if len(articles) == 1 else f"{len(articles)} reports"
    page = environment.get_template("report.html")
    return page.render(title=title, articles=articles, swatch=swatch)


def _bound(text: str) -> str:
    """Join numbers to their units and to ± with no-break spaces."""
    return re.sub(r"(?<=\d) (?=±|%|nats\b)|(?<=±) ", "\u00a0", text)


def _is_finished(folder: Folder) -> bool:
    if isinstance(folder, RecipeFolder):
        return any(model.run is not None for model in folder.models)
    if isinstance(folder, SweepFolder):
        return any(trial.state == "complete" and trial.value is not None for trial in folder.sweep.trials)
    return True


def _present(found: Sequence[Table | Figure | None]) -> list[Table | Figure]:
    """The tables that have rows and the figures whose chart is not empty."""
    return [one for one in found if one is not None and (one.rows if isinstance(one, Table) else one.chart)]


def _section(
    title: str,
    *parts: Table | Figure | None,
    text: Sequence[str] = (),
    legend: Sequence[tuple[str, str]] = (),
) -> Section:
    present = _present(parts)
    charts = tuple(one for one in present if isinstance(one, Figure))
    filled = tuple(one for one in present if isinstance(one, Table))
    if not present and not text:
        text = ("Not measured.",)
    return Section(title, tuple(text), tuple(legend) if charts else (), charts, filled)


def _recipe(findings: RecipeFindings) -> Article:
    legend = [(series.style, series.label) for series in findings.series if series.runs]
    pairs_name = "BLiMP by phenomenon" if tables.is_blimp(findings.models) else "Minimal pairs by group"
    kl = tables.kl_table(findings)
    curves = figures.curve_groups(findings)
    return Article(
        kind=f"recipe {findings.recipe.recipe}, scale {findings.recipe.scale}",
        title=findings.recipe.title,
        verdict=tuple(verdicts(findings)),
        context=(
            *pairs_sentences(findings),
            *([_PAIRED] if any(len(difference.by_seed) > 1 for difference in findings.losses) else []),
        ),
        warnings=findings.warnings,
        sections=(
            _section(
                "Gain from distillation",
                figures.held_out_figure(curves),
                *figures.difference_figures(findings),
                legend=legend,
            ),
            _section("Setup", *tables.settings_tables(findings)),
            _section("Teachers, student, control", tables.models_table(findings)),
            _section("During training", figures.training_figure(curves), legend=legend),
            _section(pairs_name, *figures.pairs_figures(findings), tables.pairs_table(findings), legend=legend),
            _section(
                "Fidelity of the cache",
                *figures.fidelity_figures(findings),
                tables.fidelity_table(findings.entries),
                kl,
                text=() if kl else ("Held-out KL to the teachers: not measured.",),
                legend=[
                    (f"teacher-{number % 4}", entry.name)
                    for number, entry in enumerate(findings.entries)
                    if entry.found is not None and entry.found["fidelity"] is not None
                ],
            ),
            _section(
                "Cost",
                figures.break_even_figure(findings),
                figures.memory_figure(findings),
                tables.break_even_table(findings),
                tables.cost_table(findings),
                tables.storage_table(findings.entries),
                tables.memory_table(findings),
                text=[_break_even(findings.break_even)],
                legend=[
                    (series.style, series.label)
                    for series in findings.series
                    if series.role != "teacher" and series.runs
                ],
            ),
            _section("Provenance", *tables.provenance_tables(findings)),
        ),
        summary=tables.summary(findings),
    )


def _break_even(found: BreakEven | None) -> str:
    if found is None:
        return "Break-even of cached against live: not measured. It needs a cache, a run from it, and a live run."
    costs = (
        f"the cache takes {duration(found.caching)}, a student from it {duration(found.cached)}, one with live "
        f"teachers {duration(found.live)}"
    )
    if found.students is None:
        return f"A run from the cache is no faster than a live one here, so the cache never saves time: {costs}."
    first = max(1, -int(-found.students // 1))
    return f"The cache is cheaper from {first} student{'s' if first > 1 else ''} on: {costs}."


def _sweep(folder: SweepFolder) -> Article:
    sweep = folder.sweep
    best = sorted_trials(sweep)[0] if sweep.trials else None
    counts = {state: sum(trial.state == state for trial in sweep.trials) for state in ("complete", "pruned", "failed")}
    running = len(sweep.trials) - sum(counts.values())
    if best is None or best.state != "complete" or best.value is None or not math.isfinite(best.value):
        verdict = "No trial ended with a value."
    else:
        settings = ", ".join(f"{name} {trial_value(value)}" for name, value in best.parameters.items())
        word = "Lowest" if sweep.direction == "minimize" else "Highest"
        verdict = f"{word} {sweep.metric}: {best.value:.4f}, in trial {best.number} ({settings or 'no parameters'})."
    parts = [f"{count} {state}" for state, count in counts.items() if count] + (
        [f"{running} running"] if running else []
    )
    seconds = "" if sweep.seconds is None else f", {duration(sweep.seconds)} in all"
    charts = figures.sweep_figures(sweep)
    return Article(
        kind=f"sweep, {sweep.backend or 'backend not recorded'}",
        title=sweep.title,
        verdict=(verdict,),
        context=(
            f"{len(sweep.trials)} trials ({', '.join(parts)}){seconds}. The best of many trials is selected "
            "on this held-out text, so its value is optimistic: evaluate it with a new seed or on another text.",
        ),
        warnings=(),
        sections=(
            _section(
                "By parameter",
                *charts,
                legend=[("student", "best trial"), ("control", "other trials; rings were pruned")],
            ),
            _section("Trials", trials_table(sweep)),
            _section("Settings", sweep_settings(sweep)),
        ),
    )


def _runs(runs: Sequence[RunFolder]) -> Article:
    styled = [(_RUN_STYLES[number % len(_RUN_STYLES)], run) for number, run in enumerate(runs)]
    legend = [(style, run.name) for style, run in styled]
    curves = figures.run_groups(styled)
    return Article(
        kind="training runs",
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} training runs",
        verdict=(_lowest(runs),),
        context=(),
        warnings=(),
        sections=(
            _section("Runs", runs_table(styled)),
            _section(
                "During training", figures.training_figure(curves), figures.held_out_figure(curves), legend=legend
            ),
            _section("Provenance", *run_provenance(runs)),
        ),
    )


def _lowest(runs: Sequence[RunFolder]) -> str:
    measured = [(one.run.held_out.cross_entropy, one.name) for one in runs if one.run.held_out is not None]
    if not measured:
        return "Held-out loss: not measured."
    measured = [(loss, name) for loss, name in measured if math.isfinite(loss)]
    if not measured:
        return "No run ended with a finite held-out loss."
    loss, name = min(measured)
    if len(runs) == 1:
        return f"Held-out loss: {loss:.4f} nats per token."
    return f"Lowest held-out loss: {loss:.4f} nats per token, of {name}. Runs on their own are not a paired comparison."
