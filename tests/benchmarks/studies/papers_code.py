"""The papers' own trainer beside ours: one student, the same teachers, weights, windows, order and schedule.

    pip install --no-deps --target OLD transformers==4.44.0 accelerate==0.33.0 tokenizers==0.19.1 \\
        huggingface-hub==0.24.7
    python tests/benchmarks/studies/papers_code.py RUN --code BabyLlama-2 --packages OLD \\
        --text train/*.txt --eval-text valid/*.txt [--temperature 2] [--figure docs/images/papers-code.svg]

`--code` is a clone of github.com/JLTastet/BabyLlama-2 (commit 8c6685d), `--packages` the versions that its
requirements.txt names, laid in front of the installed ones; torch is ours. Its `distill_from_multiple_teachers.py` runs
as it is, up to the guard behind which it logs to a service and scores on a GPU: its data set, collator, trainer, loss
and evaluation, with a configuration file of its own form. What is set from outside:

- `datasets` and `peft`, which the old packages would import in a newer version, are hidden; the code uses neither;
- its token files are the cache's streams, and tokenizer.json has merges in the form that the old packages read;
- the student's initial weights are ours;
- windows are the fixed blocks of its data set (`random_chunk` off, as in Baby Llama's own training), in our order;
- the student's weights are kept after each epoch.

Every result is a file in RUN; what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steps import command, write_json
from which_targets import framed

VOCABULARY = 2_048
WINDOW, BATCH = 128, 8
TEXT_BYTES, EVAL_TEXT_BYTES = 140_000, 40_000
EPOCHS, SEED = 12, 0
ALPHA = 0.5
SCHEDULE = {"learning_rate": 2e-3, "warmup_steps": 50, "weight_decay": 1.75}
NETWORK = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 144,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "max_position_embeddings": 2 * WINDOW,
    "tie_word_embeddings": False,
}
TEACHERS = ("one", "two")
# The students: what they are called, and their colour in the figure.
STUDENTS = {
    "papers": ("the papers' code, teachers live", "#c9c9c9"),
    "live": ("ours, teachers live", "#c44e52"),
    "full": ("ours, from a cache with K = V", "#55a868"),
    "default": ("ours, from a cache of the default", "#4c72b0"),
    "control": ("ours, without teachers", "#dd8452"),
}
_WIDE = ".s-papers .line { stroke-width: 7 } .s-papers .dot { fill: none }"
HIDDEN = ("datasets", "peft")


def trimmed(tokens: int) -> int:
    """The most of some tokens that both codes cut into the same windows and whole steps.

    Theirs has ``N // WINDOW`` windows; ours, in which the last token of a window is trained on too,
    ``ceil((N - 1) / WINDOW)``.
    """
    return (tokens - 1) // (WINDOW * BATCH) * WINDOW * BATCH + 1


def with_old_merges(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json whose merges are `"a b"`, as tokenizers before 0.20 read them, and not `["a", "b"]`."""
    model = dict(tokenizer["model"])
    model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {**tokenizer, "model": model}


def make_stream(run: Path, name: str, files: Sequence[str], size: int) -> None:
    """A stream of `trimmed` length, of about `size` bytes of the files."""
    if (run / name / "zarr.json").exists():
        return
    from storage import LogitCache

    whole, text = run / f"{name}-whole", run / f"{name}-text"
    texts = [part for file in files for part in ("--text", file)]
    command("logit-cache", "clean", *texts, "--out", text, "--limit-bytes", size // len(files), threads=1)
    tokenizer = ("--train-tokenizer", VOCABULARY) if name == "train" else ("--tokenizer", run / "train-whole/tokenizer")
    cleaned = [part for file in files for part in ("--text", text / Path(file).name)]
    command("logit-cache", "tokenize", *cleaned, *tokenizer, "--out", whole, threads=1)
    tokens = LogitCache.open(str(whole)).tokens
    rows = run / f"{name}.jsonl"
    rows.write_text(json.dumps({"input_ids": tokens.read(0, trimmed(len(tokens))).tolist()}), encoding="utf-8")
    command("logit-cache", "tokenize", "--text", rows, "--row-form", "input_ids", "--tokenizer", whole / "tokenizer",
            "--out", run / name, threads=1)  # fmt: skip


def train(run: Path, name: str, program: str, *options: object) -> None:
    """One of our students, or a teacher; each epoch is evaluated, and each step logged."""
    settings = {
        **SCHEDULE,
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "eval_strategy": "epoch",
        "logging_steps": 1,
    }
    fields = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command(program, "--cache", run / "train", "--eval-cache", run / "valid", "--output-dir", run / name,
            "--window-tokens", WINDOW, "--offset", "fixed", *fields, *options, threads=1)  # fmt: skip


def prepare(run: Path, text: Sequence[str], eval_text: Sequence[str]) -> None:
    """Streams, teachers and the student's initial weights."""
    make_stream(run, "train", text, TEXT_BYTES)
    make_stream(run, "valid", eval_text, EVAL_TEXT_BYTES)
    network = run / "network.json"
    write_json(network, NETWORK)
    for number, name in enumerate(TEACHERS, 1):
        best = ("save_strategy=epoch", "load_best_model_at_end=true", "metric_for_best_model=loss")
        train(run, name, "train-teacher", "--model", network, "--seed", SEED + number,
              *(part for value in best for part in ("--set", value)))  # fmt: skip
    if not (run / "initial").exists():
        from storage import LogitCache
        from student import load_student
        from student.models.saved_tokenizer import saved_tokenizer
        from student.models.tokenizer import special_ids

        tokenizer = saved_tokenizer(LogitCache.open(str(run / "train")), str(network), print)
        student = load_student(
            network,
            vocabulary_size=VOCABULARY,
            special_ids=special_ids(tokenizer, str(network)),
            window_tokens=WINDOW,
            seed=SEED,
        )
        student.save_pretrained(run / "initial")


def train_ours(run: Path, temperature: float) -> None:
    paths = [run / name for name in TEACHERS]
    own = ("--model", run / "initial", "--seed", SEED)
    objective = ("--alpha", ALPHA, "--temperature", temperature, "--loss-scale", "babyllama")
    train(run, "control", "train-student", *own)
    live = [part for path in paths for part in ("--live-teacher", path)]
    train(run, "live", "train-teacher", *own, *live, "--combine", "logit-mean", *objective)
    members = [part for path in paths for part in ("--teacher", path)]
    stored = {
        "full": ("--targets", "topk", "-k", VOCABULARY),
        "default": ("--target-temperature", temperature),
    }
    for name, options in stored.items():
        command("cache-logits", "--cache", run / "train", *members, "--combine", "logit-mean", "--name", name, *options,
                threads=1)  # fmt: skip
        train(run, name, "train-student", *own, "--teacher", name, *objective)


def write_papers_inputs(run: Path, temperature: float) -> None:
    """What the papers' code reads: its configuration, tokenizer and token files; and the order of windows."""
    import torch

    from storage import LogitCache
    from student import DistillationWindows, reading_order

    folder = run / "papers"
    for name in ("train", "valid"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        tokens = LogitCache.open(str(run / name)).tokens
        # The name by which its data set finds text that is tokenized already.
        torch.save(
            torch.from_numpy(tokens.read(0, len(tokens)).astype("int64")),
            folder / name / f"tokenized_GPT2TokenizerFast_{VOCABULARY}.pt",
        )
    tokenizer = json.loads((run / "train/tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer.json", with_old_merges(tokenizer))
    windows = DistillationWindows(str(run / "train"), (), WINDOW, "fixed", SEED)
    order = reading_order(windows, BATCH, whole_steps=True)
    write_json(folder / "order.json", [order.permutation(epoch).tolist() for epoch in range(EPOCHS)])
    # JSON is YAML.
    write_json(folder / "config.yaml", papers_config(folder, temperature))


def papers_config(folder: Path, temperature: float) -> dict[str, Any]:
    """The configuration file of `distill_from_multiple_teachers.py`."""
    valid = str(folder / "valid")
    return {
        "data": {
            "tokenizer_path": str(folder / "tokenizer.json"),
            "train_path": str(folder / "train"),
            "eval_path": valid,
            "test_path": valid,
            "seq_length": WINDOW,
        },
        "model": {
            "name": "student",
            "hidden_size": NETWORK["hidden_size"],
            "intermediate_size": NETWORK["intermediate_size"],
            "n_layer": NETWORK["num_hidden_layers"],
            "n_head": NETWORK["num_attention_heads"],
            "n_KV": NETWORK["num_key_value_heads"],
        },
        "training": {
            "lr": SCHEDULE["learning_rate"],
            "weight_decay": SCHEDULE["weight_decay"],
            "warmup_steps": SCHEDULE["warmup_steps"],
            "batch_size": BATCH,
            "num_epochs": EPOCHS,
            "gradient_accumulation_steps": 1,
            "fp16": False,
        },
        "distillation": {"alpha": ALPHA, "temperature": temperature},
        "logging": {"output_path": str(folder / "output")},
    }


def train_papers(run: Path, code: Path, packages: Path, temperature: float) -> None:
    if (run / "papers/log.json").exists():
        return
    write_papers_inputs(run, temperature)
    path = os.pathsep.join(str(folder.resolve()) for folder in (packages, code / "src"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, __file__, str(run), "--run-papers-code", str(code)], check=True, env=environment)


class EpochOrder:
    """A sampler: each epoch's windows in the order that is given for it."""

    def __init__(self, epochs: Sequence[Sequence[int]]) -> None:
        self.epochs, self.begun = epochs, 0

    def __len__(self) -> int:
        return len(self.epochs[0])

    def __iter__(self) -> Iterator[int]:
        self.begun += 1
        return iter(self.epochs[self.begun - 1])


def run_papers_code(run: Path, code: Path) -> None:
    """Run the papers' script in this process, which has the packages that it was written for."""
    for name in HIDDEN:
        sys.modules[name] = None  # type: ignore[assignment]
    import torch
    from safetensors.torch import load_file
    from transformers import TrainerCallback

    class KeepEpochs(TrainerCallback):  # type: ignore[misc]
        def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            torch.save(others["model"].state_dict(), run / "papers" / f"epoch-{round(state.epoch)}.pt")

    script = code / "scripts/distill_from_multiple_teachers.py"
    teachers = ",".join(str(run / name) for name in TEACHERS)
    sys.argv = [str(script), "--config", str(run / "papers/config.yaml"), "--teachers", teachers, "--skip_eval"]
    trainer = runpy.run_path(str(script))["trainer"]
    trainer.model.load_state_dict(load_file(run / "initial/model.safetensors"))
    trainer.train_dataset.random_chunk = False
    order = EpochOrder(json.loads((run / "papers/order.json").read_text(encoding="utf-8")))
    if len(order) != len(trainer.train_dataset):
        raise SystemExit(f"the papers' code has {len(trainer.train_dataset):,} windows and ours {len(order):,}")
    trainer._get_train_sampler = lambda: order
    trainer.add_callback(KeepEpochs)
    trainer.train()
    if order.begun != EPOCHS:
        raise SystemExit(f"the papers' code read {order.begun} epochs of {EPOCHS}")
    write_json(run / "papers/log.json", trainer.state.log_history)


def measure_papers(run: Path) -> list[float]:
    """The held-out cross-entropy of the papers' student after each epoch, as that of ours is measured."""
    path = run / "papers/measured.json"
    if not path.exists():
        import torch

        from student import DistillationWindows, collate, load_student
        from student.evaluation.held_out import HeldOutSums

        windows = DistillationWindows(str(run / "valid"), (), WINDOW)
        batches = [collate(windows[start : start + 16]) for start in range(0, len(windows), 16)]
        student = load_student(
            run / "initial", vocabulary_size=VOCABULARY, special_ids={}, window_tokens=WINDOW, seed=SEED
        ).eval()
        found = []
        for epoch in range(1, EPOCHS + 1):
            student.load_state_dict(torch.load(run / "papers" / f"epoch-{epoch}.pt", weights_only=True))
            sums = HeldOutSums(VOCABULARY, ())
            with torch.no_grad():
                for batch in batches:
                    logits = student(batch["input_ids"], use_cache=False).logits
                    sums.add(logits.flatten(0, 1), batch["labels"].flatten(), batch["targets"])
            found.append(sums.result().cross_entropy)
        write_json(path, found)
    measured: list[float] = json.loads(path.read_text(encoding="utf-8"))
    return measured


def greatest_difference(values: Sequence[float], others: Sequence[float], relative: bool = False) -> float:
    """max |a - b|, or of |a / b - 1|, over two curves of one length."""
    return max(abs(a / b - 1) if relative else abs(a - b) for a, b in zip(values, others, strict=True))


def read_report(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / name / "report.json").read_text(encoding="utf-8"))
    return found


def held_out_curves(run: Path) -> dict[str, list[float]]:
    """Held-out cross-entropy in nats after each epoch, by student; `as printed` is what the papers' code says."""
    curves = {"papers": measure_papers(run)}
    for name in STUDENTS:
        if name != "papers":
            curves[name] = [entry["eval_loss"] for entry in read_report(run, name)["eval_log"]][:EPOCHS]
    log = json.loads((run / "papers/log.json").read_text(encoding="utf-8"))
    curves["as printed"] = [entry["eval_ce_loss"] for entry in log if "eval_ce_loss" in entry]
    return curves


def training_losses(run: Path) -> dict[str, list[float]]:
    """The loss of every step, of the students whose loss has one value: with sampled ids it is an estimate."""
    log = json.loads((run / "papers/log.json").read_text(encoding="utf-8"))
    losses = {"papers": [entry["loss"] for entry in log if "kl_loss" in entry]}
    for name in ("live", "full"):
        losses[name] = [entry["loss"] for entry in read_report(run, name)["train_log"]]
    return losses


def report(run: Path) -> str:
    from storage import LogitCache

    cache, losses, curves = LogitCache.open(str(run / "train")), training_losses(run), held_out_curves(run)
    teachers = ", ".join(f"{read_report(run, name)['held_out']['cross_entropy']:.4f}" for name in TEACHERS)
    positions = cache.record.corpus.positions
    lines = [f"{positions:,} tokens, {len(losses['papers'])} steps; teachers at {teachers} nats held out.", ""]
    lines += ["| step | the papers' loss | ours, live − papers' | K = V − papers' |", "|---|---|---|---|"]
    for step in sorted({1, 2, 10, 50, 100, 200, len(losses["papers"])}):
        first, *others = (values[step - 1] for values in losses.values())
        lines.append(f"| {step} | {first:.5f} | " + " | ".join(f"{value - first:+.5f}" for value in others) + " |")
    names = {**{name: said for name, (said, _) in STUDENTS.items()}, "as printed": "the papers' code, as it prints it"}
    lines += ["", "| held-out cross-entropy after epoch | " + " | ".join(names.values()) + " |"]
    lines += ["|---|" + "---|" * len(names)]
    for epoch in range(EPOCHS):
        lines.append(f"| {epoch + 1} | " + " | ".join(f"{curves[name][epoch]:.4f}" for name in names) + " |")
    lines += ["", "| | bytes per token | last − the papers' | farthest from it | loss of a step, relative, farthest |"]
    lines += ["|---|---|---|---|---|"]
    for name in [name for name in STUDENTS if name != "papers"]:
        stored = "–"
        if name in ("full", "default"):
            entry = cache.teacher(name)
            stored = f"{entry.stored_bytes() / entry.entry.positions:,.1f}"
        farthest = greatest_difference(curves[name], curves["papers"])
        step = "–"
        if name in losses:
            step = f"{greatest_difference(losses[name], losses['papers'], relative=True):.2g}"
        last = curves[name][-1] - curves["papers"][-1]
        lines.append(f"| {names[name]} | {stored} | {last:+.4f} | {farthest:.2g} | {step} |")
    return "\n".join(lines)


def figure(run: Path) -> str:
    """An SVG: held-out loss by epoch of every student; the papers' own is the broad line, on which ours lie."""
    from logit_cache.report.svg import Line, line_chart

    curves = held_out_curves(run)
    lines = [
        Line(f"{said}, held-out nats", name, tuple(enumerate(curves[name], 1)), dots=True)
        for name, (said, _) in STUDENTS.items()
    ]
    label = "Held-out loss by epoch, the papers' code and ours"
    return framed(line_chart(lines, label, "epochs", x_name="epoch"), label, STUDENTS, _WIDE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--code", type=Path)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--text", nargs="+")
    parser.add_argument("--eval-text", nargs="+")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--run-papers-code", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    run = given.run.resolve()
    if given.run_papers_code is not None:
        run_papers_code(run, given.run_papers_code)
        return
    for name in ("code", "packages", "text", "eval_text"):
        if not getattr(given, name):
            parser.error(f"--{name.replace('_', '-')} is needed")
    prepare(run, given.text, given.eval_text)
    train_papers(run, given.code.resolve(), given.packages, given.temperature)
    train_ours(run, given.temperature)
    print(report(run))
    if given.figure is not None:
        given.figure.parent.mkdir(parents=True, exist_ok=True)
        given.figure.write_text(figure(run), encoding="utf-8")


if __name__ == "__main__":
    main()
