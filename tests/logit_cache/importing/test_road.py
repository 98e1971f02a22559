"""The page's road from files of somebody else to an evaluated student, as printed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
from support.caches.imported import V, known, tokenizer_folder
from support.caches.small import dense_targets, make_corpus, make_entry_2, write_entry
from support.commands import ROOT, Run, in_process, succeeded

from storage.format.manifest.entry import Windowing

K, LENGTH = 16, 48
SMALL = ["--set", "max_steps=2", "--set", "per_device_train_batch_size=4"]


def published(folder: Path, seed: int) -> None:
    """Files of DistillKit's packed form in a folder."""
    data = known((LENGTH,) * 12, seed=seed)
    tokens, cache = np.concatenate(data.tokens).astype(np.uint16), folder.parent / f"of-{folder.name}"
    record = make_corpus(str(cache), tokens, V, data.starts.astype(np.uint64))
    windowing = Windowing(context_tokens=LENGTH, stride_tokens=LENGTH, isolate_documents=True)
    targets = dense_targets(np.concatenate(data.logprobs), K, np.full(len(tokens), -1))
    write_entry(cache, "t", make_entry_2(record, K, encoding="float32", windowing=windowing), targets)
    succeeded(in_process("logit-cache", "export", cache, "--name", "t", "--format", "distillkit", "--out", folder))


def test_from_a_data_set_to_a_student(run: Run, tmp_path: Path) -> None:
    (section,) = re.findall(
        r"^\*\*From a data set of the hub to a student.*?```console\n(.*?)```",
        (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE | re.DOTALL,
    )
    for number, name in enumerate(("train", "valid")):
        published(tmp_path / "logits" / name, number)
    tokenizer_folder(tmp_path).rename(tmp_path / "their-tokenizer")
    said, walked = {}, []
    for line in section.splitlines():
        name, *arguments = shlex.split(line, comments=True)
        if name == "hf":
            continue
        walked.append(f"{name} {arguments[0]}")
        done = succeeded(run(name, *arguments, *(SMALL if name == "train-student" else []), cwd=tmp_path))
        said[arguments[0]] = done.stdout
    assert len(walked) == 7
    assert said["audit"].splitlines()[-1].startswith("plausible: ")
    assert "distillkit: data_0.parquet" in said["inspect"]
    assert "rows are about the token that follows" in said["inspect"]
    report = json.loads((tmp_path / "run" / "theirs-student" / "report.json").read_text())
    assert report["steps"] == 2
    assert "teacher" in said["evaluate"]
