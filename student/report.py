"""The report of a finished run: `report.json`, and the output of `--json`."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

from pydantic import Field

from storage.config import Frozen, Reported
from storage.text import counted
from student.job import StudentJob, TeacherWeight
from student.loss.objective import TEACHER_CROSS_ENTROPY

Seconds = Annotated[float, Field(ge=0, le=1e12)]
"""A duration that a record states. No run takes 30,000 years, and nothing is computed from a number beyond."""

Probability = Annotated[float, Field(ge=0, le=1)]

RUN_FILE, REPORT_FILE, PASSAGE_FILE = "run.json", "report.json", "passage.json"
"""Records in a run's folder: what was asked, what came of it, and what the model expects in a held-out passage."""

PASSAGE_POSITIONS, PASSAGE_IDS = 128, 10
"""How much a run keeps of what its model expects in the held-out text, at most."""

FIGURES = ("loss", "perplexity", "ece", "accuracy")
"""The figures of every evaluation, as logs, `metric_for_best_model` and sweeps name them; loss is the cross-entropy."""


class HeldOutKL(Frozen):
    """KL(teacher || student) in nats per token; `lower_bound` with a tail bucket: not where every id is stored
    (K = V), nor where sampled ids give an unbiased estimate. `cross_entropy`: where the teacher's entropy is not
    stored, the cross-entropy to it, which is larger by that entropy."""

    nats: float
    lower_bound: bool
    cross_entropy: bool = False

    @property
    def log_name(self) -> str:
        """The prefix to a teacher's name in the names of logged figures."""
        return TEACHER_CROSS_ENTROPY if self.cross_entropy else "kl"


class Quality(Protocol):
    """Held-out figures that do not depend on how text is counted, as `HeldOutReport` has them."""

    ece: float
    accuracy: float
    kl: dict[str, HeldOutKL]
    kl_not_measured: dict[str, str]


def quality_rows(held: Quality) -> list[tuple[str, str]]:
    rows = [("calibration error", f"{held.ece:.2%}"), ("accuracy", f"{held.accuracy:.2%}")]
    for name, one in held.kl.items():
        note = " (a lower bound: the tail counts as one bucket)" if one.lower_bound else ""
        figure = "cross-entropy to" if one.cross_entropy else "KL to"
        rows.append((f"{figure} {name}", f"{one.nats:.4f} nats{note}"))
    return [*rows, *((f"KL to {name}", f"not measured: {why}") for name, why in held.kl_not_measured.items())]


class HeldOutReport(Frozen):
    """Held-out figures of the finished model, over every labelled position of the evaluation cache once.

    cross_entropy in nats per token; bits_per_byte counts the bytes of the text, and is None where not all of it is
    scored; ece (expected calibration error of the top-1 prediction) and accuracy are fractions. `kl_not_measured`
    gives the reason, by teacher. distillation_loss is the training objective as at the end of the run, per token; None
    where the held-out cache lacks the targets for it.
    """

    tokens: int
    cross_entropy: float
    perplexity: float
    bits_per_byte: float | None
    ece: float
    accuracy: float
    kl: dict[str, HeldOutKL] = Field(default_factory=dict)
    kl_not_measured: dict[str, str] = Field(default_factory=dict)
    distillation_loss: float | None = None

    def logged(self, prefix: str = "eval") -> dict[str, float]:
        """The figures by their names: `FIGURES`, and those of the loss and of the teachers."""
        found = dict(zip(FIGURES, (self.cross_entropy, self.perplexity, self.ece, self.accuracy), strict=True))
        if self.distillation_loss is not None:
            found["distillation_loss"] = self.distillation_loss
        found |= {f"{kl.log_name}_{name}": kl.nats for name, kl in self.kl.items()}
        return {f"{prefix}_{name}": value for name, value in found.items()}


class Expected(Frozen):
    """What a model expects at one position: the likeliest next ids with their probabilities, most probable first; the
    entropy of its whole distribution, and the log-prob of the token that follows, in nats."""

    likeliest: tuple[tuple[Annotated[int, Field(ge=0, lt=1 << 32)], Probability], ...] = Field(max_length=PASSAGE_IDS)
    entropy: float = Field(ge=0, allow_inf_nan=False)
    label_logprob: float = Field(le=0, allow_inf_nan=False)


class Passage(Frozen):
    """What a finished model expects in the first document of its held-out text: `passage.json` beside its report.

    stream_sha256  of the held-out token stream
    start          the first position; `expected` are neighbours
    """

    kind: Literal["passage"] = "passage"
    stream_sha256: str
    start: int = Field(ge=0, lt=1 << 48)
    expected: tuple[Expected, ...] = Field(min_length=1, max_length=PASSAGE_POSITIONS)


class LiveTeachers(Frozen):
    """Teachers that ran beside the student: their sources, their combination and their identity."""

    sources: tuple[str, ...]
    combine: str
    provenance: dict[str, str]


class PeakMemory(Frozen):
    """Peak memory of the process that finished the run (rank 0 of several): resident bytes, and bytes of torch's
    allocator on a CUDA device (else None)."""

    process_bytes: int
    device_bytes: int | None


class TailBound(Frozen):
    """Bound on the error of a teacher's mass outside its certain ids, in 0..1, when the tail is interpolated: its mean
    and its greatest value over `positions`."""

    mean: float
    greatest: float
    positions: int


def parameters_in_words(parameters: int, trained: int | None) -> str:
    if trained in (None, parameters):
        return f"{parameters:,} parameters"
    return f"{parameters:,} parameters, of which {trained:,} ({trained / parameters:.2%}) are trained"


class AvailableText(Frozen):
    """The text of a run with `available`: committed positions by teacher, and the positions of the windows that lie in
    what is committed of all, of those that the windows of the whole text have."""

    committed: dict[str, int]
    positions: int
    of: int

    def in_words(self) -> str:
        committed = ", ".join(f"{number:,} of {name}" for name, number in self.committed.items())
        return (
            f"{self.positions / self.of:.2%} of the text: {self.positions:,} of {self.of:,} positions are in windows "
            f"that lie within the committed shards ({committed})"
        )


class TrainingReport(Reported):
    """The figures and provenance of a run; `report.json` in its output directory.

    job                 as it ran, `training` with the defaults filled in
    provenance          sha256 of the records of the caches and entries that it read, by `cache`,
                        `cache/<teacher>`, `eval_cache`, `eval_cache/<teacher>`
    isolated_documents  whether windows stayed inside documents
    available           how much of the text a run reads that began before its teachers' entries were complete; the
                        ranges of positions are in the job
    parameters          those of the model, of which `trained_parameters` are trained (None: all, in earlier reports)
    steps               optimizer steps, of `windows_per_step` windows each over all processes
    windows_at_once     windows of a process in one of the step's micro-batches
    tokens_seen         positions read for training, all epochs together
    tokens_trained      those of them that are trained on; None in reports from before there was a loss mask
    tokens_taught       by teacher: those of these for which it has targets and, where it teaches the documents of some
                        sources, in these; without a teacher of which its entry's record does not say where it has some
    seconds             training time of the process that finished, since `resumed_from_step`
    fused_head          whether the LM head was fused with the loss
    divergence          by teacher: how the divergence in `train_log` relates to the dense one
    tail_bounds         by teacher, at temperatures whose tails are interpolated
    train_log           one entry per logged step, the last step among them: step, epoch, and means over the steps since
                        the entry before it: loss, cross_entropy, kl_<teacher> (under other losses by their name, as
                        jsd_<teacher>; over positions with targets), learning_rate, …; with tail controlled
                        control_<teacher>, its coefficient after the step
    eval_log            the evaluations made during training
    live                the teachers that ran beside the student, if any did
    """

    kind: Literal["training report"] = "training report"
    job: StudentJob
    provenance: dict[str, str]
    isolated_documents: bool
    available: AvailableText | None = None
    parameters: int
    trained_parameters: int | None = None
    steps: int
    windows_per_step: int
    windows_at_once: int | None = None
    tokens_seen: int
    tokens_trained: int | None = None
    tokens_taught: dict[str, int] = Field(default_factory=dict)
    seconds: Seconds
    resumed_from_step: int = 0
    device: str
    fused_head: bool = False
    processes: int
    libraries: dict[str, str]
    divergence: dict[str, str] = Field(default_factory=dict)
    tail_bounds: dict[str, TailBound] = Field(default_factory=dict)
    train_log: list[dict[str, int | float]]
    eval_log: list[dict[str, int | float]]
    held_out: HeldOutReport | None
    live: LiveTeachers | None = None
    peak_memory: PeakMemory | None = None

    def taught_by(self, teacher: TeacherWeight) -> str:
        """`120,000 positions in documents of math`."""
        number = self.tokens_taught.get(teacher.name)
        return ("positions with targets" if number is None else counted(number, "position")) + teacher.in_documents
