"""One self-contained HTML page about recipes, sweeps and training runs: sections of text, charts and tables.

The page has no script and makes no request: its Content-Security-Policy allows only its own style sheet. Everything
from the folders is text, and Jinja2 escapes it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from logit_cache.report import facts, figures, metrics, passage
from logit_cache.report.findings import BreakEven, RecipeFindings, gather_recipe
from logit_cache.report.folders import Folder, RecipeFolder, RunFolder, read_folder
from logit_cache.report.minimal_pairs import comparisons
from logit_cache.report.numbers import number, over_seeds, trial_value
from logit_cache.report.schedules import schedule_figures, schedules
from logit_cache.report.svg import swatch
from logit_cache.report.verdict import pairs_sentences, verdicts
from storage.cache.reader import LogitCache
from storage.errors import InputError
from storage.files import check_output, write_output
from storage.text import columns, counted, duration, printable
from student.sweep.record import SweepReport

_RUN_STYLES = ("student", "teacher-0", "teacher-1", "live", "teacher-2", "teacher-3", "control")
_PAIRED = "Differences are paired by seed; ± is their standard deviation over seeds, intervals are Student's t."
_MOST_TRIALS = 500


@dataclass(frozen=True)
class Article:
    """The part of the page about one folder: `verdict` first, then its context, warnings, and `body`, the sections.

    summary: lines of a table, for a terminal.
    """

    kind: str
    title: str
    verdict: tuple[str, ...]
    body: Markup
    context: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
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
    recipes = [gather_recipe(folder) for folder in folders if isinstance(folder, RecipeFolder)]
    articles = [_recipe(found, f"token-{number}") for number, found in enumerate(recipes)]
    articles += [_sweep(folder) for folder in folders if isinstance(folder, SweepReport)]
    runs = [folder for folder in folders if isinstance(folder, RunFolder)]
    if runs:
        articles.append(_runs(runs))
    write_output(path, render(articles).encode())
    return [line for article in articles for line in (*article.summary, *article.verdict)]


def render(articles: Sequence[Article]) -> str:
    title = articles[0].title if len(articles) == 1 else f"{len(articles)} reports"
    return _from_template("report", title=title, articles=articles)


def _from_template(name: str, **values: Any) -> Markup:
    # The templates have escaped every value.
    return Markup(_environment().get_template(f"{name}.html").render(values))


@functools.cache
def _environment() -> Environment:
    loader = PackageLoader("logit_cache.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["swatch"] = swatch
    for made in (_bound, duration, number, over_seeds, passage.percent, figures.readable, trial_value):
        environment.filters[made.__name__.removeprefix("_")] = made
    return environment


def _bound(text: str) -> str:
    """Join numbers to their units and to ± with no-break spaces."""
    return re.sub(r"(?<=\d) (?=±|%|nats\b)|(?<=±) ", "\u00a0", text)


def _is_finished(folder: Folder) -> bool:
    if isinstance(folder, RecipeFolder):
        return any(model.run is not None for model in folder.models)
    if isinstance(folder, SweepReport):
        return any(trial.state == "complete" and trial.value is not None for trial in folder.trials)
    return True


def passage_page(cache: LogitCache, start: int, stop: int) -> bytes:
    """A page about the positions `start .. stop` of a cache, as `logit-cache inspect --at --html` writes it.

    Raises InputError for a range that cannot be shown, and what reading raises.
    """
    tokens = passage.tokens_of(cache, start, stop)
    name = printable(cache.url.rstrip("/").split("/")[-1])
    return render(
        [
            Article(
                kind="passage of a cache",
                title=f"{name}, positions {start:,} to {stop - 1:,}",
                verdict=(f"{counted(len(tokens), 'token')}, {counted(len(cache.teachers), 'teacher entry')}.",),
                body=_passage(tokens, "token", ""),
            )
        ]
    ).encode()


def _passage(tokens: Sequence[passage.Token], radio: str, about: str) -> Markup:
    """radio: the name of its radio buttons, which is another for each passage of a page."""
    return _from_template("passage", tokens=tokens, levels=passage.LEVELS, radio=radio, about=about)


def _recipe(found: RecipeFindings, radio: str) -> Article:
    legend = [(series.style, series.label) for series in found.series if series.runs]
    curves = [(series.label, series.style, series.runs) for series in found.series]
    read = passage.recipe_tokens(found)
    about = "" if read is None else f"The first {counted(len(read[0]), 'token')} of the held-out text, seed {read[1]}."
    body = _from_template(
        "recipe",
        passage="" if read is None else _passage(read[0], radio, about),
        findings=found,
        metrics=metrics,
        legend=legend,
        held_out_figure=figures.held_out_figure(curves),
        difference_figures=figures.difference_figures(found),
        setup=facts.setup(found),
        settings=facts.settings(found),
        training_figure=figures.training_figure(curves),
        pairs_figures=figures.pairs_figures(found),
        comparisons=comparisons(found),
        schedules=schedules(found),
        schedule_figures=schedule_figures(found),
        fidelity_figures=figures.fidelity_figures(found),
        entry_legend=[
            (f"teacher-{number % 4}", entry.name)
            for number, entry in enumerate(found.entries)
            if entry.fidelity is not None
        ],
        break_even_sentence=_break_even(found.break_even),
        cost_figures=[*figures.break_even_figures(found), *figures.memory_figures(found)],
        cost_legend=[(one.style, one.label) for one in found.series if one.role != "teacher" and one.runs],
        digests=facts.recipe_digests(found),
        software=facts.software(found.runs, [entry.found["created_with"] for entry in found.entries if entry.found]),
    )
    paired = any(len(difference.by_seed) > 1 for difference in found.losses)
    return Article(
        kind=f"recipe {found.recipe.recipe}, scale {found.recipe.scale}",
        title=found.recipe.title,
        verdict=tuple(verdicts(found)),
        body=body,
        context=(*pairs_sentences(found), *([_PAIRED] if paired else [])),
        warnings=found.warnings,
        summary=_summary(found),
    )


def _summary(found: RecipeFindings) -> tuple[str, ...]:
    """The models in lines for a terminal: size, held-out loss, best epoch, time."""
    rows: list[tuple[str, ...]] = [("", "parameters", "held-out loss, nats", "best epoch", "seconds")]
    for series in found.series:
        over = ((found.loss, 4), (metrics.best_epoch, 1), (metrics.run_seconds, 0))
        cells = [" ".join(over_seeds(series.spread(metric), digits) or ()).rstrip() for metric, digits in over]
        cells = [number(series.parameters, 2, " M", 1e-6) or "", *cells]
        rows.append((series.label, *(cell or "not measured" for cell in cells)))
    return (*columns(rows), "")


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
    return f"The cache is cheaper from {counted(first, 'student')} on: {costs}."


def _sweep(sweep: SweepReport) -> Article:
    trials = sweep.ranked()
    body = _from_template(
        "sweep",
        sweep=sweep,
        trials=trials,
        most_trials=_MOST_TRIALS,
        parameters=list(dict.fromkeys(name for trial in sweep.trials for name in trial.parameters)),
        figures=figures.sweep_figures(sweep),
        settings=facts.sweep_settings(sweep),
    )
    states = [trial.state for trial in trials]
    counts = [(states.count(state), state) for state in ("complete", "pruned", "failed", "running")]
    parts = ", ".join(f"{count} {state}" for count, state in counts if count)
    return Article(
        kind=f"sweep, {sweep.backend}",
        title=sweep.title,
        verdict=(_best_trial(sweep),),
        body=body,
        context=(
            f"{counted(len(trials), 'trial')} ({parts}), {duration(sweep.seconds)} in all. The best of many trials is "
            "selected on this held-out text, so its value is optimistic: evaluate it with a new seed or on another "
            "text.",
        ),
    )


def _best_trial(sweep: SweepReport) -> str:
    best = next(iter(sweep.ranked()), None)
    if best is None or best.state != "complete" or best.value is None or not math.isfinite(best.value):
        return "No trial ended with a value."
    settings = ", ".join(f"{name} {trial_value(value)}" for name, value in best.parameters.items())
    word = "Lowest" if sweep.direction == "minimize" else "Highest"
    return f"{word} {sweep.metric}: {best.value:.4f}, in trial {best.number} ({settings or 'no parameters'})."


def _runs(runs: Sequence[RunFolder]) -> Article:
    styled = [(_RUN_STYLES[number % len(_RUN_STYLES)], run) for number, run in enumerate(runs)]
    curves = [(folder.name, style, [(folder.run.job.seed, folder.run)]) for style, folder in styled]
    body = _from_template(
        "runs",
        runs=styled,
        by_source=[
            (style, folder, teacher)
            for style, folder in styled
            for teacher in folder.run.job.teachers
            if any(other.sources for other in folder.run.job.teachers)
        ],
        legend=[(style, run.name) for style, run in styled],
        training_figure=figures.training_figure(curves),
        held_out_figure=figures.held_out_figure(curves),
        digests=facts.run_digests(runs),
        software=facts.software([one.run for one in runs]),
    )
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} training runs"
    return Article(kind="training runs", title=title, verdict=(_lowest(runs),), body=body)


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
