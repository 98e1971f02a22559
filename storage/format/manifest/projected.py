"""The entry of another vocabulary that an entry was projected from, and what was lost on the way."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from storage.format.manifest.shared import ADDED, Count, Positive, Sha256
from storage.format.sealing import Record

Share = Annotated[float, Field(ge=0, le=1)]


class NextTokens(Record):
    """Of so many positions of one kind, at how many the first token of the teacher's next one is the student's."""

    positions: Count
    right: Count

    @model_validator(mode="after")
    def _agrees(self) -> NextTokens:
        if self.right > self.positions:
            raise ValueError(f"{self.right} of {self.positions} positions")
        return self


class ProjectedFrom(Record):
    """An entry about the same text in tokens of another tokenizer.

    `entry_sha256`: the digest of its record; `stream_sha256`, `tokenizer_fingerprint`, `vocabulary_sha256`,
    `vocabulary_size`: of its cache. `shared_positions`: those of this stream that end where a token of the other does,
    `trained_positions` those that the loss mask trains, `shared_trained_positions` both. `certain`, `uncertain`: how
    the first tokens of ids whose first token is certain, or not, agree with the text. `uncertain_mass`: the mean mass
    of ids whose first token is uncertain, over `sampled_positions`; a row in which that of the certain ids exceeds
    `most_uncertain` has no targets. `aligned`: "replies" where the replies of conversations are the same text and what
    stands between them is not, as two chat templates rendered them; else None. `outside_mass`: where no id was sampled
    and the mass outside is known, its mean over `sampled_positions`: what the certain ids, all together, may lack.
    """

    entry_sha256: Sha256
    stream_sha256: Sha256
    tokenizer_fingerprint: Sha256
    vocabulary_sha256: Sha256
    vocabulary_size: Positive
    shared_positions: Count
    trained_positions: Count
    shared_trained_positions: Count
    certain: NextTokens
    uncertain: NextTokens
    uncertain_mass: Share
    sampled_positions: Count
    most_uncertain: Share
    aligned: Literal["replies"] | None = ADDED
    outside_mass: Share | None = ADDED
