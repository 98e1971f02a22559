"""`logit-cache report`: finished work as one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from storage.errors import one_line_errors
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
        from storage.files import check_writable
        from storage.text import printable

        if out is not None:
            check_writable("--out", out)
        path = Path(directories[0]).expanduser() / "report.html" if out is None else Path(out).expanduser()
        for sentence in make_report(directories, path):
            click.echo(printable(sentence))  # names come from the folders
        click.echo(f"{path}: written", err=True)
