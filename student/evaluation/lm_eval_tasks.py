"""Minimal pairs as tasks of EleutherAI's lm-eval, in a folder that it reads without a network.

::

    pairs.yaml                   the group `pairs` of all groups
    pairs_group_<group>.yaml     one group of paradigms
    pairs_<paradigm>.yaml        one task
    data/<paradigm>.jsonl        its pairs: {"choices": [good, bad]}
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from storage.errors import InputError
from storage.files import check_writable, local_path
from student.evaluation.minimal_pairs import Pair

TOP_GROUP = "pairs"


def check_folder(folder: str | Path) -> None:
    """Raise InputError for a folder that holds something other than tasks written here before."""
    path = local_path(folder)
    if path.exists() and not path.is_dir():
        raise InputError(f"{folder}: expected a folder for lm-eval's tasks, found a file: give another name")
    if path.is_dir() and any(path.iterdir()) and not (path / f"{TOP_GROUP}.yaml").is_file():
        raise InputError(f"{folder}: expected an empty folder, or none, for lm-eval's tasks; found other files in it")
    check_writable(path, f"--lm-eval-tasks {folder}")


def write_tasks(pairs: Sequence[Pair], folder: str | Path, leading_space: bool = True) -> dict[str, str]:
    """Write the tasks and groups of these pairs; returns the task's name by paradigm.

    ``lm_eval --tasks pairs --include_path FOLDER`` runs them all. The accuracy of a group is over all its pairs
    together, that of `pairs` too. A moved folder needs its paths rewritten: lm-eval requires absolute ones.
    """
    check_folder(folder)
    path = local_path(folder).resolve()
    (path / "data").mkdir(parents=True, exist_ok=True)
    by_paradigm: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_paradigm[pair.paradigm].append(pair)
    names: dict[str, str] = {}
    tasks_of: dict[str, list[str]] = defaultdict(list)
    for paradigm, found in by_paradigm.items():
        names[paradigm] = task = _name(f"{TOP_GROUP}_{paradigm}", names.values())
        tasks_of[found[0].group].append(task)
        data = path / "data" / f"{task.removeprefix(f'{TOP_GROUP}_')}.jsonl"
        lines = [json.dumps({"choices": [pair.good, pair.bad]}, ensure_ascii=False) for pair in found]
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        _write(path, task, _task(task, data, leading_space))
    groups: list[str] = []
    for group, tasks in tasks_of.items():
        groups.append(_name(f"{TOP_GROUP}_group_{group}", [*names.values(), *groups]))
        _write(path, groups[-1], _group(groups[-1], group, tasks))
    _write(path, TOP_GROUP, _group(TOP_GROUP, TOP_GROUP, groups))
    return names


def _task(name: str, data: Path, leading_space: bool) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "num_fewshot": 0,
        "doc_to_text": "",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "target_delimiter": " " if leading_space else "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _group(name: str, shown: str, tasks: list[str]) -> dict[str, Any]:
    means = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    return {"group": name, "group_alias": shown, "task": tasks, "aggregate_metric_list": means}


def _name(wanted: str, taken: Sequence[str] | Any) -> str:
    """A unique name that is also a file name; lm-eval reads commas and stars as lists and patterns."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", wanted)
    used, number, name = {other.lower() for other in taken}, 1, plain
    while name.lower() in used:
        number += 1
        name = f"{plain}_{number}"
    return name


def _write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
