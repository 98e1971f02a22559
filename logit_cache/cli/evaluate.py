"""`logit-cache evaluate`: a saved model's scores on held-out text and on minimal pairs."""

from __future__ import annotations

from typing import Any

import click

from storage.errors import one_line_errors
from storage.files import check_output, write_output
from student.cli_command import command, json_option


@command("logit-cache evaluate run/student --cache run/valid --pairs blimp --out run/student.json")
@click.argument("model", metavar="MODEL_DIR")
@click.option("--cache", metavar="URL", help="Held-out cache of the model's tokenizer; its tokens are scored.")
@click.option(
    "--teacher", "teachers", multiple=True, metavar="NAME", help="Entry of that cache to measure the KL to; repeatable."
)
@click.option("--pairs", metavar="FOLDER", help="Folder of JSONL files with minimal pairs, as BLiMP's.")
@click.option("--window-tokens", type=click.IntRange(min=1), metavar="T", help="Positions of a held-out window [128].")
@click.option(
    "--isolate-documents/--cross-documents",
    default=None,
    help="Whether windows stay inside documents [as the teachers; else across].",
)
@click.option(
    "--bos-each-window/--no-bos-each-window",
    default=None,
    help="Put BOS before windows that start elsewhere [as the teachers; else not].",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Windows, or sentences, in one pass at most [64].")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="First N pairs of each paradigm only.")
@click.option(
    "--leading-space/--as-written",
    default=None,
    help="A space before each sentence, as lm-eval's blimp task has it [leading space].",
)
@click.option("--device", help="cpu, cuda, cuda:1, …  [CUDA where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the weights [float32].")
@click.option(
    "--lm-eval-tasks",
    metavar="FOLDER",
    help="Also write the pairs there, as tasks that lm-eval runs without a network.",
)
@click.option("--out", metavar="FILE", help="Also write the report there, as JSON.")
@json_option()
def evaluate(model: str, out: str | None, as_json: bool, **flags: Any) -> None:
    """Score a saved model: loss, perplexity and calibration on held-out text, accuracy on minimal pairs.

    Any causal language model that transformers saved, with its tokenizer. Needs --cache, --pairs or both.
    """
    with one_line_errors():
        from storage.config import build_config
        from storage.progress import progress, to_stderr
        from student.evaluation.job import EvaluationJob

        path = None if out is None else check_output(out, "--out")
        job = build_config(EvaluationJob, {"model": model}, flags, "logit-cache evaluate")
        job.check()
        from student.evaluation.evaluate import evaluate as measure
        from student.evaluation.report import table

        report = measure(job, progress, to_stderr)
        if path is not None:
            write_output(path, (report.model_dump_json(indent=1) + "\n").encode())
        click.echo(report.model_dump_json(indent=1) if as_json else table(report))
        if job.lm_eval_tasks is not None:
            click.echo(
                f"lm-eval on the same pairs: lm_eval run --model hf --model_args pretrained={model},dtype={job.dtype} "
                f"--include_path {job.lm_eval_tasks} --tasks pairs",
                err=True,
            )
