"""The data set card of a shared cache: README.md in the hub's card format, written for people, not for programs.

Text in a cache's records (names of sources, teachers and revisions) comes from whoever made the cache and is not
trusted. `templates/card.md` shows it as code spans that it cannot close, on one line, without control characters; the
front matter and the commands contain none of it.
"""

from __future__ import annotations

import re
import unicodedata
from functools import partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from logit_cache.describe import (
    describe_cache,
    losses_in_words,
    made_in_words,
    origin_in_words,
    stored_in_words,
    targets_in_words,
    windowing_in_words,
)
from storage.cache.reader import LogitCache
from storage.errors import InputError
from storage.text import counted

_LICENSE = re.compile(r"^[a-z0-9][a-z0-9.+-]{0,63}$")
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
_MOST_SOURCES = 20
_MOST_TEXT = 200
_EXAMPLE_ROWS = 8


def card_text(cache: LogitCache, *, license: str | None = None) -> str:
    """The card of a cache: front matter, contents and gaps, how to open it, how to check it.

    `license` is an identifier of the hub's list (`apache-2.0`, `cc-by-4.0`, `other`, …); None becomes `unknown`. Reads
    records, receipts and their indexes, no array. Raises InputError for a licence that is not an identifier, and the
    errors of opening the entries (CorruptCache, FormatError, StoreUnavailable).
    """
    if license is not None and not _LICENSE.match(license):
        raise InputError(
            f"licence {license!r}: expected an identifier of the hub's list, such as apache-2.0, cc-by-4.0 or other"
        )
    found = describe_cache(cache)
    title = _title(list(found["teachers"]))
    # Markdown, not HTML: what makes text safe here is `quoted`.
    environment = Environment(
        loader=PackageLoader("logit_cache.sharing"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "commas": "{:,}".format,
        "counted": counted,
        "losses": losses_in_words,
        "made": made_in_words,
        "origin": origin_in_words,
        "percent": "{:.2%}".format,
        "quoted": _quoted,
        "stored": stored_in_words,
        "targets": partial(targets_in_words, quoted=_quoted),
        "windows": windowing_in_words,
    }
    records = {name: cache.teacher(name).entry for name in found["teachers"]}
    body = environment.get_template("card.md").render(
        found=found,
        title=title,
        stored_bytes=sum(entry["stored_bytes"] for entry in found["teachers"].values()),
        records=records,
        labelled=any(record.targets.has("label") for record in records.values()),
        example=_example(found["teachers"]),
        most_sources=_MOST_SOURCES,
        license=license,
    )
    return f"{_front_matter(title, found['corpus']['tokens'], license)}\n\n{body}\n"


def _front_matter(title: str, tokens: int, license: str | None) -> str:
    from huggingface_hub import DatasetCardData

    bounds = [f"n<{_SIZES[0]}", *map("{}<n<{}".format, _SIZES, _SIZES[1:]), f"n>{_SIZES[-1]}"]
    data: dict[str, Any] = {
        "license": license if license is not None else "unknown",
        "pretty_name": title,
        "tags": ["logit-cache", "knowledge-distillation", "zarr"],
        "task_categories": ["text-generation"],
        "size_categories": [bounds[min(max(len(str(tokens)) - 3, 0), len(_SIZES))]],
    }
    return f"---\n{DatasetCardData(**data).to_yaml(original_order=list(data))}\n---"


def _title(names: list[str]) -> str:
    """Made of entry names, whose characters and length the format restricts; never of free text."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"Next-token distributions of {shown}" if names else "A token stream for distillation"


def _example(teachers: dict[str, Any]) -> tuple[str, int, int] | None:
    """An entry, and the first of its rows that are cached, as start and stop; None where nothing is cached."""
    for name, entry in teachers.items():
        if entry["positions_cached"]:
            missing = entry["missing"]
            start = int(missing[0][1]) if missing and missing[0][0] == 0 else 0
            stop = min(start + _EXAMPLE_ROWS, entry["positions"], *(first for first, _ in missing if first > start))
            return name, start, stop
    return None


def _quoted(text: str) -> str:
    """Untrusted text as a Markdown code span: one line, printable, cut, behind a fence that it does not contain."""
    line = " ".join(text.split())
    shown = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c)[0] == "C" else c for c in line)
    if len(shown) > _MOST_TEXT:
        shown = shown[: _MOST_TEXT - 1] + "…"
    shown = shown or "(empty)"
    runs = {len(run) for run in re.findall("`+", shown)}
    fence = "`" * next(length for length in range(1, len(runs) + 2) if length not in runs)
    space = " " if "`" in (shown[0], shown[-1]) else ""
    return f"{fence}{space}{shown}{space}{fence}"
