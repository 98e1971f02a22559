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

```python
import numpy, zarr

entry = zarr.open("run/train", mode="r")["teachers/llama"]
step = entry.attrs["logit_cache"]["encoding"]["step_nats"]
logprobs = entry["top_logprob"][:][:, None] - step * numpy.cumsum(entry["logprob_codes"][:].astype(int), axis=1)
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
