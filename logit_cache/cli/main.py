"""The commands `cache-logits` and `logit-cache`: parse, call one function, print its result."""

from __future__ import annotations

import sys

import click

from logit_cache.cli.cache_logits import cache_logits
from logit_cache.cli.check import audit, doctor, verify
from logit_cache.cli.clean import clean
from logit_cache.cli.entries import list_caches, project, recompress, remove, rename
from logit_cache.cli.evaluate import evaluate
from logit_cache.cli.inspect import inspect
from logit_cache.cli.plan import plan
from logit_cache.cli.recipe import demo, recipe
from logit_cache.cli.report import report
from logit_cache.cli.share import export, import_files, pull, push
from logit_cache.cli.status import status
from logit_cache.cli.tokenize import tokenize
from student.cli_command import HELP_NAMES

__all__ = ["cache_logits", "main"]


@click.group(context_settings=HELP_NAMES)
@click.version_option(package_name="logit-cache")
def main() -> None:
    """Make, look at, check and share caches of teachers' next-token distributions."""


for _command in (
    audit, clean, demo, doctor, evaluate, export, import_files, inspect, list_caches, plan, project, pull, push,
    recipe, recompress, remove, rename, report, status, tokenize, verify,
):  # fmt: skip
    main.add_command(_command)


if __name__ == "__main__":
    sys.exit(main())
