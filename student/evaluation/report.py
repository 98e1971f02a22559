"""The report of `logit-cache evaluate`, in JSON and on a terminal; imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from storage.config import Frozen, Reported
from storage.text import counted, labelled
from student.evaluation.blimp import GROUP_OF, PHENOMENA
from student.evaluation.job import EvaluationJob
from student.report import HeldOutKL, quality_rows


class HeldOutScores(Reported):
    """Held-out figures over every labelled position once.

    Cross-entropy in nats. Per byte: of the text's UTF-8 bytes, so that models of different tokenizers compare; None
    where the bytes of the scored positions are not known (a loss mask). ece (expected calibration error of the top-1
    prediction) and accuracy are fractions. kl: KL(teacher || model) by teacher, or why it is not measured.
    """

    tokens: int
    cross_entropy_per_token: float
    perplexity_per_token: float
    cross_entropy_per_byte: float | None
    perplexity_per_byte: float | None
    bits_per_byte: float | None
    ece: float
    accuracy: float
    kl: dict[str, HeldOutKL] = Field(default_factory=dict)
    kl_not_measured: dict[str, str] = Field(default_factory=dict)


class GroupScore(Frozen):
    """Number of pairs, `accuracy`: the share of right ones, and its standard error over pairs
    (`student.evaluation.standard_errors`); None for a single pair, and in reports of earlier versions."""

    pairs: int
    accuracy: float
    stderr: float | None = None


class ParadigmScore(GroupScore):
    """The score of one paradigm, the group it belongs to, and `right`: 1 or 0 for each pair, in the order of its
    file, with which models are compared pair by pair; None in reports of earlier versions."""

    group: str
    right: str | None = Field(None, pattern="^[01]*$")

    @model_validator(mode="after")
    def _one_for_each_pair(self) -> Self:
        if self.right is not None and len(self.right) != self.pairs:
            raise ValueError(f"right has {len(self.right)} digits for {self.pairs} pairs")
        return self


class PairScores(Frozen):
    """Scores of a model on a folder of minimal pairs; accuracies are fractions.

    mean_over_groups     of the groups' accuracies, unweighted; over BLiMP's 12 it is the BLiMP score of the BabyLM
                         papers, Baby Llama and BabyLlama-2 among them
    mean_over_paradigms  of the paradigms' accuracies, unweighted; over BLiMP's 67 it is the overall score of its
                         authors and of lm-eval's group `blimp`
    groups               by name: over all pairs of the group together
    tied                 pairs of equal log-probability, all counted wrong
    close                pairs closer than 1e-4 nats, ties among them
    sha256               of the pairs and their order; None in reports of earlier versions, as both standard errors
    """

    pairs: int
    sha256: str | None = None
    mean_over_groups: float
    mean_over_groups_stderr: float | None = None
    mean_over_paradigms: float
    mean_over_paradigms_stderr: float | None = None
    tied: int
    close: int
    groups: dict[str, GroupScore]
    paradigms: dict[str, ParadigmScore]

    @property
    def is_blimp(self) -> bool:
        """Whether the paradigms are all of BLiMP's, and no others."""
        return self.paradigms.keys() == GROUP_OF.keys() and self.groups.keys() == PHENOMENA.keys()


class EvaluationReport(Reported):
    """The figures of one model. `prefix_token` starts every sentence; None without pairs."""

    kind: Literal["evaluation report"] = "evaluation report"
    job: EvaluationJob
    architecture: str
    parameters: int
    device: str
    libraries: dict[str, str]
    prefix_token: str | None
    held_out: HeldOutScores | None
    minimal_pairs: PairScores | None


def table(report: EvaluationReport) -> str:
    about = f"{report.job.model}, {report.architecture}, {report.parameters:,} parameters"
    rows = [("model", f"{about}, {report.job.dtype} on {report.device}")]
    held = report.held_out
    if held is not None:
        per_byte = held.cross_entropy_per_byte is not None
        rows += [
            ("held-out tokens", f"{held.tokens:,} of {report.job.cache}"),
            (
                "cross-entropy",
                f"{held.cross_entropy_per_token:.4f} nats per token"
                + (f", {held.cross_entropy_per_byte:.4f} nats per byte" if per_byte else ""),
            ),
            (
                "perplexity",
                f"{held.perplexity_per_token:,.2f} per token"
                + (f", {held.perplexity_per_byte:,.4f} per byte" if per_byte else ""),
            ),
        ]
        if per_byte:
            rows.append(("bits per byte", f"{held.bits_per_byte:.4f}"))
        rows += quality_rows(held)
    scores = report.minimal_pairs
    if scores is not None:
        blimp = scores.is_blimp
        rows.append(("minimal pairs", f"{scores.pairs:,} of {report.job.pairs}, after {report.prefix_token}"))
        rows += [
            (f"  {name}", f"{_with_error(group.accuracy, group.stderr)} of {group.pairs:,}")
            for name, group in scores.groups.items()
        ]
        rows += [
            (
                "mean of groups",
                f"{_with_error(scores.mean_over_groups, scores.mean_over_groups_stderr)} ({len(scores.groups)}"
                + (": the BLiMP score of the BabyLM papers)" if blimp else ")"),
            ),
            (
                "mean of paradigms",
                f"{_with_error(scores.mean_over_paradigms, scores.mean_over_paradigms_stderr)} ({len(scores.paradigms)}"
                + (": BLiMP's own overall score)" if blimp else ")"),
            ),
            (
                "undecided",
                f"{counted(scores.close, 'pair')} closer than 1e-4 nats, {scores.tied:,} of them equal (wrong)",
            ),
        ]
    return labelled(rows)


def _with_error(accuracy: float, stderr: float | None) -> str:
    return f"{accuracy:.2%}" + ("" if stderr is None else f" ± {100 * stderr:.2f}")
