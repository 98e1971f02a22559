"""docs/format.md from the specification in `storage/format/__init__.py`: run as a program, it writes the page."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "format.md"
_HEAD = """\
<!-- Made from storage/format/__init__.py by `make docs`; edit that. -->

# The format

"""
_TAIL = """
## Reading an entry with zarr alone

Ids and log-probs of an entry with codes: of version 1 those in the first `kept` columns of a row, of version 2 ids
there and log-probs in the first `certain`.

```python
import numpy, zarr


def version_1(arrays, step):
    steps = numpy.cumsum(arrays["logprob_codes"][:], axis=1, dtype=int)
    return arrays["token_ids"][:], arrays["top_logprob"][:][:, None] - step * steps


def version_2(arrays, step):
    stored, code = arrays["ids"][:].astype(int), arrays["mass_code"][:].astype(int)
    is_certain = numpy.arange(stored.shape[1]) < arrays["certain"][:][:, None]
    ids = numpy.where(is_certain, stored, numpy.cumsum(stored * ~is_certain, axis=1))
    below = -step * numpy.cumsum(arrays["certain_codes"][:], axis=1, dtype=int)
    total = (numpy.exp(below) * is_certain).sum(axis=1)
    head = numpy.where(code <= -32767, 0, -numpy.logaddexp(0, step * code))
    return ids, below + (head - numpy.log(total.clip(1)))[:, None]


entry = zarr.open("run/train", mode="r")["teachers/llama"]
record = entry.attrs["logit_cache"]
decode = {1: version_1, 2: version_2}[record["format_version"]]
ids, logprobs = decode(entry, record["encoding"]["step_nats"])
```

Zarr returns the fill value for a missing chunk: read through `storage.LogitCache`, or check the receipts before
you use values.
"""


def page(specification: str) -> str:
    """The page for a docstring: its literal blocks become fenced ones, its bold openings headings."""
    text = specification.replace("``", "`")
    text = re.sub(r"::\n\n((?:    .*\n|\n)+)", lambda m: _fenced(m[1]), text)
    text = re.sub(r"^\*\*(.+?)\.\*\* ", r"## \1\n\n", text, flags=re.MULTILINE)
    return _HEAD + text.strip() + "\n" + _TAIL


def _fenced(block: str) -> str:
    lines = "\n".join(line.removeprefix("    ") for line in block.strip("\n").split("\n"))
    return f":\n\n```text\n{lines}\n```\n\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import storage.format

    PAGE.write_text(page(storage.format.__doc__ or ""), encoding="utf-8")
