"""The label that marks a position as not trained on."""

from __future__ import annotations

NOT_TRAINED = -100
"""The label of a position that takes part in no term of the loss; transformers and torch ignore it too."""
