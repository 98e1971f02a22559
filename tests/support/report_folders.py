"""Folders of finished work that never ran: a recipe of three seeds, a sweep, a training run. All numbers are invented,
all shapes are those of the classes that write the real ones."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from support.caches.small import dense_targets, make_corpus, make_entry

from logit_cache.recipes.record import Caches, ModelRecord, RecipeRecord, Role
from storage import LogitCache
from storage.cache.writer import EntryWriter
from storage.format.fidelity import Angle, Calibration, CurvePoint, Divergences, FidelityReport, NeededIds, Size, Spread
from storage.format.manifest.teacher import Teacher, TeacherIdentity
from student.evaluation.blimp import PHENOMENA
from student.evaluation.job import EvaluationJob
from student.evaluation.report import EvaluationReport, GroupScore, PairScores, ParadigmScore
from student.job import StudentJob
from student.report import PASSAGE_FILE, Expected, HeldOutKL, HeldOutReport, Passage, PeakMemory, TrainingReport
from student.sweep.record import SweepReport, TrialRecord

SEEDS = (0, 1, 2)
CACHING_SECONDS = 60.0
PASSAGE = 40
# Held-out loss by role and name, for the seeds 0, 1, 2.
LOSSES: dict[tuple[Role, str], tuple[float, float, float]] = {
    ("teacher", "llama"): (3.52, 3.50, 3.54),
    ("teacher", "gpt2"): (3.58, 3.60, 3.59),
    ("student", "student"): (3.40, 3.42, 3.41),
    ("control", "student"): (3.60, 3.65, 3.61),
    ("live", "student"): (3.401, 3.418, 3.409),
}
PARAMETERS = {"llama": 4_200_000, "gpt2": 5_100_000, "student": 2_300_000}
SECONDS = {"teacher": 300.0, "student": 100.0, "control": 90.0, "live": 130.0}
DEVICE_BYTES = {"teacher": None, "student": 1_200_000_000, "control": 1_200_000_000, "live": 3_100_000_000}
LIBRARIES = {"torch": "2.13.0", "transformers": "5.23.0", "zarr": "3.1.5"}


def training_report(
    folder: Path, *, role: str = "student", name: str = "student", seed: int = 0, loss: float = 3.4, **changes: Any
) -> dict[str, Any]:
    """What `train-student` or `train-teacher` would have written there."""
    rng = random.Random(f"{role} {name} {seed}")
    steps = 600 if role == "teacher" else 400
    taught = role in ("student", "live")
    job = StudentJob.model_validate(
        {
            "cache": str(folder / "train"),
            "teachers": [f"ensemble-{seed}"] if taught else [],
            "model": f"/somewhere/models/{name}.json",
            "output_dir": str(folder / "run"),
            "eval_cache": str(folder / "valid"),
            "seed": seed,
            **({"alpha": 0.0, "temperature": 1.0} if taught else {}),
            "training": {"learning_rate": 1e-3},
        }
    )

    def at(step: int) -> float:
        return loss + 5.2 * math.exp(-step / 35) + 0.5 * math.exp(-step / 180) + rng.gauss(0, 0.012)

    report = TrainingReport(
        job=job,
        provenance={"cache": "a" * 64, "eval_cache": "b" * 64, f"cache/ensemble-{seed}": f"{seed}" * 64},
        isolated_documents=False,
        parameters=PARAMETERS.get(name, 1_000_000),
        steps=steps,
        windows_per_step=64,
        tokens_seen=steps * 64 * 128,
        seconds=SECONDS[role] + seed,
        device="NVIDIA L4" if role != "teacher" else "cpu",
        processes=1,
        libraries=LIBRARIES,
        train_log=[
            {"step": s, "loss": at(s), "cross_entropy": at(s), "epoch": s / 200} for s in range(4, steps + 1, 4)
        ],
        eval_log=[{"step": s, "epoch": s / 200, "eval_loss": at(s), "eval_ece": 0.02} for s in range(50, steps, 50)],
        held_out=HeldOutReport(
            tokens=50_000,
            cross_entropy=loss,
            perplexity=math.exp(loss),
            bits_per_byte=loss / math.log(2) / 3.1,
            ece=0.011 + 0.001 * seed,
            accuracy=0.36,
            kl={f"ensemble-{seed}": HeldOutKL(nats=0.3 + 0.01 * seed, lower_bound=False)} if taught else {},
        ),
        peak_memory=PeakMemory(process_bytes=1_500_000_000 + 1_000_000 * seed, device_bytes=DEVICE_BYTES[role]),
    )
    return {**json.loads(report.model_dump_json()), **changes}


def scores(loss: float, seed: int, bonus: float) -> dict[str, Any]:
    """What `logit-cache evaluate --out` would have written: BLiMP, some groups easier than others."""
    groups = {
        group: GroupScore(
            pairs=1000 * len(names), accuracy=min(0.99, 0.5 + 0.034 * number + bonus + 0.006 * (seed - 1))
        )
        for number, (group, names) in enumerate(PHENOMENA.items())
    }
    paradigms = {
        name: ParadigmScore(
            pairs=1000,
            accuracy=groups[group].accuracy,
            group=group,
            right="".join("1" if i < 1000 * groups[group].accuracy else "0" for i in range(1000)),
        )
        for group, names in PHENOMENA.items()
        for name in names
    }
    mean = sum(group.accuracy for group in groups.values()) / len(groups)
    report = EvaluationReport(
        job=EvaluationJob(model="model", pairs="blimp"),
        architecture="LlamaForCausalLM",
        parameters=1,
        device="cpu",
        libraries=LIBRARIES,
        prefix_token="<s>",
        held_out=None,
        minimal_pairs=PairScores(
            pairs=67_000,
            sha256="c" * 64,
            mean_over_groups=mean,
            mean_over_paradigms=mean,
            tied=0,
            close=3,
            groups=groups,
            paradigms=paradigms,
        ),
    )
    found: dict[str, Any] = json.loads(report.model_dump_json())
    return found


BONUS = {"teacher": 0.03, "student": 0.06, "control": 0.0, "live": 0.058}


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def recipe_folder(folder: Path, *, seeds: tuple[int, ...] = SEEDS, roles: tuple[str, ...] | None = None) -> Path:
    """A recipe with everything that it can have."""
    models = []
    for (role, name), losses in LOSSES.items():
        if roles is not None and role not in roles:
            continue
        for seed in seeds:
            run = f"seed-{seed}/{role}-{name}"
            models.append(ModelRecord(role=role, name=name, seed=seed, run=run, scores=f"{run}.scores.json"))
            report = training_report(folder, role=role, name=name, seed=seed, loss=losses[seed])
            write_json(folder / run / "report.json", report)
            write_json(folder / f"{run}.scores.json", scores(losses[seed], seed, BONUS[role]))
    recipe = RecipeRecord(
        recipe="baby-llama",
        scale="tiny",
        title="Baby Llama, scale tiny",
        settings={"train_tokens": 100_000, "vocabulary": 16_000, "learning_rate": 0.001, "epochs": 6, "tied": True},
        caches=Caches(train="train", held_out="valid"),
        entries=tuple(f"ensemble-{seed}" for seed in seeds),
        models=tuple(models),
    )
    write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
    for cache in ("train", "valid"):
        _cache(folder / cache, list(recipe.entries))
    for model in models:
        write_json(folder / model.run / PASSAGE_FILE, passage(stream_of(folder)).model_dump(mode="json"))
    return folder


def stream_of(folder: Path) -> str:
    """The digest of a recipe's held-out stream."""
    return LogitCache.open(str(folder / "valid")).record.corpus.stream_sha256


def passage(stream_sha256: str) -> Passage:
    """What a model would have recorded of the first positions."""
    likeliest = [((number, 0.5), (number + 1, 0.25), (number + 2, 0.125)) for number in range(PASSAGE)]
    expected = tuple(Expected(likeliest=each, entropy=1.25, label_logprob=-2.0) for each in likeliest)
    return Passage(stream_sha256=stream_sha256, start=0, expected=expected)


def _cache(url: Path, names: list[str]) -> None:
    vocabulary, positions, k = 61, 600, 8
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, vocabulary, positions).astype(np.uint16)
    record = make_corpus(str(url), tokens, vocabulary)
    labels = np.append(tokens[1:], -1).astype(np.int64)
    targets = dense_targets(2 * rng.normal(size=(positions, vocabulary)), k, labels)
    for number, name in enumerate(names):
        entry = make_entry(record, k, shard_tokens=304, chunk_tokens=16)
        members = tuple(
            TeacherIdentity(
                source=source,
                architecture=architecture,
                weights_sha256=f"{number}{source[0].encode()[0]:x}".ljust(64, "0"),
                config_sha256="0" * 64,
                dtype="float32",
                head_columns=vocabulary,
                parameters=PARAMETERS[source],
            )
            for source, architecture in (("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel"))
        )
        both = Teacher(combine="logit-mean", members=members, weights=(0.5, 0.5))
        entry = entry.model_copy(update={"teacher": both})
        writer = EntryWriter.open(str(url), name, entry)
        for shard in writer.pending():
            start = shard * entry.layout.shard
            rows = targets.rows(start, min(start + entry.layout.shard, positions))
            writer.commit(shard, rows, began=time.monotonic() - CACHING_SECONDS / 2)
        writer.finish()
        writer.publish_fidelity(_fidelity(LogitCache.open(str(url)).teacher(name).record_sha256, positions))


def _fidelity(record_sha256: str, positions: int) -> FidelityReport:
    treatments = ("bucket", "renormalise", "none")
    divergence = Divergences(forward=0.031, reverse=0.04, mean_forward=0.0021, mean_reverse=0.0022)
    angle = Angle(positions=9.1, mean=2.4)
    return FidelityReport(
        record_sha256=record_sha256,
        positions=positions,
        windows=12,
        labelled=positions,
        residual_mass=Spread(mean=0.081, q05=0.0, q25=0.02, q50=0.06, q75=0.12, q95=0.24, q99=0.3, maximum=0.4),
        quantisation=4.8e-6,
        divergences=dict.fromkeys((*treatments, "bucket-unigram"), divergence),
        gradients={name: {"uniform": angle, "tempered": angle} for name in treatments},
        calibration=Calibration(full=0.014, stored=dict.fromkeys(treatments, 0.02)),
        size=Size(mean_kept=8, bytes_per_token=40, bytes_per_id=3, overhead_bytes_per_token=16),
        k_for_residual_mass=(NeededIds(at_most=0.05, k=12),),
        k_for_forward=(NeededIds(at_most=0.01, k=16),),
        curve=tuple(CurvePoint(k=2**i, residual_mass=0.6 / 2**i, forward=0.9 / 3**i) for i in range(7)),
    )


def sweep_folder(folder: Path, trials: int = 24) -> Path:
    """A sweep over a learning rate, a number of layers and a schedule."""
    rng = random.Random(1)
    found = []
    for number in range(trials):
        rate = 10 ** rng.uniform(-4, -2)
        layers, schedule = rng.choice((2, 4, 6, 8)), rng.choice(("cosine", "linear", "constant"))
        value = 3.3 + 0.3 * (math.log10(rate) + 2.9) ** 2 + 0.02 * abs(layers - 6) + rng.uniform(0, 0.03)
        failed, pruned = number == 7, number != 7 and number % 5 == 3
        found.append(
            TrialRecord(
                number=number,
                state="failed" if failed else "pruned" if pruned else "complete",
                value=None if failed else value + 0.2 * pruned,
                parameters={"learning_rate": rate, "num_layers": layers, "lr_scheduler_type": schedule},
                seconds=4.0 if pruned else 12.5,
                steps=30 if pruned else 100,
                error="InputError: out of memory" if failed else None,
            )
        )
    report = SweepReport(
        title="Learning rate of the student",
        cache="run/train",
        metric="eval_loss",
        direction="minimize",
        backend="optuna",
        seconds=301.0,
        job={"model": "llama-tiny", "teachers": ["llama"], "training": {"num_train_epochs": 2}},
        search={"trials": trials},
        best=None,
        trials=tuple(found),
    )
    write_json(folder / "sweep.json", report.model_dump(mode="json"))
    return folder


def run_folder(folder: Path, **fields: Any) -> Path:
    """A training run on its own."""
    write_json(folder / "report.json", training_report(folder, **fields))
    return folder
