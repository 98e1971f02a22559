"""`train-teacher`: a model from scratch on a cache's token stream, with the student's trainer and no targets.

The same command trains the control of a distillation run: equal --cache, --model, --seed, --window-tokens, --offset
and training fields give the same initial weights and the same windows in the same order. With --live-teacher it is the
run that a cache replaces: the same student with its teachers in memory, for a comparison of results and cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from student.cli import OBJECTIVE_OPTIONS, RUN_OPTIONS, PresetCommand, run_command
from student.cli_command import applied, command, json_option, under

if TYPE_CHECKING:
    import torch

    from student.job import StudentJob
    from student.loss.dense import LogitSource

_EXAMPLE = """\
train-teacher --cache runs/cache --model gpt2-mini --eval-cache runs/held-out \\
    --output-dir runs/teacher --set num_train_epochs=4 --set learning_rate=1e-3
# for comparison with a student from the cache, its teachers in memory for every step:
train-teacher --cache runs/cache --model llama-mini --eval-cache runs/held-out --output-dir runs/live \\
    --live-teacher runs/gpt2 --live-teacher runs/llama --combine logit-mean --temperature 2 --alpha 0.5"""
_live = under("Live teachers")


@command(_EXAMPLE, cls=PresetCommand, resumes=True)
@applied(RUN_OPTIONS)
@_live(
    "--live-teacher",
    "live_teachers",
    multiple=True,
    metavar="DIR",
    help="Model that runs beside the student, for comparison with a cached one; repeatable.",
)
@_live(
    "--combine",
    type=click.Choice(["logit-mean", "mixture"]),
    help="How several live teachers are combined: the mean of their logits, or a mixture of their probabilities.",
)
@applied(OBJECTIVE_OPTIONS)
@json_option()
def train_teacher(**flags: Any) -> None:
    """Train a model from scratch on a cache's token stream."""
    run_command("train-teacher", flags, trains_teacher=True, load_live=_load_live)


def _load_live(job: StudentJob, device: torch.device) -> LogitSource:
    # Imported only for a job with live teachers: the import takes seconds.
    from teachers.live import load_live

    return load_live(job, device)


if __name__ == "__main__":
    train_teacher()
