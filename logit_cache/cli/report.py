"""`logit-cache report`: finished work as one HTML page."""

from __future__ import annotations

import click

from storage.errors import one_line_errors
from storage.files import local_path
from student.cli_command import command


@command("logit-cache report run/baby-llama run/sweep -o report.html")
@click.argument("directories", metavar="RUN_DIR...", nargs=-1, required=True)
@click.option(
    "-o", "--out", metavar="FILE", help="The page to write; an older one is replaced.  [RUN_DIR/report.html, the first]"
)
def report(directories: tuple[str, ...], out: str | None) -> None:
    """Write an HTML page about recipes, sweeps and training runs: gains, their uncertainty, and costs.

    A RUN_DIR has recipe.json, sweep.json, or the report.json of train-student or train-teacher in it. The page needs no
    network and no scripts.
    """
    with one_line_errors():
        from logit_cache.report.page import make_report
        from storage.text import printable

        path = local_path(directories[0]) / "report.html" if out is None else local_path(out)
        for sentence in make_report(directories, path):
            click.echo(printable(sentence))  # names come from the folders
        click.echo(f"{path}: written", err=True)
