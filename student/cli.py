"""`train-student`: a student from cached targets. The options are shared with `train-teacher`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from student.cli_command import Command, Decorator, applied, command, json_option, under, write_lines

if TYPE_CHECKING:
    from student.job import StudentJob
    from student.report import TrainingReport
    from student.training.run import LoadLive

_EXAMPLE = """\
train-student --cache runs/cache --teacher gpt2 --teacher llama:2 --model llama-mini \\
    --alpha 0.5 --temperature 2 --eval-cache runs/held-out --output-dir runs/student \\
    --set learning_rate=3e-4 --set num_train_epochs=4"""
_run, _windows, _loss = under("Run"), under("Windows and steps"), under("Loss")

RUN_OPTIONS: tuple[Decorator, ...] = (
    _run("--cache", metavar="URL", help="Cache whose token stream is trained on."),
    _run("--model", metavar="PRESET|JSON|DIR", help="Preset, config.json, or model directory or hub id."),
    _run("--output-dir", metavar="DIR", help="Directory of this run alone; the model is saved there."),
    _run("--attention", metavar="NAME", help="Implementation of attention, as sdpa or eager [transformers' choice]."),
    _run("--lora", metavar="r=16,…", help="Train a LoRA on the model: r; alpha [2r], dropout [0], targets [peft's]."),
    _run("--merge", is_flag=True, default=None, help="Save the LoRA merged into a whole model [the adapter alone]."),
    _run(
        "--save-dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Of the saved weights [as the student's own weights are; float32 for a new one and for an adapter].",
    ),
    _run("--eval-cache", metavar="URL", help="Held-out cache of the same tokenizer, for the final figures."),
    _run(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="A field of TrainingArguments; repeatable "
        "[learning_rate=1e-3 and weight_decay=0.1; 2e-5 and 0 for a model with weights, 2e-4 for a LoRA; "
        "a checkpoint every 500 steps and every minute, of which the last is kept: save_steps, save_strategy, "
        "save_total_limit].",
    ),
    _run("--config", metavar="YAML", help="File with these fields; `training:` holds TrainingArguments."),
    _run("--seed", type=int, help="Seed of weights, order, offsets and dropout [0]."),
    _windows(
        "--window-tokens",
        type=int,
        metavar="T",
        help="Positions of a training window [128; for a model with weights the teachers' context, 1,024 without].",
    ),
    _windows(
        "--windows-per-step",
        type=int,
        metavar="G",
        help="Windows of an optimizer step over all processes; gradient accumulation follows, and "
        "per_device_train_batch_size limits the micro-batch [that, times processes and accumulation].",
    ),
    _windows(
        "--offset",
        type=click.Choice(["fixed", "random"]),
        help="Fixed blocks, or a random offset for each block and epoch [fixed].",
    ),
    _windows(
        "--isolate-documents/--cross-documents",
        default=None,
        help="Whether windows stay inside documents [as the teachers did; else across].",
    ),
    _windows(
        "--bos-each-window/--no-bos-each-window",
        default=None,
        help="Put BOS before windows that start elsewhere [as the teachers did; else not].",
    ),
    _windows(
        "--pack-documents/--pad-documents",
        default=None,
        help="Whether documents that windows stay inside share windows [yes; padded for --loss-scale babyllama].",
    ),
    _windows(
        "--fused-head",
        type=click.Choice(["auto", "on", "off"]),
        help="Fuse LM head and loss, without holding the logits [auto: where the model allows it].",
    ),
)
"""The options of every training command."""

OBJECTIVE_OPTIONS: tuple[Decorator, ...] = (
    _loss(
        "--alpha",
        type=float,
        help="Share of the cross-entropy, 0..1 [0 with sampled ids, 0.5 with top-k; 1 without teachers].",
    ),
    _loss("--alpha-end", type=float, help="That share at the last step, linear from --alpha [the same]."),
    _loss("--temperature", type=float, help="1 or 2, where the stored targets are exact [1]."),
    _loss("--temperature-end", type=float, help="That at the last step, linear from --temperature [the same]."),
    _loss(
        "--interpolate-tail",
        is_flag=True,
        default=None,
        help="Allow other temperatures above 1, as a schedule passes through: the tail's mass is interpolated, within "
        "bounds that are printed.",
    ),
    _loss(
        "--loss",
        type=click.Choice(
            ["forward-kl", "reverse-kl", "jsd", "skew-forward-kl", "skew-reverse-kl", "tail-aware-kl", "lightning-opd"]
        ),
        help="Divergence of teacher and student; a mixture of teachers needs forward-kl; lightning-opd is of the "
        "student's own samples [forward-kl].",
    ),
    _loss("--mix", type=float, help="beta of jsd [0.5], lambda of the skewed losses [0.1]."),
    _loss("--mix-end", type=float, help="That at the last step, linear from --mix [the same]."),
    _loss("--head-ids", type=int, metavar="N", help="Of tail-aware-kl: the likeliest ids, all others its tail [10]."),
    _loss("--tail-weight", type=float, help="Of tail-aware-kl: beta, over the tail's mean mass in a sequence [2]."),
    _loss(
        "--tail",
        type=click.Choice(["auto", "bucket", "sampled", "controlled", "blend", "renormalise", "none"]),
        help="The ids that are not stored, as one outcome (bucket: a lower bound of the dense loss), by the "
        "sampled ids of a VarOpt entry (sampled: unbiased; controlled: with a control variate, less noise), by bucket "
        "and sampled (blend), or not at all (renormalise, none: biased). All but bucket need forward-kl [auto: sampled "
        "for entries with sampled ids, else bucket].",
    ),
    _loss("--blend", type=float, help="Share of sampled in --tail blend [0.75]."),
    _loss(
        "--loss-scale",
        type=click.Choice(["token", "babyllama"]),
        help="Means over tokens; or BabyLlama's: the divergence summed over each window [token].",
    ),
    _loss("--min-entropy", type=float, help="Distil only where the teachers' entropy is at least this, in nats [0]."),
)
"""The options of a loss with teachers in it: the fields of `student.loss.objective.Objective`."""


def run_command(
    command: str, flags: dict[str, Any], trains_teacher: bool = False, load_live: LoadLive | None = None
) -> None:
    """Build the job from `--config` and the flags, run it, and print the report."""
    with our_errors(command):
        job = build_job(command, flags, trains_teacher)
        from student.training.run import train

        report = train(job, load_live=load_live)
        if os.environ.get("RANK", "0") == "0":
            click.echo(report.model_dump_json(indent=1) if flags["as_json"] else table(report))
        _leave_process_group()


def run_sweep(command: str, path: str, flags: dict[str, Any]) -> None:
    """Run the sweep that a file and flags describe, and print its trials, best first."""
    with our_errors(command):
        from storage.errors import InputError
        from student.sweep.search_space import read_sweep

        if flags["config"]:
            raise InputError(f"{command}: --sweep and --config are two files of the same fields; give one of them")
        fields, search = read_sweep(path)
        job = build_job(command, flags | {"config": fields})
        from student.sweep.record import table as sweep_table
        from student.sweep.run import sweep

        report = sweep(job, search)
        click.echo(report.model_dump_json(indent=1) if flags["as_json"] else sweep_table(report, job.output_dir))


def build_job(command: str, flags: dict[str, Any], trains_teacher: bool = False) -> StudentJob:
    """The job that a config file, or the fields read from one, and flags describe; flags win, `--set` over `training:`
    field by field."""
    from storage.config import build_config, read_yaml
    from storage.errors import InputError
    from student.job import StudentJob, parse_settings

    flags = dict(flags)
    flags.pop("as_json")
    config, settings = flags.pop("config"), parse_settings(flags.pop("settings"))
    stored = read_yaml(config) if isinstance(config, str) else dict(config or {})
    training = stored.get("training") or {}
    if not isinstance(training, dict):
        raise InputError(f"{config}: training holds TrainingArguments fields, found {type(training).__name__}")
    if trains_teacher and stored.get("teachers"):
        raise InputError(f"{config}: train-teacher learns from the tokens alone; use train-student with teachers")
    if "teacher" in flags:
        flags["teachers"] = flags.pop("teacher")
    flags["training"] = {**training, **settings} or None
    for name in flags:
        if isinstance(flags[name], str) and not flags[name]:
            raise InputError(f"{command}: --{name.replace('_', '-')} is empty")
    return build_config(StudentJob, config, flags, command)


@contextlib.contextmanager
def our_errors(command: str) -> Iterator[None]:
    """Print errors of this program as one line, on rank 0 alone, and exit with their status."""
    from storage.errors import LogitCacheError, one_line_errors

    if os.environ.get("RANK", "0") == "0":
        with one_line_errors():
            yield
        return
    try:
        yield
    except LogitCacheError as error:
        sys.exit(error.exit_status)


def _leave_process_group() -> None:
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def table(report: TrainingReport) -> str:
    from storage.text import counted, labelled
    from student.loss.objective import TEACHER_CROSS_ENTROPY
    from student.report import parameters_in_words, quality_rows

    rows = [
        ("model", f"{report.job.model}, {parameters_in_words(report.parameters, report.trained_parameters)}"),
        ("trained on", f"{_trained(report)} in {counted(report.steps, 'step')}, {report.seconds:,.1f} s"),
    ]
    if report.train_log:
        last = report.train_log[-1]
        rows.append(("last training loss", f"{last['loss']:.4f}, logged at step {last['step']:,}"))
        for teacher, meaning in report.divergence.items():
            for figure in (f"{report.job.log_name}_{teacher}", f"{TEACHER_CROSS_ENTROPY}_{teacher}"):
                if figure in last:
                    rows.append((f"its {report.job.loss} to {teacher}", f"{last[figure]:.4f} nats ({meaning})"))
    if report.available is not None:
        rows.append(("available", report.available.in_words()))
    rows += [(f"taught by {teacher.name}", report.taught_by(teacher)) for teacher in report.job.teachers]
    held = report.held_out
    if held is None:
        rows.append(("held out", "not measured (no --eval-cache)"))
    else:
        rows += [
            ("held-out tokens", f"{held.tokens:,}"),
            ("cross-entropy", f"{held.cross_entropy:.4f} nats per token"),
            ("perplexity", f"{held.perplexity:,.2f}"),
        ]
        if held.bits_per_byte is not None:
            rows.append(("bits per byte", f"{held.bits_per_byte:.4f}"))
        rows += quality_rows(held)
    rows.append(("saved in", report.job.output_dir))
    return labelled(rows)


def _trained(report: TrainingReport) -> str:
    if report.tokens_trained in (None, report.tokens_seen):
        return f"{report.tokens_seen:,} tokens"
    return f"{report.tokens_trained:,} tokens, of {report.tokens_seen:,} read,"


class PresetCommand(Command):
    """A command whose help ends with the presets, which are looked up only when help is printed."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from student.models.presets import describe_presets

        super().format_epilog(ctx, formatter)
        write_lines(formatter, "Presets", describe_presets())


@command(_EXAMPLE, cls=PresetCommand, resumes=True)
@_run(
    "--teacher",
    multiple=True,
    metavar="NAME[:WEIGHT][@source=SOURCE]",
    help="Teacher entry to learn from, in the documents of a source alone where one is named; repeat for a mixture "
    "with these weights.",
)
@_run(
    "--available",
    is_flag=True,
    default=None,
    help="Train on the committed shards of entries that are still being written; a run resumes with its first ones.",
)
@applied(RUN_OPTIONS)
@applied(OBJECTIVE_OPTIONS)
@click.option(
    "--sweep",
    metavar="YAML",
    help="Run many students: a file like --config with a block `sweep:` (docs/sweeps.md); needs the extra tune.",
)
@json_option()
def train_student(sweep: str | None, **flags: Any) -> None:
    """Train a student on cached targets, with no teacher loaded."""
    if sweep is None:
        run_command("train-student", flags)
    else:
        run_sweep("train-student", sweep, flags)


if __name__ == "__main__":
    train_student()
