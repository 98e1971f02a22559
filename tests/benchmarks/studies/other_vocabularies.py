"""Students of teachers with another vocabulary: what an entry projected into theirs is worth.

    python tests/benchmarks/studies/other_vocabularies.py RUN prepare --text train/*.txt --eval-text valid/*.txt
    python tests/benchmarks/studies/other_vocabularies.py RUN finals [--seeds 4] [--student 4k|8k]
    python tests/benchmarks/studies/other_vocabularies.py RUN report

One text, two byte-level tokenizers (4,096 ids split as GPT-2's, 8,192 as Qwen's), a teacher of each. A student of one
vocabulary learns from the teacher of the other in these ways, all with equal steps, windows, order and weights of a
seed, and half of the loss the cross-entropy of the text:

- `none`: the text alone;
- `sequence`: half of the windows are text that the teacher wrote, as much as there is real text;
- `projected`: the teacher's entry, projected without it (`logit-cache project`);
- `gold`, `uld`: the teacher in memory, and the losses of TRL's GOLD trainer (its hybrid form) and of Boizard et al.
  (arXiv 2402.12030), both as TRL computes them;
- `own`: an entry of the teacher that has the student's own vocabulary, the upper mark.

Figures are held-out bits per byte, so that vocabularies compare. Every result is a file; what is there is not done
again.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from steps import command, excerpt, interval, optimizer_of, results, run_all, study_parser, write_json

# Of a vocabulary: ids, and how text is split before merging.
VOCABULARIES = {"4k": (4_096, "gpt2"), "8k": (8_192, "qwen")}
OTHER = {"4k": "8k", "8k": "4k"}
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WINDOW, BATCH_WINDOWS, PASSES, ALPHA, K = 128, 8, 3, 0.5, 48
LEARNING_RATE = 2e-3
TEACHER_MODEL, TEACHER_STEPS, TEACHER_BATCH, STUDENT_MODEL = "llama-mini", 1_500, 16, "llama-tiny"
STUDENT_BYTES, EVAL_BYTES = 850_000, 220_000
ARMS = ("none", "sequence", "projected", "gold", "uld", "own")


def train_tokenizer(texts: Sequence[str], ids: int, split: str, out: Path) -> None:
    """A byte-level BPE that gives every text back byte by byte: nothing normalised, no space put in front."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split == "gpt2")
    if split == "qwen":
        pieces = pre_tokenizers.Split(Regex(QWEN), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, letters])  # type: ignore[assignment]
    else:
        tokenizer.pre_tokenizer = letters  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=ids,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(list(texts), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(out)


def prepare(run: Path, text: Sequence[str], eval_text: Sequence[str]) -> None:
    size = sum(Path(name).stat().st_size for name in text), sum(Path(name).stat().st_size for name in eval_text)
    excerpt(text, run / "student-text", STUDENT_BYTES / size[0])
    excerpt(eval_text, run / "valid-text", EVAL_BYTES / size[1])
    for name, (ids, split) in VOCABULARIES.items():
        if not (run / f"tokenizer-{name}").exists():
            train_tokenizer(text, ids, split, run / f"tokenizer-{name}")
        for stream, texts in (
            ("all", text),
            ("student", [f"{run}/student-text/*.txt"]),
            ("valid", [f"{run}/valid-text/*.txt"]),
        ):
            tokenized(run, f"{stream}-{name}", texts, name)
        command("train-teacher", "--cache", run / f"all-{name}", "--eval-cache", run / f"valid-{name}",
                "--model", TEACHER_MODEL, "--output-dir", run / f"teacher-{name}",
                "--set", f"max_steps={TEACHER_STEPS}", "--set", f"per_device_train_batch_size={TEACHER_BATCH}",
                "--set", f"learning_rate={LEARNING_RATE}", "--set", "logging_steps=50",
                "--set", "save_steps=250", threads=1)  # fmt: skip
        command("cache-logits", "--cache", run / f"student-{name}", "--teacher", run / f"teacher-{name}",
                "--name", "own", "-k", K, threads=1)  # fmt: skip
    for name, other in OTHER.items():
        command("logit-cache", "project", run / f"student-{other}", "--name", "own",
                "--to", run / f"student-{name}", "--as", "projected", threads=1)  # fmt: skip
        if not (run / f"written-{other}.jsonl").exists():
            write_text(run, other)
        tokenized(run, f"written-{name}", [str(run / f"written-{other}.jsonl")], name)


def tokenized(run: Path, stream: str, texts: Sequence[str], vocabulary: str) -> None:
    if not (run / stream / "zarr.json").exists():
        parts = [part for name in texts for part in ("--text", name)]
        command("logit-cache", "tokenize", *parts, "--tokenizer", run / f"tokenizer-{vocabulary}",
                "--out", run / stream)  # fmt: skip


def write_text(run: Path, vocabulary: str) -> None:
    """What the teacher of a vocabulary writes, as many bytes as the students' text, in pieces of four windows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = AutoModelForCausalLM.from_pretrained(run / f"teacher-{vocabulary}").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / f"tokenizer-{vocabulary}")
    torch.manual_seed(0)
    written, size = [], 0
    while size < STUDENT_BYTES:
        begin = torch.full((64, 1), tokenizer.bos_token_id)
        ids = teacher.generate(begin, do_sample=True, top_k=0, max_new_tokens=4 * WINDOW, pad_token_id=0)
        written += tokenizer.batch_decode(ids, skip_special_tokens=True)
        size = sum(len(piece.encode()) for piece in written)
    partial = run / f"written-{vocabulary}.partial"
    partial.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in written), encoding="utf-8")
    os.replace(partial, run / f"written-{vocabulary}.jsonl")


class LiveTeacher:
    """The teacher in memory, reading the bytes of a student's windows in its own tokens, and a loss of TRL on both."""

    def __init__(self, run: Path, student: str, hybrid: bool) -> None:
        import numpy as np
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl.experimental.gold import GOLDConfig
        from trl.experimental.gold.gold_trainer import ULDLoss

        from storage import LogitCache

        other = OTHER[student]
        self.model = AutoModelForCausalLM.from_pretrained(run / f"teacher-{other}").eval().requires_grad_(False)
        tokenizers = [AutoTokenizer.from_pretrained(run / f"tokenizer-{name}") for name in (student, other)]
        caches = [LogitCache.open(str(run / f"student-{name}")) for name in (student, other)]
        self.ids = [np.asarray(cache.tokens.read(0, cache.record.corpus.positions)) for cache in caches]
        # Of a byte-level BPE every letter of a token is a byte; special ids spell none.
        spelled = [
            np.array(
                [len(t) if t not in tk.all_special_tokens else 0 for t in tk.convert_ids_to_tokens(range(len(tk)))]
            )
            for tk in tokenizers
        ]
        self.ends = [np.cumsum(lengths[ids]) for lengths, ids in zip(spelled, self.ids, strict=True)]
        if self.ends[0][-1] != self.ends[1][-1]:
            raise SystemExit(f"the streams spell {self.ends[0][-1]} and {self.ends[1][-1]} bytes")
        # TRL's settings but these: weights of the two parts as in the other arms, no EOS behind a window.
        config = GOLDConfig(
            output_dir="unused", use_cpu=True, use_uld_loss=True, uld_use_hybrid_loss=hybrid,
            uld_token_merge_strategy="bayesian", uld_crossentropy_weight=ALPHA, uld_distillation_weight=1 - ALPHA,
            uld_skip_student_eos=False, uld_skip_teacher_eos=False,
        )  # fmt: skip
        self.loss = ULDLoss(config, *tokenizers)

    def __call__(self, model: Any, starts: Sequence[int]) -> Any:
        """The loss of a student's windows that begin at these positions."""
        import numpy as np
        import torch

        rows: list[list[Any]] = [[], []]
        offsets: list[list[Any]] = [[], []]
        longest = 0
        for start in starts:
            stop = min(start + WINDOW + 1, len(self.ids[0]))
            first, last = self.ends[0][start], self.ends[0][stop - 1]
            # The teacher reads the tokens that lie in the window's bytes whole.
            there = np.searchsorted(self.ends[1], [first, last], side="right")
            spans = (slice(start, stop), slice(int(there[0]), int(there[1])))
            for side, span in enumerate(spans):
                ends = self.ends[side][span] - first
                begins = np.concatenate([ends[:1] * 0, ends[:-1]])
                rows[side].append(torch.from_numpy(self.ids[side][span].astype(np.int64)))
                offsets[side].append(torch.from_numpy(np.stack([begins, ends], 1)))
            longest = max(longest, spans[1].stop - spans[1].start)
        inputs = [torch.nn.utils.rnn.pad_sequence(side, batch_first=True) for side in rows]
        labels = [torch.nn.utils.rnn.pad_sequence(side, batch_first=True, padding_value=-100) for side in rows]
        # The first token of a student's window is only read.
        labels[0][:, 0] = -100
        padded = [torch.nn.utils.rnn.pad_sequence(side, batch_first=True) for side in offsets]
        with torch.no_grad():
            teacher_logits = self.model(inputs[1], use_cache=False).logits
        student_logits = model(inputs[0], use_cache=False).logits
        return self.loss(student_logits, teacher_logits, labels[0], labels[1], inputs[0], inputs[1],
                         student_byte_offsets=padded[0], teacher_byte_offsets=padded[1])  # fmt: skip


def train(run: Path, arm: str, vocabulary: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one student; what its result file holds."""
    import torch

    from student.data.batches import collate
    from student.data.windows import DistillationWindows, reading_order
    from student.loss.distillation import DistillationLoss
    from student.loss.teacher_targets import Member
    from student.models.loading import load_student
    from student.training.bound_forward import bind_loss

    names = [arm] if arm in ("projected", "own") else []
    windows = DistillationWindows(str(run / f"student-{vocabulary}"), names, WINDOW, "fixed", seed)
    student = load_student(
        STUDENT_MODEL, vocabulary_size=windows.vocabulary_size, special_ids={}, window_tokens=WINDOW, seed=seed
    ).train()
    live = LiveTeacher(run, vocabulary, hybrid=arm == "gold") if arm in ("gold", "uld") else None
    if live is None:
        members = [Member.of(name, entry) for name, entry in windows.entries.items()]
        bind_loss(student, DistillationLoss(windows.vocabulary_size, ALPHA if members else 1.0, 1.0, members))
    order = reading_order(windows, BATCH_WINDOWS)
    if arm == "sequence":
        written = DistillationWindows(str(run / f"written-{vocabulary}"), [], WINDOW, "fixed", seed)
        other = list(reading_order(written, BATCH_WINDOWS))
    per_pass = len(windows) // BATCH_WINDOWS
    optimizer, schedule = optimizer_of(student, LEARNING_RATE, per_pass * PASSES)
    began = time.monotonic()
    for number in range(PASSES):
        order.set_epoch(number)
        indices = list(order)
        for step in range(per_pass):
            chosen = indices[step * BATCH_WINDOWS : (step + 1) * BATCH_WINDOWS]
            if live is not None:
                loss = live(student, [windows.blocks.span(i % len(windows), number)[0] for i in chosen])
            else:
                items = windows.__getitems__(chosen)
                if arm == "sequence":
                    half = BATCH_WINDOWS // 2
                    places = range(step * half, (step + 1) * half)
                    items = [*items[:half], *written.__getitems__([other[i % len(other)] for i in places])]
                batch = collate(items)
                targets = {"targets": batch["targets"]} if names else {}
                loss = student(batch["input_ids"], labels=batch["labels"], **targets).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    return {
        "arm": arm, "student": vocabulary, "seed": seed, "steps": per_pass * PASSES,
        "seconds": time.monotonic() - began, "bits_per_byte": bits_per_byte(run, vocabulary, student),
    }  # fmt: skip


def bits_per_byte(run: Path, vocabulary: str, model: Any) -> float:
    """Nats of the held-out stream's tokens over its bytes and log 2."""
    import torch
    import torch.nn.functional as F

    from student.data.batches import collate
    from student.data.windows import DistillationWindows

    windows = DistillationWindows(str(run / f"valid-{vocabulary}"), [], WINDOW)
    nats, model = 0.0, model.eval()
    for start in range(0, len(windows), 16):
        batch = collate(windows.__getitems__(list(range(start, min(start + 16, len(windows))))))
        with torch.no_grad():
            logits = model(batch["input_ids"], use_cache=False).logits.flatten(0, 1)
        nats += float(F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum", ignore_index=-100))
    size = sum(path.stat().st_size for path in (run / "valid-text").glob("*.txt"))
    return nats / size / math.log(2)


def report(run: Path) -> str:
    from transformers import AutoModelForCausalLM

    lines = []
    found = list(results(run))
    for student in VOCABULARIES:
        by_arm: dict[str, dict[int, float]] = {}
        for result in found:
            if result["student"] == student:
                by_arm.setdefault(result["arm"], {})[result["seed"]] = result["bits_per_byte"]
        if not by_arm:
            continue
        teachers = [
            f"{name}: {bits_per_byte(run, name, AutoModelForCausalLM.from_pretrained(run / f'teacher-{name}')):.4f}"
            for name in VOCABULARIES
        ]
        lines += [
            f"Students of {VOCABULARIES[student][0]:,} ids; held-out bits per byte (teachers {', '.join(teachers)}):"
        ]
        lines += ["", "| arm | seeds | bits per byte | − none | − gold | seconds |", "|---|---|---|---|---|---|"]
        mean: Callable[[str], float] = lambda arm: statistics.mean(by_arm[arm].values())  # noqa: B023, E731
        for arm in sorted(by_arm, key=mean):
            against = []
            for other in ("none", "gold"):
                seeds = sorted(by_arm[arm].keys() & by_arm.get(other, {}).keys())
                pairs = [by_arm[arm][s] - by_arm[other][s] for s in seeds]
                against.append("–" if arm == other or not pairs else interval(pairs))
            seconds = statistics.mean(r["seconds"] for r in found if (r["arm"], r["student"]) == (arm, student))
            lines.append(f"| {arm} | {len(by_arm[arm])} | {mean(arm):.4f} | {' | '.join(against)} | {seconds:.0f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser, stages = study_parser(__doc__)
    finals = stages.add_parser("finals")
    finals.add_argument("--arm", action="append", choices=ARMS)
    finals.add_argument("--student", action="append", choices=list(VOCABULARIES))
    finals.add_argument("--seeds", type=int, default=4)
    stages.add_parser("report")
    one = stages.add_parser("one")
    one.add_argument("job", nargs=3)
    given = parser.parse_args()
    run = given.run
    if given.stage == "prepare":
        prepare(run, given.text, given.eval_text)
    elif given.stage == "finals":
        jobs = {
            f"{student}-{arm}-seed{seed}": [arm, student, str(seed)]
            for seed in range(1, given.seeds + 1)
            for student in given.student or VOCABULARIES
            for arm in given.arm or ARMS
        }
        run_all(run, Path(__file__), jobs, given.workers)
    elif given.stage == "one":
        arm, student, seed = given.job
        write_json(run / "results" / f"{student}-{arm}-seed{seed}.json", train(run, arm, student, int(seed)))
    else:
        print(report(run))


if __name__ == "__main__":
    main()
