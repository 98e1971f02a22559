"""`logit-cache recipe` and `logit-cache demo`: Baby Llama, BabyLlama-2 or a small example, from text to report."""

from __future__ import annotations

from typing import Any

import click

from storage.errors import one_line_errors
from student.cli_command import command

_EXAMPLE = """\
logit-cache recipe baby-llama --scale tiny --text 'corpus/train/*.txt' --eval-text 'corpus/valid/*.txt' \\
    --pairs blimp --out run/baby-llama"""


@command(_EXAMPLE, resumes=True)
@click.argument("name", metavar="baby-llama|babyllama-2")
@click.option("--text", multiple=True, required=True, help="Training text: files or patterns. Repeatable.")
@click.option("--eval-text", multiple=True, required=True, help="Held-out text: files or patterns. Repeatable.")
@click.option("--out", required=True, metavar="DIR", help="Folder of the run; an interrupted one resumes.")
@click.option(
    "--scale",
    type=click.Choice(["tiny", "mini", "small", "paper"]),
    default="paper",
    show_default=True,
    help="Size of networks and text: minutes or hours on two cores, minutes on a GPU, or the paper's.",
)
@click.option("--pairs", metavar="FOLDER", help="Minimal pairs to score every model on, as BLiMP's.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="First N pairs of each paradigm only.")
@click.option(
    "--seed", "seeds", type=click.IntRange(0, 1 << 20), multiple=True, help="Repeatable: all of it once for each [0]."
)
@click.option("--live", is_flag=True, help="Also train the student with live teachers, to compare result and cost.")
@click.option(
    "--stride-tokens", type=click.IntRange(1, 128), help="Of the teachers' windows when cached [the recipe's]."
)
@click.option(
    "--sweep-trials",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also search the schedules of control, teachers and student, by N trials of each.",
)
@click.option("--dry-run", is_flag=True, help="Print the estimate and the commands, and do nothing.")
def recipe(name: str, dry_run: bool, **flags: Any) -> None:
    """Run a published recipe from text to report: tokenizer, teachers, cache, student and control, scores.

    Every stage is a public command in a process of its own, and all of it resumes where it stopped. A run that is too
    large for this machine is refused beforehand, with the estimate.
    """
    with one_line_errors():
        from logit_cache.recipes.commands import RecipeJob
        from logit_cache.recipes.run import RecipeRun
        from storage.config import build_config

        run = RecipeRun(build_config(RecipeJob, {"recipe": name}, flags, "logit-cache recipe"))
        click.echo(run.forecast, err=not dry_run)
        if dry_run:
            click.echo("")
            for stage in run.stages:
                click.echo(f"# {stage.title}\n{stage.line}")
            return
        click.echo(f"report: {run.run()}")


@command("logit-cache demo --out demo-run", resumes=True)
@click.option("--out", default="demo-run", show_default=True, help="Folder of the run; an interrupted one resumes.")
@click.option("--text", multiple=True, help="Text to use instead of the Python standard library's source. Repeatable.")
def demo(out: str, text: tuple[str, ...]) -> None:
    """Two teachers, their cache, a student that learns from it and its control, compared: minutes on a laptop."""
    with one_line_errors():
        from logit_cache.recipes.demo import run_demo

        click.echo(f"report: {run_demo(out, text)}")
