"""The windows of a step: how processes and micro-batches share them, and which changes make another run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from support.runs import job_in, make_world, weights
from torch.utils.data import BatchSampler
from transformers import TrainingArguments

from storage.errors import IdentityMismatch, InputError
from student.data.order import ReadingOrder
from student.training.run import train
from student.training.step import cut_step, divide_step, windows_per_step


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.mark.parametrize("windows", [1, 7, 8, 12, 60, 96, 128])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("most", [1, 5, 8, 32, 1000])
def test_a_step_is_cut_into_equal_parts_that_are_as_large_as_may_be(windows: int, processes: int, most: int) -> None:
    if windows % processes:
        with pytest.raises(
            InputError, match=f"a step of {windows} windows cannot be shared equally by {processes} pro"
        ):
            cut_step(windows, processes, most)
        return
    at_once, micro_batches = cut_step(windows, processes, most)
    assert at_once * micro_batches * processes == windows
    assert at_once <= most
    assert not [
        size
        for size in range(at_once + 1, most + 1)
        if size * processes <= windows and windows % (size * processes) == 0
    ]


def test_a_refusal_names_what_would_fit() -> None:
    with pytest.raises(InputError) as caught:
        cut_step(32, 3, 32)
    assert "1, 2, 4 processes would do, or --windows-per-step 30 or 33 in a new --output-dir" in str(caught.value)
    with pytest.raises(InputError, match=r"1, 2 processes would do, or --windows-per-step 4 in"):
        cut_step(2, 4, 32)


def arguments(processes: int, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> TrainingArguments:
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: processes))
    return TrainingArguments(output_dir="/nowhere", use_cpu=True, **fields)


@pytest.mark.parametrize(
    ("recorded", "processes", "at_once", "accumulation", "expected"),
    [
        ({}, 2, 8, 3, (8, 3)),
        ({"windows_per_step": 48, "processes": 1}, 2, 8, 3, (8, 3)),
        ({"windows_per_step": 48, "processes": 1}, 2, 8, 1, (8, 3)),
        ({"windows_per_step": 48, "processes": 1}, 4, 8, 1, (6, 2)),
        ({"windows_per_step": 48, "processes": 4}, 1, 12, 1, (12, 4)),
        # As many as there were: another step is another run, which the identity refuses.
        ({"windows_per_step": 48, "processes": 2}, 2, 8, 1, (8, 1)),
    ],
)
def test_a_recorded_step_is_kept_by_other_processes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: dict[str, int],
    processes: int,
    at_once: int,
    accumulation: int,
    expected: tuple[int, int],
) -> None:
    args = arguments(
        processes, monkeypatch, per_device_train_batch_size=at_once, gradient_accumulation_steps=accumulation
    )
    adapted = divide_step(job_in(tmp_path, tmp_path / "run"), args, recorded)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == expected
    assert (adapted is not None) == (expected != (at_once, accumulation))
    assert windows_per_step(args) == recorded.get("windows_per_step", 48) or adapted is None


def test_what_is_asked_for_wins_over_what_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(2, monkeypatch, per_device_train_batch_size=32)
    job = job_in(tmp_path, tmp_path / "run", windows_per_step=20)
    assert divide_step(job, args, {"windows_per_step": 48, "processes": 1}) is None
    assert windows_per_step(args) == 20
    with pytest.raises(InputError, match="20 windows cannot be shared equally by 3 processes"):
        divide_step(job, arguments(3, monkeypatch))
    for name in ("split_batches", "dispatch_batches"):
        with pytest.raises(InputError, match=name):
            divide_step(job, arguments(2, monkeypatch, accelerator_config={name: True}))


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 1), (2, 1), (1, 2), (4, 2), (1, 8), (8, 1), (2, 4)])
@pytest.mark.parametrize("windows", [8, 15, 16, 93, 120])
def test_an_epoch_has_whole_steps_however_they_are_cut(windows: int, processes: int, micro_batches: int) -> None:
    """By accelerate's own sampler, which deals out batches."""
    order = ReadingOrder(windows, group_windows=4, windows_per_step=8, seed=1, whole_steps=True)
    order.set_epoch(3)
    whole = order.permutation(3)
    assert sorted(whole) == list(range(windows))
    steps = windows // 8
    assert len(order) == len(list(order)) == 8 * steps
    size = 8 // processes // micro_batches
    dealt = [
        list(BatchSamplerShard(BatchSampler(order, size, drop_last=True), processes, rank)) for rank in range(processes)
    ]
    assert {len(batches) for batches in dealt} == {steps * micro_batches}
    read = np.array(dealt).transpose(1, 0, 2).ravel() - 3 * windows
    assert (read == whole[: 8 * steps]).all()


def test_the_windows_left_out_are_others_in_each_epoch() -> None:
    order = ReadingOrder(93, group_windows=4, windows_per_step=8, seed=1, whole_steps=True)
    left_out = [frozenset(order.permutation(epoch)[len(order) :].tolist()) for epoch in range(8)]
    assert {len(some) for some in left_out} == {93 % 8}
    assert len(set(left_out)) == 8


def test_how_a_step_is_computed_is_no_part_of_the_run(world: Path, tmp_path: Path) -> None:
    """Started with two micro-batches, finished with four at most two windows each."""
    limit = {"max_steps": 9, "save_steps": 3, "save_total_limit": 3}
    whole = train(job_in(world, tmp_path / "whole", training=limit))
    job = job_in(world, tmp_path / "run", windows_per_step=8, training={**limit, "per_device_train_batch_size": 4})
    assert train(job).windows_at_once == 4
    (tmp_path / "run" / "report.json").unlink()
    (tmp_path / "run" / "config.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-9")
    again = {**limit, "per_device_train_batch_size": 3, "ddp_timeout": 60, "per_device_eval_batch_size": 1}
    lines: list[str] = []
    report = train(job_in(world, tmp_path / "run", windows_per_step=8, training=again), lines.append)
    assert (report.windows_per_step, report.windows_at_once, report.steps) == (8, 2, whole.steps)
    assert report.resumed_from_step == 6
    assert any("8 to a step: 1 process, 4 micro-batches of 2" in line for line in lines)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    with pytest.raises(IdentityMismatch) as caught:
        train(job_in(world, tmp_path / "run", windows_per_step=16, training=again))
    assert [field.split(":")[0] for field in caught.value.fields] == ["windows_per_step"]
    with pytest.raises(IdentityMismatch, match="windows_per_step"):
        train(job_in(world, tmp_path / "run", training={**limit, "per_device_train_batch_size": 4}))


def test_a_step_is_given_once(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="windows_per_step 8 decides gradient_accumulation_steps, which is also given"):
        job_in(world, tmp_path / "run", windows_per_step=8, training={"gradient_accumulation_steps": 2})
    with pytest.raises(InputError, match="93 windows of 16 tokens, fewer than the 94 of one step"):
        train(job_in(world, tmp_path / "run", windows_per_step=94))
    with pytest.raises(InputError, match="auto_find_batch_size"):
        train(job_in(world, tmp_path / "run", training={"auto_find_batch_size": True}))
    assert not (tmp_path / "run").exists()


def test_without_dropping_the_rest_an_epoch_ends_with_a_shorter_step(world: Path, tmp_path: Path) -> None:
    training = {"dataloader_drop_last": False, "per_device_train_batch_size": 4}
    report = train(job_in(world, tmp_path / "run", windows_per_step=8, training=training))
    assert report.steps == -(-93 // 8)
    assert report.tokens_seen == 93 * 16
