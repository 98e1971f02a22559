"""`logit-cache remove` and `rename`: the teacher entries of a cache, as a whole."""

from __future__ import annotations

import sys

import click

from storage.errors import InputError, one_line_errors
from student.cli_command import command


@command("logit-cache remove run/train llama-k64 --yes")
@click.argument("url", metavar="CACHE")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(url: str, name: str, yes: bool) -> None:
    """Remove a teacher entry for good. Run it again after an interruption.

    The token stream and other entries stay as they are. A signature of the cache no longer holds.
    """
    with one_line_errors():
        from storage.cache.entries import remove_entry
        from storage.progress import progress

        if not yes:
            if not sys.stdin.isatty():
                raise InputError(f"{url}: removing {name} cannot be undone: give --yes")
            click.confirm(f"Remove the entry {name} of {url} for good?", abort=True, err=True)
        with progress(f"remove {name}", None, "bytes") as advance:
            size = remove_entry(url, name, advance)
        click.echo(f"{url}: {name} is removed, {size:,} bytes")


@command("logit-cache rename run/train llama llama-k64")
@click.argument("url", metavar="CACHE")
@click.argument("name")
@click.argument("new_name")
def rename(url: str, name: str, new_name: str) -> None:
    """Give a teacher entry another name. In an object store its objects are copied; run it again to resume.

    Scripts that name the entry need its new name. A signature of the cache no longer holds.
    """
    with one_line_errors():
        from storage.cache.entries import rename_entry
        from storage.progress import progress

        with progress(f"rename {name}", None, "bytes") as advance:
            rename_entry(url, name, new_name, advance)
        click.echo(f"{url}: {name} is now {new_name}")
