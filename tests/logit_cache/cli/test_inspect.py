"""`logit-cache inspect --at` of every kind of row: all its log-probs, some of them, or no targets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.small import entry_2, make_corpus, make_entry, random_sample, write_entry
from support.commands import Run

from storage.format.manifest.entry import Targets

V, N, K = 61, 48, 6


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Entries of the same sampled targets: all fields in version 1 and 2, none, and none at even positions."""
    made = make_corpus(str(tmp_path), np.arange(N).astype(np.uint16), V)
    entry, targets = make_entry(made, K), random_sample(N, V, K)
    descending = np.argsort(-targets.logprobs, axis=1)
    ids, logprobs = (np.take_along_axis(values, descending, axis=1) for values in (targets.token_ids, targets.logprobs))
    version_1 = Targets(method="varopt", k=K, seed=0, has_label_logprob=True)
    first = entry.model_copy(update={"targets": version_1})
    write_entry(tmp_path, "first", first, replace(targets, token_ids=ids, logprobs=logprobs))
    fields = ("entropy", "half-tail", "label", "sampled-logprobs")
    write_entry(tmp_path, "all", entry_2(entry, *fields, method="varopt"), targets)
    write_entry(tmp_path, "lean", entry_2(entry, method="varopt"), targets)
    there = np.arange(N) % 2
    odd = replace(targets, kept=(K * there).astype(np.uint16), certain=(targets.certain * there).astype(np.uint16))
    write_entry(tmp_path, "some", entry_2(entry, "label", method="varopt", positions="some"), odd)
    return tmp_path


def test_what_is_not_stored_is_not_shown(cache: Path, run: Run) -> None:
    def unexpected(value: str) -> Any:
        raise AssertionError(f"{value} is no JSON")

    done = run("logit-cache", "inspect", cache, "--at", 8, "--json")
    found = json.loads(done.stdout, parse_constant=unexpected)["teachers"]
    row = random_sample(N, V, K).rows(8, 9)
    certain, tail = int(row.certain[0]), float(np.exp(row.log_tail[0]))
    for name in ("first", "all", "lean"):
        assert (found[name]["certain"], found[name]["sampled"]) == (certain, K - certain)
        assert found[name]["certain_mass"] == pytest.approx(1 - tail, abs=0.02)
        assert found[name]["sampled_weight"] == pytest.approx(tail / (K - certain), rel=0.05)
        assert {item["id"] for item in found[name]["top"]} == set(row.token_ids[0].tolist())
    for name in ("first", "all"):
        assert found[name]["label_logprob"] == pytest.approx(float(row.label_logprob[0]), abs=0.01)
        assert found[name]["sampled_mass"] + found[name]["outside_mass"] == pytest.approx(tail, abs=0.02)
    assert {name for name, value in found["lean"].items() if value is None} == {
        "entropy", "label_logprob", "outside_mass", "sampled_mass",
    }  # fmt: skip
    assert [item["probability"] is None for item in found["lean"]["top"]] == [
        item["sampled"] for item in found["lean"]["top"]
    ]
    assert (found["some"]["certain"], found["some"]["sampled"], found["some"]["top"]) == (0, 0, [])

    text = run("logit-cache", "inspect", cache, "--at", 8).stdout
    assert "teacher some: no targets here" in text
    assert "teacher lean:\n" in text
    assert f"{K - certain} sampled ids (each stands for {found['lean']['sampled_weight']:.5f})" in text
    assert "nan" not in text


def test_an_entry_states_its_version_its_fields_and_what_serves(cache: Path, run: Run) -> None:
    entries = json.loads(run("logit-cache", "inspect", cache, "--json").stdout)["teachers"]
    assert {name: entry["format_version"] for name, entry in entries.items()} == {
        "all": 2, "first": 1, "lean": 2, "some": 2,
    }  # fmt: skip
    assert {name: entry["made"] for name, entry in entries.items() if entry["made"]} == dict.fromkeys(
        ("all", "lean", "some"), "cached"
    )
    some = entries["some"]
    assert (some["positions_cached"], some["positions_with_targets"]) == (N, N // 2)
    assert some["bytes_per_target"] == pytest.approx(2 * some["bytes_per_token"])
    assert some["bytes_per_kept_id"] == pytest.approx(some["bytes_per_target"] / K)
    text = run("logit-cache", "inspect", cache).stdout
    lean = "ids, log-probs of the certain ones, mass outside them"
    everything = f"{lean}, entropy, half-tail, label, sampled-logprobs"
    for line in (f"format 1: {everything}", f"format 2: {everything}", f"format 2: {lean}\n"):
        assert f"  stored      {line}" in text
    bucket = "; every divergence but tail-aware-kl with tail bucket, at any temperature from 1 on"
    assert text.count("  serves      forward KL with tail sampled, at temperature 1") == 4
    assert text.count(bucket) == 2
    assert text.count("  made        by its teacher") == 4
    assert f"; targets at {N // 2} of them" in text
    assert run("logit-cache", "list", cache).stdout.count("complete") == 4
