"""Divergences as the papers define them, over whole distributions, in the type that these have."""

from __future__ import annotations

import torch
from torch import Tensor


def definition(name: str, mix: float, p: Tensor, q: Tensor) -> Tensor:
    """The divergence [P] of dense distributions [P, n] by its formula; p may have zeros, and q where p has."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        least = torch.finfo(a.dtype).tiny
        return torch.where(a > 0, a * (a.clamp(min=least).log() - b.clamp(min=least).log()), 0.0).sum(1)

    if name == "forward-kl":
        return kl(p, q)
    if name == "reverse-kl":
        return kl(q, p)
    if name == "jsd":
        m = mix * p + (1 - mix) * q
        return mix * kl(p, m) + (1 - mix) * kl(q, m)
    if name == "skew-forward-kl":
        return kl(p, mix * p + (1 - mix) * q)
    assert name == "skew-reverse-kl"
    return kl(q, (1 - mix) * p + mix * q)
