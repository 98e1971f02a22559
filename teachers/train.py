"""`train-teacher`: a model from scratch on a cache's token stream, with the student's trainer and no targets.

The same command makes the control of a distillation run: equal --cache, --model, --seed, --window-tokens, --offset
and training fields give the same weights at the start and the same windows in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from student.cli import PresetCommand, run_command, run_options

if TYPE_CHECKING:
    from student.job import TrainingReport

_EXAMPLE = """\b
Example:
  train-teacher --cache runs/cache --model gpt2-mini --eval-cache runs/held-out \\
      --output-dir runs/teacher --set num_train_epochs=4 --set learning_rate=1e-3
"""


def train_teacher_model(**fields: Any) -> TrainingReport:
    """Train on a cache's tokens with plain cross-entropy: a `student.job.StudentJob` without teachers.

    Takes the job's other fields (cache, model, output_dir, …); raises what `student.run.train` raises.
    """
    from student.job import StudentJob
    from student.run import train

    return train(StudentJob(**fields, teachers=(), alpha=1.0))


@click.command(cls=PresetCommand, help="Train a model from scratch on a cache's token stream.\n\n" + _EXAMPLE)
@run_options
def train_teacher(**flags: Any) -> None:
    run_command("train-teacher", flags, trains_teacher=True)


if __name__ == "__main__":
    train_teacher()
