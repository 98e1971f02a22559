"""What a finished run says of itself: `report.json`, and what `--json` prints."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from storage.config import Frozen
from student.job import StudentJob


class HeldOutKL(Frozen):
    """KL(teacher || student) in nats per token; `lower_bound` where the tail is a bucket: not where every id was
    stored (K = V), nor where drawn ids estimate it without bias."""

    nats: float
    lower_bound: bool


class HeldOutReport(Frozen):
    """Held-out figures of the finished model, over every labelled position of the evaluation cache once.

    cross_entropy in nats per token; bits_per_byte counts the bytes of the text, and is None where not all of it is
    scored; ece (expected calibration error of the top-1 prediction) and accuracy are fractions. `kl_not_measured`
    says why, by teacher. distillation_loss is what the run trained on (alpha as at its end), per token; None where the
    held-out cache has not the targets for it.
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


class LiveTeachers(Frozen):
    """Teachers that ran beside the student: where they came from, and what tells them from others."""

    sources: tuple[str, ...]
    combine: str
    provenance: dict[str, str]


class PeakMemory(Frozen):
    """The most that a process held: resident bytes, and bytes of torch's allocator on a CUDA device (else None).

    Of the process that finished the run, and the first where there were several.
    """

    process_bytes: int
    device_bytes: int | None


class TailBound(Frozen):
    """How far a teacher's mass outside its certain ids can be from the interpolated one, as a share of 1."""

    mean: float
    greatest: float
    positions: int


class TrainingReport(Frozen):
    """What a run did; `report.json` in its output directory.

    job                 as it ran, `training` with the defaults filled in
    provenance          sha256 of the records of the caches and entries that it read, by `cache`,
                        `cache/<teacher>`, `eval_cache`, `eval_cache/<teacher>`
    isolated_documents  whether windows stayed inside documents
    steps               optimizer steps, of `windows_per_step` windows each over all processes
    windows_at_once     of a process, in one of the step's micro-batches
    tokens_seen         positions read for training, all epochs together
    seconds             spent in training by the process that finished; `resumed_from_step` says where it took over
    fused_head          whether the output layer and the loss were one
    divergence          by teacher: what the divergence in `train_log` is, against the dense one
    tail_bounds         by teacher, at temperatures whose tails are interpolated
    train_log           one entry per logged step: step, epoch, loss, cross_entropy, kl_<teacher> (under other losses
                        by their name, as jsd_<teacher>), learning_rate, …
    eval_log            the evaluations made during training
    live                the teachers that ran beside the student, if any did
    """

    # A run that diverged has no figures, and its report must still be JSON that can be read again.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    kind: Literal["training report"] = "training report"
    job: StudentJob
    provenance: dict[str, str]
    isolated_documents: bool
    parameters: int
    steps: int
    windows_per_step: int
    windows_at_once: int | None = None
    tokens_seen: int
    seconds: float
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
