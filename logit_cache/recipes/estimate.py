"""The estimate of a recipe before it runs: tokens, memory, disk, work and time.

Legend: `N` parameters, `L` layers, `H` hidden size, `F` feed-forward size, `V` vocabulary, `P` positions of a
micro-batch.

    memory to train     16 N bytes: weights, gradients and Adam's two moments in float32
                        + activations for the backward pass: P L (10 H + 4 F) numbers, 4 bytes each or 2 in float16
                        + a gigabyte for the program itself
    memory to score     4 N + the logits of a chunk + a gigabyte
    with live teachers  to train + 4 N of each teacher + the student's logits and their gradient, 8 P V
    work                6 N' FLOPs per token to train, 2 N' to score; N' counts the weights that are multiplied

Text is taken at four bytes per token (3.1 with a vocabulary of 2,048); the exact number is known once it is tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from logit_cache.recipes.machine import Machine
from logit_cache.recipes.published import WINDOW_TOKENS, Model, Network, Recipe
from storage.errors import InputError
from storage.text import columns, duration, size

_PROGRAM_BYTES = 1 << 30
_SCORING_LOGITS = 256 << 20
# Measured on English text of books, dialogues and encyclopaedia.
_BYTES_PER_TOKEN = {2_048: 3.1}
_BYTES_PER_TOKEN_ELSEWHERE = 4.0
# Of an entry: bytes per sampled id over all its arrays, and of the arrays with one number per position.
_BYTES_PER_KEPT_ID, _BYTES_PER_POSITION = 2.0, 18.0
# The fraction of the speed of a large matrix product that training or scoring of such models reaches.
_REACHED = 0.4
# The share of free memory to use; the rest is for other processes and for memory that the estimate leaves out.
_MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Cost:
    """The cost of one stage: `products` in multiply-adds (2 FLOPs each), peak memory, and disk that stays in use."""

    title: str
    products: float
    memory_bytes: int
    disk_bytes: int = 0


def tokens_of(text_bytes: int, vocabulary_size: int) -> int:
    """Estimated number of tokens of a text."""
    return int(text_bytes / _BYTES_PER_TOKEN.get(vocabulary_size, _BYTES_PER_TOKEN_ELSEWHERE))


def training_memory(network: Network, vocabulary_size: int, windows: int, half: bool) -> int:
    """Bytes to train on micro-batches of `windows` windows; `half`: activations of 16 bits."""
    positions = windows * WINDOW_TOKENS
    kept = positions * network.layers * (10 * network.hidden + 4 * network.feed_forward) * (2 if half else 4)
    return 16 * network.parameters(vocabulary_size) + kept + _PROGRAM_BYTES


def live_memory(recipe: Recipe, windows: int, half: bool) -> int:
    """Bytes to train the student with live teachers; see the module."""
    v = recipe.vocabulary_size
    teachers = sum(4 * teacher.network.parameters(v) for teacher in recipe.teachers)
    return training_memory(recipe.student.network, v, windows, half) + teachers + 8 * windows * WINDOW_TOKENS * v


def scoring_memory(networks: Sequence[Network], vocabulary_size: int) -> int:
    """Bytes to run models together without gradients."""
    return sum(4 * network.parameters(vocabulary_size) for network in networks) + _SCORING_LOGITS + _PROGRAM_BYTES


def micro_batch(title: str, batch: int, machine: Machine, memory: Sequence[int], remedy: str) -> int:
    """The largest power of two dividing `batch` that fits, in windows; `memory[p]` is the bytes that 2^p windows need.

    Raises InputError where a single window does not fit.
    """
    room = int(machine.memory_bytes * _MEMORY_SHARE)
    fitting = [power for power, needed in enumerate(memory) if needed <= room]
    if not fitting:
        raise InputError(
            f"{title} needs about {size(memory[0])} of memory for a single window, and {machine.name} "
            f"({machine.device}) has {size(machine.memory_bytes)} free: {remedy}"
        )
    return min(batch, 1 << fitting[-1])


def choose_batches(recipe: Recipe, machine: Machine, live: bool, at_once: int) -> dict[str, int]:
    """Micro-batch in windows by model name, and under "live" that of the student with live teachers.

    at_once: processes that share the memory. Raises InputError where a model does not fit into its share, naming the
    model and the estimate.
    """
    half, v = machine.device == "cuda", recipe.vocabulary_size
    machine = machine.model_copy(update={"memory_bytes": machine.memory_bytes // at_once})
    smaller = {"paper": "--scale small", "small": "--scale tiny", "tiny": "a larger machine"}[recipe.scale]
    remedy = f"take {smaller}" + (", or leave --live out" if live else "")

    def chosen(model: Model, title: str, live_teachers: bool = False) -> int:
        batch = model.training.batch
        windows = [1 << power for power in range(batch.bit_length()) if batch % (1 << power) == 0]
        needed = [
            live_memory(recipe, count, half) if live_teachers else training_memory(model.network, v, count, half)
            for count in windows
        ]
        return micro_batch(title, batch, machine, needed, remedy)

    found = {model.name: chosen(model, f"teacher {model.name}") for model in recipe.teachers}
    found[recipe.student.name] = chosen(recipe.student, "the student")
    if live:
        found["live"] = chosen(recipe.student, "the student with live teachers", live_teachers=True)
    scoring = scoring_memory([teacher.network for teacher in recipe.teachers], v)
    if scoring > machine.memory_bytes * _MEMORY_SHARE:
        raise InputError(
            f"caching runs all teachers of {recipe.name} together and needs about {size(scoring)} of memory, "
            f"{machine.name} has {size(machine.memory_bytes)} free: take {smaller}"
        )
    return found


def costs(
    recipe: Recipe, train_tokens: int, held_out_tokens: int, batches: dict[str, int], half: bool, live: bool
) -> list[Cost]:
    """The stages of one seed that dominate its cost, in order."""
    v, student = recipe.vocabulary_size, recipe.student
    scored = sum(teacher.network.products(v) for teacher in recipe.teachers)
    stages = []

    def training(title: str, model: Model, memory: int, teacher_products: int = 0) -> Cost:
        epochs = model.training.epochs
        work = epochs * (
            train_tokens * (3 * model.network.products(v) + teacher_products)
            + held_out_tokens * (model.network.products(v) + teacher_products)
        )
        return Cost(title, work, memory, 4 * model.network.parameters(v))

    for teacher in recipe.teachers:
        memory = training_memory(teacher.network, v, batches[teacher.name], half)
        stages.append(training(f"teacher {teacher.name}", teacher, memory))
    tokens = train_tokens + held_out_tokens
    stored = int(tokens * (recipe.kept_ids * _BYTES_PER_KEPT_ID + _BYTES_PER_POSITION))
    overlap = WINDOW_TOKENS / recipe.stride_tokens
    stages.append(
        Cost(
            "cache, training and held-out text",
            tokens * scored * overlap,
            scoring_memory([teacher.network for teacher in recipe.teachers], v),
            stored,
        )
    )
    memory = training_memory(student.network, v, batches[student.name], half)
    stages.append(training("student from the cache", student, memory))
    stages.append(training("student without distillation", student, memory))
    if live:
        memory = live_memory(recipe, batches["live"], half)
        stages.append(training("student with live teachers", student, memory, scored))
    return stages


def peak_disk(stages: Sequence[Cost], recipe: Recipe, seeds: int) -> int:
    """Peak bytes on disk: the files that all seeds keep, and two checkpoints of the largest model and its moments."""
    largest = max(network.parameters(recipe.vocabulary_size) for network in recipe.models.values())
    return seeds * sum(stage.disk_bytes for stage in stages) + 2 * 12 * largest


def seconds(stage: Cost, machine: Machine) -> float:
    """Estimated duration of a stage."""
    return stage.products / (machine.products_per_second * _REACHED)


def table(stages: Sequence[Cost], machine: Machine, seeds: int) -> str:
    """The estimate as a text table for a terminal."""
    rows = [("stage", "work", "time", "memory", "disk")]
    for stage in stages:
        rows.append(
            (
                stage.title,
                f"{2 * stage.products:.1e} FLOP",
                duration(seconds(stage, machine)),
                size(stage.memory_bytes),
                size(stage.disk_bytes),
            )
        )
    total = sum(seconds(stage, machine) for stage in stages)
    lines = columns(rows)
    each = f", and {seeds} times that for {seeds} seeds" if seeds > 1 else ""
    lines.append(
        f"about {duration(total)}{each}, on {machine.name} ({machine.device}; "
        f"{2 * machine.products_per_second / 1e12:.2f} TFLOP/s in a matrix product, of which two fifths are assumed)"
    )
    return "\n".join(lines)
