"""The commands that check a cache and share it: verify, doctor, push, pull, audit, recompress."""

from __future__ import annotations

import json
import sys

import click

from storage.errors import one_line_errors

EXAMPLE = "\b\nExample:\n  "


@click.command(epilog=EXAMPLE + "logit-cache verify run/train --deep")
@click.argument("url")
@click.option("--deep", is_flag=True, help="Hash every byte again, not only lengths, indexes and checksums.")
@click.option("--repair", is_flag=True, help="Remove leftovers, and re-open damaged shards for cache-logits.")
@click.option("--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Objects read at once.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(url: str, deep: bool, repair: bool, workers: int, as_json: bool) -> None:
    """Check every object of a cache against its receipt. Status 1 when something is damaged."""
    with one_line_errors():
        from logit_cache import show
        from logit_cache.progress import progress
        from storage.verify import verify as check

        with progress("verify", None, "bytes") as advance:
            found = check(url, deep=deep, repair=repair, workers=workers, progress=advance)
        data = {**vars(found), "sound": found.sound}
        click.echo(json.dumps(data, indent=2) if as_json else show.verification_text(data, repair))
        if not found.sound:
            sys.exit(1)


COMMANDS = (verify,)
