"""The teachers of a loss together: weights, how the tail of each is treated, and what that needs of its entry.

What one teacher's targets are belongs to `student.loss.teacher_targets`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from storage.errors import InputError
from student.loss.objective import LIGHTNING_OPD, SAMPLED_TAILS, Objective, Tail
from student.loss.teacher_targets import Member


def normalised(members: Sequence[Member]) -> tuple[Member, ...]:
    """The members with weights of sum 1. Raises InputError for none, repeated ones, and weights without such a sum."""
    names = [member.name for member in members]
    if not names:
        raise InputError("alpha below 1 needs at least one teacher to learn from; name one, or set alpha to 1")
    if len(set(names)) < len(names):
        raise InputError(f"each teacher may be named once, with its whole weight; got {', '.join(names)}")
    for member in members:
        if not (math.isfinite(member.weight) and member.weight >= 0):
            raise InputError(f"teacher {member.name}: a weight is a finite number >= 0; got {member.weight}")
    total = sum(member.weight for member in members)
    if not 0 < total < math.inf:
        raise InputError(f"the weights of {', '.join(names)} sum to {total:g}: give at least one a weight above 0")
    return tuple(replace(member, weight=member.weight / total) for member in members)


def tail_of(member: Member, objective: Objective) -> Tail:
    """A member's treatment of the tail, with auto resolved. Raises InputError where its entry does not allow it."""
    if objective.loss == LIGHTNING_OPD:
        member.needs("label", f"loss {objective.loss}")
        return "none"
    member.needs("ids", f"loss {objective.loss}")
    linear = objective.loss == "forward-kl" and objective.tail in ("auto", "sampled")
    if member.repeats and not (linear and objective.temperatures == (1.0,)):
        raise InputError(
            f"teacher {member.name}: its ids were sampled in another vocabulary and projected into this one, so that "
            f"only a loss that is linear in the teacher's probabilities is unbiased: take forward-kl with tail sampled "
            f"at temperature 1"
        )
    for temperature in objective.temperatures:
        if member.sampled_at not in (None, temperature):
            raise InputError(
                f"teacher {member.name}: its ids were sampled for temperature {member.sampled_at:g} and are biased at "
                f"{temperature:g}: take that temperature, or cache the teacher again for the other"
            )
    if objective.loss == "tail-aware-kl":
        _check_ranked(member, objective)
    tail = objective.tail
    if tail == "auto":
        tail = "bucket"
        if objective.loss == "forward-kl":
            tail = "sampled" if member.sampled_at is not None else "renormalise" if "tail" in member.absent else tail
    if tail in SAMPLED_TAILS and member.sampled_at is None:
        raise InputError(
            f"teacher {member.name} stores its top-k ids and no sampled ids, so tail {tail} has no sample of "
            "its tail: take tail bucket, or an entry made with --targets varopt"
        )
    if tail != "renormalise":
        member.needs("tail", f"{objective.loss} with tail {tail}")
    if tail != "sampled":
        member.needs("sampled-logprobs", f"{objective.loss} with tail {tail}")
    for temperature in objective.temperatures:
        if temperature != 1.0:
            member.needs("half-tail", f"temperature {temperature:g}")
    if objective.min_entropy is not None:
        member.needs("entropy", "a threshold of the teacher's entropy (min_entropy)")
    return tail


def _check_ranked(member: Member, objective: Objective) -> None:
    """Raise InputError where an entry's stored ids are no head of `head_ids` of the likeliest, and more."""
    if member.sampled_at is not None:
        raise InputError(
            f"teacher {member.name}: {objective.loss} needs a position's likeliest ids and the mass of the others, and "
            "its ids are sampled: take forward-kl, or an entry made with --targets topk"
        )
    if member.stored_ids is not None and member.stored_ids <= objective.head_size:
        raise InputError(
            f"teacher {member.name}: its entry stores {member.stored_ids} ids a position, and {objective.loss} with a "
            f"head of {objective.head_size} has none in its tail: take a smaller --head-ids, or cache more ids"
        )


def check_linear(members: Sequence[Member], objective: Objective) -> None:
    """Raise InputError where members with a weight above 0 meet at a position, and the loss is not linear in them."""
    weighing = [member for member in members if member.weight > 0]
    mixed = [pair for pair in combinations(weighing, 2) if pair[0].meets(pair[1])]
    if objective.loss != "forward-kl" and mixed:
        names = ", ".join(dict.fromkeys(member.name for pair in mixed for member in pair))
        if objective.loss == LIGHTNING_OPD:
            raise InputError(f"loss {objective.loss} of several teachers ({names}) of the same text: name one of them")
        raise InputError(
            f"loss {objective.loss} of several teachers ({names}): only forward-kl is linear in the "
            "teacher, so that a mixture can be made of separate entries; take forward-kl, one teacher, or an ensemble "
            "entry (cache-logits with several --teacher)"
        )
