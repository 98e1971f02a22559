"""The demo: the whole pipeline on a laptop, each stage a public command in a process of its own.

Text → token stream → two teachers of different families → each run once over the stream and cached → a student
trained from the cache, and the same student without distillation: same initial weights, same steps, same data order.
Every command resumes where it stopped, so the demo does too.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from logit_cache.recipes.comparison import Comparison, write_page
from logit_cache.recipes.stages import Stage, run_stages
from storage.errors import InputError
from storage.files import replace_file

TRAIN_BYTES = 1_500_000
VALID_BYTES = 200_000
VOCABULARY = 2_048
# Sampled targets need no more (docs/decisions/0012-sampled-targets-by-default.md); a bucket wanted 128 (0004).
KEPT_IDS = 32
_NOT_LIBRARY = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "__phello__"}
_LLAMA: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 256, "tie_word_embeddings": False}
_MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        **_LLAMA,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_positions": 256,
        "n_embd": 192,
        "n_layer": 3,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "student": {
        **_LLAMA,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}
TEACHERS = ("llama", "gpt2")
_TRAINING = (
    "learning_rate=2e-3",
    "per_device_train_batch_size=16",
    "per_device_eval_batch_size=32",
    "warmup_steps=30",
    "logging_steps=10",
    "eval_strategy=steps",
    "eval_steps=50",
    "save_strategy=steps",
    "save_steps=50",
)
_TEACHER_EPOCHS = 2
_STUDENT_EPOCHS = 1


def run_demo(out: str, text: Sequence[str]) -> str:
    """Run the remaining stages in `out`; returns the table. Raises InputError for a foreign folder or failed stage."""
    folder = Path(out)
    if folder.exists() and not (folder / "text.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{out}: expected a folder of the demo, found other files: give another --out")
    files, copies = _text_files(folder, _expand(text))
    # The list with its digests is written first: it detects a run of other text before any of its files is touched.
    digests = {path: hashlib.sha256(content.encode()).hexdigest() for path, content in copies.items()}
    _write_same(folder / "text.json", json.dumps({**files, "copies": digests}, indent=1))
    for copy, content in copies.items():
        _write_same(Path(copy), content)
    for name, config in _MODELS.items():
        path = folder / "models" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    for split in ("train", "valid"):
        (folder / f"{split}.yaml").write_text(json.dumps({"text": files[split]}), encoding="utf-8")
    stages = [Stage(title, tuple(command)) for title, command in _stages(folder)]
    run_stages(stages, "run the demo again")
    comparison = _comparison(folder)
    write_page(comparison, folder / "demo.html")
    return f"{comparison.table()}\n\npage: {folder / 'demo.html'}"


def _stages(folder: Path) -> Iterator[tuple[str, list[str]]]:
    train, valid, models = str(folder / "train"), str(folder / "valid"), folder / "models"
    size = str(VOCABULARY)
    yield (
        f"token stream, with a new tokenizer of {VOCABULARY} ids",
        ["logit-cache", "tokenize", "--config", f"{train}.yaml", "--train-tokenizer", size, "--out", train],
    )
    yield (
        "held-out token stream, same tokenizer",
        ["logit-cache", "tokenize", "--config", f"{valid}.yaml", "--tokenizer", f"{train}/tokenizer", "--out", valid],
    )
    settings = [part for setting in _TRAINING for part in ("--set", setting)]
    data = ["--cache", train, "--eval-cache", valid, *settings]
    for name in TEACHERS:
        model = ["--model", f"{models}/{name}.json", "--set", f"num_train_epochs={_TEACHER_EPOCHS}"]
        yield (
            f"teacher {name}: training from scratch",
            ["train-teacher", *data, *model, "--output-dir", f"{folder}/teacher-{name}"],
        )
    for split, cache in (("training", train), ("held-out", valid)):
        for name in TEACHERS:
            entry = ["--name", name, "-k", str(KEPT_IDS)]
            yield (
                f"teacher {name}: run once over the {split} stream, {KEPT_IDS} ids stored",
                ["cache-logits", "--cache", cache, "--teacher", f"{folder}/teacher-{name}", *entry],
            )
    student = [*data, "--model", f"{models}/student.json", "--set", f"num_train_epochs={_STUDENT_EPOCHS}"]
    mixture = [part for name in TEACHERS for part in ("--teacher", name)]
    yield (
        "student from the cache, no teacher loaded",
        ["train-student", *student, *mixture, "--output-dir", f"{folder}/student"],
    )
    yield (
        "the same student without distillation",
        ["train-student", *student, "--output-dir", f"{folder}/control"],
    )


def _text_files(folder: Path, paths: Sequence[Path]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Paths of the training and the held-out text, and the copies to write, by path.

    The standard library, the default, is read in place; parts of given files are copied into the run's folder.
    """
    if paths:
        return _split_lines(folder / "text", paths)
    library = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in library.rglob("*.py")
        if not _NOT_LIBRARY & set(path.relative_to(library).parts) and 0 < path.stat().st_size < 200_000
    ]
    # Sorted by a hash of their names, so that both splits mix all of the library, in the same order on every machine.
    files.sort(key=lambda path: hashlib.sha256(path.relative_to(library).as_posix().encode()).digest())
    valid = _take(files, VALID_BYTES)
    return {"train": _take(files[len(valid) :], TRAIN_BYTES), "valid": valid}, {}


def _take(files: Sequence[Path], most_bytes: int) -> list[str]:
    taken: list[str] = []
    size = 0
    for path in files:
        if size >= most_bytes:
            break
        taken.append(str(path))
        size += path.stat().st_size
    return taken


def _expand(text: Sequence[str]) -> list[Path]:
    import glob

    paths = [Path(match) for pattern in text for match in (sorted(glob.glob(pattern, recursive=True)) or [pattern])]
    for path in paths:
        if not path.is_file():
            raise InputError(f"--text {path}: no such file")
    return paths


def _split_lines(folder: Path, files: Sequence[Path]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The last 5 % of the lines of each file are held out; long files are cut so that the demo stays short."""
    share = TRAIN_BYTES // len(files)
    parts: dict[str, list[str]] = {"train": [], "valid": []}
    copies: dict[str, str] = {}
    for number, path in enumerate(files):
        try:
            with path.open(encoding="utf-8", newline="") as file:
                lines = file.readlines(share)
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text at byte {error.start}: convert it first") from None
        cut = len(lines) - max(1, len(lines) // 20)
        for split, some in (("train", lines[:cut]), ("valid", lines[cut:])):
            if some:
                target = str(folder / split / f"{number:04d}-{path.name}")
                parts[split].append(target)
                copies[target] = "".join(some)
    if not parts["train"]:
        raise InputError("--text: too few lines to hold any out; give files of at least two lines")
    return parts, copies


def _write_same(path: Path, content: str) -> None:
    """Write a file of the run. Raises InputError for an existing one with other content: a run of other text."""
    data = content.encode()
    if path.exists() and path.read_bytes() != data:
        raise InputError(f"{path} is of other text: give another --out, or remove the old run to start again")
    path.parent.mkdir(parents=True, exist_ok=True)
    # A killed demo must not leave a partial file, which the next run would take for other text.
    replace_file(path, data)


def _comparison(folder: Path) -> Comparison:
    from logit_cache.describe import describe_entry
    from storage import LogitCache

    cache = LogitCache.open(str(folder / "train"))

    def report(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / name / "report.json").read_text(encoding="utf-8"))
        return found

    return Comparison(
        title="logit-cache demo",
        tokens=cache.record.corpus.positions,
        vocabulary_size=cache.vocabulary_size,
        kept_ids=KEPT_IDS,
        entries={name: describe_entry(cache.teacher(name)) for name in TEACHERS},
        teachers={name: report(f"teacher-{name}") for name in TEACHERS},
        student=report("student"),
        control=report("control"),
    )
