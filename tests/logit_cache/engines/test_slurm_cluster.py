"""Behaviour of a real Slurm cluster that other tests rely on. `make test-slurm` runs these.

Array tasks, a requeued task, signals.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.clusters.slurm import Cluster, until

pytestmark = pytest.mark.slurm

# A job that records starts and SIGTERM, which ends it. Bash acts on a signal only between commands: hence `wait`.
PATIENT = """
trap 'echo received TERM >>received; exit 0' TERM
echo "restart ${SLURM_RESTART_COUNT:-0}" >>received
sleep 300 & wait
"""


def lines(path: Path) -> list[str]:
    """The lines that a job has written so far."""
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def test_the_tasks_of_an_array_know_which_they_are_and_run_at_once(slurm: Cluster, tmp_path: Path) -> None:
    # Each waits for the other's file, so that they end only when both run.
    script = """
    echo "$SLURM_ARRAY_JOB_ID $SLURM_ARRAY_TASK_ID of $SLURM_ARRAY_TASK_COUNT on $SLURMD_NODENAME" \
        >task-$SLURM_ARRAY_TASK_ID
    for i in $(seq 300); do [ -e task-$((1 - SLURM_ARRAY_TASK_ID)) ] && break; sleep 0.1; done
    [ $i -lt 300 ] && touch met-$SLURM_ARRAY_TASK_ID
    """
    job = slurm.submit(script, tmp_path, "--array=0-1", "--requeue")
    until(lambda: not slurm.queue(), slurm, "both tasks end")
    words = [(tmp_path / f"task-{task}").read_text(encoding="utf-8").split() for task in (0, 1)]
    assert [one[:-2] for one in words] == [[str(job), str(task), "of", "2"] for task in (0, 1)]
    assert {one[-1] for one in words} == {"node1", "node2"}
    assert (tmp_path / "met-0").exists()
    assert (tmp_path / "met-1").exists()


def test_a_requeued_task_receives_the_signal_and_runs_again(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.submit(PATIENT, tmp_path, "--array=0-1", "--requeue", "--exclude=node2")
    received = tmp_path / "received"
    until(lambda: lines(received) == ["restart 0"], slurm, "the first task runs")
    slurm.call("scontrol", "requeue", f"{job}_0")
    slurm.call("scancel", f"{job}_1")
    until(lambda: len(lines(received)) == 3, slurm, "the task runs again")
    assert lines(received) == ["restart 0", "received TERM", "restart 1"]


def test_a_signal_arrives_at_the_script(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.submit(PATIENT, tmp_path)
    received = tmp_path / "received"
    until(lambda: lines(received) == ["restart 0"], slurm, "the job runs")
    slurm.call("scancel", "--signal=TERM", "--batch", job)
    until(lambda: not slurm.queue(), slurm, "the job ends")
    assert lines(received) == ["restart 0", "received TERM"]
