"""The token that rows of files are about: what their format, or whoever imports them, says, held against the data."""

from __future__ import annotations

from logit_cache.fidelity.readings import Evidence, Reading
from storage.errors import InputError
from storage.format.manifest.imported import Alignment

_WORDS = {"after": "that follows", "of": "at which they stand"}


def alignment(evidence: Evidence, expected: Reading | None, given: Reading | None, name: str) -> Alignment:
    """The reading; `expected` by the format of a name, `given` by whoever imports.

    Raises InputError for an unclear one, and for one that contradicts either of them.
    """
    found, clear = evidence.likelier, evidence.is_clear()
    wanted = given or expected
    if clear and wanted is not None and found != wanted:
        said = "--alignment says" if given else f"{name} files say"
        raise InputError(
            f"rows are about the token {_WORDS[found]}, where {said} {_WORDS[wanted]}: {evidence}. The rows or the "
            f"tokens were moved by one: mend the file" + (", or leave --alignment out" if given else "")
        )
    if not clear and given is None:
        raise InputError(
            f"it is not clear which token the rows are about: {evidence}. They may belong to other tokens (another "
            f"tokenizer, rows moved by more than one, settings that decode garbage); where you know better, give "
            f"--alignment after or --alignment of"
        )
    after, of = evidence.means
    return Alignment(reading=given or found, given=given is not None, rows=evidence.rows, after_nats=after, of_nats=of)
