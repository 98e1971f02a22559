"""The estimate of a recipe before it runs: tokens, memory, disk, work and time.

Legend: `N` parameters, `L` layers, `H` hidden size, `F` feed-forward size, `V` vocabulary, `P` positions of a
micro-batch.

    memory to train     16 N bytes: weights, gradients and Adam's two moments in float32
                        + activations for the backward pass: P L (10 H + 4 F) numbers, 4 bytes each or 2 in float16
                        + a gigabyte for the program itself
    memory to score     4 N + the logits of a chunk + a gigabyte
    disk of a run       4 N, and 12 N for the checkpoint of its best epoch; 12 N more of the last while it runs
    with live teachers  to train + 4 N of each teacher + the student's logits and their gradient, 8 P V
    work                6 N' FLOPs per token to train, 2 N' to score; N' counts the weights that are multiplied
    time                that of the work, of the text, and of the start of a process

Text is taken at four bytes per token (3.55 with a vocabulary of 4,096, 3.1 with one of 2,048); the exact number is
known once it is tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from logit_cache.recipes.machine import Machine
from logit_cache.recipes.published import WINDOW_TOKENS, Model, Network, Recipe, Scale
from logit_cache.recipes.stages import Cost, Stage
from storage.errors import InputError
from storage.text import columns, duration, size

_PROGRAM_BYTES = 1 << 30
_SCORING_LOGITS = 256 << 20
# Measured on English text of books, dialogues and encyclopaedia.
_BYTES_PER_TOKEN = {2_048: 3.1, 4_096: 3.55}
_BYTES_PER_TOKEN_ELSEWHERE = 4.0
# Of an entry, per id that a row may hold, of which a threshold asks for 0.7 at most in the mean of a text, 1.6 bytes an
# id; and of the arrays with one number per position. Measured at `tiny`: 0.37 of the ids, 1.2 bytes an id, 4 beside.
_BYTES_PER_KEPT_ID, _BYTES_PER_POSITION = 1.1, 8.0
# The fraction of the speed of a large matrix product that such models reach: on a CPU, measured at `tiny`, 0.67 in
# training, 0.57 from the cache, 0.5 in caching and scoring. On a GPU it was not measured.
_REACHED = {"cpu": 0.5, "cuda": 0.4}
# To import the libraries, and to clean or tokenise text, measured on one of two busy cores.
_START_SECONDS, _TEXT_BYTES_PER_SECOND = 5.0, 700_000
# Bytes of a checkpoint for each weight: itself and Adam's two moments.
_CHECKPOINT = 12
# Of a new entry, scored once more for its fidelity report.
_FIDELITY_POSITIONS = 2_048
# The share of free memory to use; the rest is for other processes and for memory that the estimate leaves out.
_MEMORY_SHARE = 0.9


def tokens_of(text_bytes: int, vocabulary_size: int) -> int:
    return int(text_bytes / _BYTES_PER_TOKEN.get(vocabulary_size, _BYTES_PER_TOKEN_ELSEWHERE))


def training_memory(recipe: Recipe, model: Model, windows: int, half: bool, live: bool) -> int:
    """Bytes to train on micro-batches of `windows` windows.

    half: activations of 16 bits. live: with live teachers.
    """
    v, network, positions = recipe.vocabulary_size, model.network, windows * WINDOW_TOKENS
    kept = positions * network.layers * (10 * network.hidden + 4 * network.feed_forward) * (2 if half else 4)
    beside = sum(4 * teacher.network.parameters(v) for teacher in recipe.teachers) + 8 * positions * v if live else 0
    return 16 * network.parameters(v) + kept + beside + _PROGRAM_BYTES


def scoring_memory(networks: Sequence[Network], vocabulary_size: int) -> int:
    """Bytes to run models together without gradients."""
    return sum(4 * network.parameters(vocabulary_size) for network in networks) + _SCORING_LOGITS + _PROGRAM_BYTES


def choose_batches(recipe: Recipe, machine: Machine, live: bool, at_once: int) -> dict[str, int]:
    """The largest power of two of windows that divides a model's batch and fits, by its name, and under "live" that of
    the student with live teachers.

    at_once: processes that share the memory. Raises InputError where a model does not fit into its share, naming the
    model and the estimate.
    """
    half, v = machine.device == "cuda", recipe.vocabulary_size
    there = machine.memory_bytes // at_once
    room = int(there * _MEMORY_SHARE)
    scales = get_args(Scale)
    smaller = f"--scale {scales[scales.index(recipe.scale) - 1]}" if recipe.scale != scales[0] else "a larger machine"
    remedy = f"take {smaller}" + (", or leave --live out" if live else "")

    def chosen(model: Model, title: str, live_teachers: bool = False) -> int:
        batch = model.training.batch
        powers = [1 << power for power in range(batch.bit_length()) if batch % (1 << power) == 0]
        needed = {windows: training_memory(recipe, model, windows, half, live_teachers) for windows in powers}
        fitting = [windows for windows in powers if needed[windows] <= room]
        if not fitting:
            raise InputError(
                f"{title} needs about {size(needed[1])} of memory for a single window, and {machine.name} "
                f"({machine.device}) has {size(there)} free: {remedy}"
            )
        return fitting[-1]

    found = {model.name: chosen(model, f"teacher {model.name}") for model in recipe.teachers}
    found[recipe.student.name] = chosen(recipe.student, "the student")
    if live:
        found["live"] = chosen(recipe.student, "the student with live teachers", live_teachers=True)
    scoring = scoring_memory([teacher.network for teacher in recipe.teachers], v)
    if scoring > room:
        raise InputError(
            f"caching runs all teachers of {recipe.name} together and needs about {size(scoring)} of memory, "
            f"{machine.name} has {size(there)} free: take {smaller}"
        )
    return found


@dataclass(frozen=True)
class Costs:
    """The costs of a recipe's stages. pair_tokens: of all sentences of the minimal pairs; the others as `RecipeRun`."""

    recipe: Recipe
    train_tokens: int
    held_out_tokens: int
    pair_tokens: int
    batches: dict[str, int]
    half: bool

    def text(self, text_bytes: int, passes: int = 1) -> Cost:
        """To read a text: to clean it, or to tokenise it, in two passes where a tokenizer is trained on it."""
        return Cost(text_bytes=passes * text_bytes, memory_bytes=_PROGRAM_BYTES, disk_bytes=text_bytes)

    def training(self, model: Model, live: bool = False) -> Cost:
        """To train a model and to score the held-out text after each epoch; live: with the teachers beside it."""
        v = self.recipe.vocabulary_size
        own, teachers = model.network.products(v), self._teachers_products if live else 0
        work = self.train_tokens * (3 * own + teachers) + self.held_out_tokens * (own + teachers)
        windows = self.batches["live" if live else model.name]
        memory = training_memory(self.recipe, model, windows, self.half, live)
        return Cost(model.training.epochs * work, 0, memory, (4 + _CHECKPOINT) * model.network.parameters(v))

    def caching(self, tokens: int) -> Cost:
        """To run all teachers once over a stream, and over the sample of its fidelity report."""
        recipe = self.recipe
        positions = tokens * WINDOW_TOKENS / recipe.stride_tokens + min(tokens, _FIDELITY_POSITIONS)
        memory = scoring_memory([teacher.network for teacher in recipe.teachers], recipe.vocabulary_size)
        stored = int(tokens * (recipe.kept_ids * _BYTES_PER_KEPT_ID + _BYTES_PER_POSITION))
        return Cost(positions * self._teachers_products, 0, memory, stored)

    def scoring(self, network: Network) -> Cost:
        """To score a model on the held-out text and on minimal pairs."""
        v = self.recipe.vocabulary_size
        work = (self.held_out_tokens + self.pair_tokens) * network.products(v)
        return Cost(work, memory_bytes=scoring_memory([network], v))

    def sweep(self, model: Model, trials: int) -> Cost:
        """To search a schedule: trials of the recipe's length on average, each scored; the best model is kept."""
        one, v = self.training(model), self.recipe.vocabulary_size
        pairs, kept = self.pair_tokens * model.network.products(v), 4 * model.network.parameters(v)
        return replace(one, products=trials * (one.products + pairs), disk_bytes=kept)

    @property
    def _teachers_products(self) -> int:
        return sum(teacher.network.products(self.recipe.vocabulary_size) for teacher in self.recipe.teachers)


def peak_disk(stages: Sequence[Stage], recipe: Recipe) -> int:
    """Peak bytes on disk: the files that all stages keep, and the last checkpoints of two models at once."""
    largest = max(network.parameters(recipe.vocabulary_size) for network in recipe.models.values())
    return sum(stage.cost.disk_bytes for stage in stages) + 2 * _CHECKPOINT * largest


def seconds(cost: Cost, machine: Machine) -> float:
    work = cost.products / (machine.products_per_second * _REACHED[machine.device])
    return work + cost.text_bytes / _TEXT_BYTES_PER_SECOND + _START_SECONDS


def table(stages: Sequence[Stage], machine: Machine) -> str:
    """The estimate as a text table for a terminal: a row for every stage, and the sum of their times."""
    rows = [("stage", "work", "time", "memory", "disk")]
    for stage in stages:
        cost, time = stage.cost, duration(seconds(stage.cost, machine))
        work = f"{2 * cost.products:.1e} FLOP" if cost.products else "–"
        rows.append((stage.title, work, time, size(cost.memory_bytes), size(cost.disk_bytes)))
    lines = columns(rows)
    lines.append(
        f"about {duration(sum(seconds(stage.cost, machine) for stage in stages))}, on {machine.name} "
        f"({machine.device}; {2 * machine.products_per_second / 1e12:.2f} TFLOP/s in a matrix product, of which "
        f"{_REACHED[machine.device]:.0%} are assumed)"
    )
    return "\n".join(lines)
