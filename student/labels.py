"""The label of positions that are not trained on."""

from __future__ import annotations

NOT_TRAINED = -100
"""The label that excludes a position from every term of the loss; transformers and torch ignore it too."""
