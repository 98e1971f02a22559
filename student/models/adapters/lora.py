"""What a job asks of a new LoRA: W + (alpha / r)·B·A in place of a weight W, of which only A and B are trained.

A is [r, inputs], B [outputs, r] and 0 at the start (Hu et al. 2021, section 4.1). Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from storage.config import Settings

ALL_LINEAR = "all-linear"
_EXAMPLE = "r=16,alpha=32,targets=q_proj+v_proj"


class Lora(Settings):
    """``r=16,alpha=32,dropout=0.05,targets=q_proj+v_proj``, or a mapping with these fields.

    r        rank of B·A
    alpha    B·A counts alpha / r times; by default 2·r
    dropout  of the inputs of A, in training
    targets  names of the layers, or of their last parts; all-linear: every linear layer but the LM head; by default
             those that peft has for the family
    """

    r: Annotated[int, Field(ge=1, le=1 << 16)]
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, data: Any) -> Any:
        fields = _fields(data) if isinstance(data, str) else data
        if not isinstance(fields, dict):
            return fields
        fields = {"alpha": _double(fields.get("r"))} | fields
        if isinstance(fields.get("targets"), str):
            fields["targets"] = fields["targets"].split("+")
        return fields

    @model_validator(mode="after")
    def _agrees(self) -> Lora:
        targets = self.targets or ()
        if len(set(targets)) < len(targets) or (ALL_LINEAR in targets and len(targets) > 1):
            raise ValueError(f"targets {'+'.join(targets)}: name each layer once, or {ALL_LINEAR} alone")
        return self


def _fields(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not name or not equals or not value:
            raise ValueError(f"{item!r}: expected NAME=VALUE, with commas between them, such as {_EXAMPLE}")
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = value
    return found


def _double(r: Any) -> Any:
    """alpha for this r; what is no number is refused as r."""
    try:
        return 2 * float(r)
    except (TypeError, ValueError):
        return 1.0
