"""The recipes of Baby Llama and BabyLlama-2 as data: networks, schedules, targets, at four scales.

`paper` has the values of the papers' code. The others keep its setup (teacher families, ensemble, loss, temperature,
windowing) with smaller networks and, for `mini` and `tiny`, less text. `small` is for a GPU, `mini` for some six hours
on two cores, and `tiny` for minutes there. Learning rates grow as networks shrink; the product of weight decay and
learning rate, which is the decay of a weight per step, stays. `tiny` is in the papers' regime: text is scarce, the
teachers stop improving within their epochs, and their students still improve.

Sources: Timiryasov and Tastet 2023, "Baby Llama"; Tastet and Timiryasov 2024, "BabyLlama-2".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from storage.config import Frozen
from storage.errors import InputError

Scale = Literal["tiny", "mini", "small", "paper"]

# All windows have 128 tokens; the models' position limit is twice that.
WINDOW_TOKENS = 128
MAX_POSITIONS = 256


class Network(Frozen):
    """A Llama or GPT-2 architecture; `config` is its JSON configuration file without the vocabulary size."""

    family: Literal["llama", "gpt2"]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    feed_forward: int

    @property
    def config(self) -> dict[str, Any]:
        if self.family == "llama":
            return {
                "model_type": "llama",
                "num_hidden_layers": self.layers,
                "hidden_size": self.hidden,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "intermediate_size": self.feed_forward,
                "max_position_embeddings": MAX_POSITIONS,
                "tie_word_embeddings": False,
            }
        return {
            "model_type": "gpt2",
            "n_layer": self.layers,
            "n_embd": self.hidden,
            "n_head": self.heads,
            "n_inner": self.feed_forward,
            "n_positions": MAX_POSITIONS,
            "tie_word_embeddings": True,
        }

    def parameters(self, vocabulary_size: int) -> int:
        h, f, v = self.hidden, self.feed_forward, vocabulary_size
        if self.family == "llama":
            kv = h // self.heads * self.kv_heads
            return 2 * v * h + self.layers * (2 * h * h + 2 * h * kv + 3 * h * f + 2 * h) + h
        return v * h + MAX_POSITIONS * h + self.layers * (4 * h * h + 2 * h * f + 9 * h + f) + 2 * h

    def products(self, vocabulary_size: int) -> int:
        """Multiply-adds per token of a forward pass: all parameters but the embedding tables that are looked up."""
        looked_up = vocabulary_size if self.family == "llama" else MAX_POSITIONS
        return self.parameters(vocabulary_size) - looked_up * self.hidden


class Training(Frozen):
    """A schedule: AdamW, cosine decay after a linear warm-up. `batch` is in windows per optimizer step."""

    learning_rate: float
    batch: int
    epochs: int
    warmup_steps: int
    weight_decay: float


class Model(Frozen):
    """A network with its training schedule; `name` is that of its folder."""

    name: str
    network: Network
    training: Training


class Recipe(Frozen):
    """One recipe at one scale.

    offset                  of training windows: fixed blocks, or a random offset for each
    temperature, alpha      of the loss; loss_scale as in `student.loss.objective`
    kept_ids                ids stored per position: enough for a student from the cache to equal one with live teachers
                            up to noise (docs/recipes.md); the paper's code kept every logit
    text_bytes              the most training text to use, all files together; None: all of it. eval_text_bytes: the
                            same of the held-out text
    scored                  whether `logit-cache evaluate` scores every model at the end
    """

    name: str
    title: str
    scale: Scale
    vocabulary_size: int
    teachers: tuple[Model, ...]
    student: Model
    offset: Literal["fixed", "random"]
    temperature: float
    alpha: float = 0.5
    loss_scale: Literal["token", "babyllama"] = "babyllama"
    stride_tokens: int = WINDOW_TOKENS
    kept_ids: int
    text_bytes: int | None = None
    eval_text_bytes: int | None = None
    scored: bool = True

    @property
    def models(self) -> dict[str, Network]:
        """The networks by the name of their configuration file, without its suffix."""
        return {model.name: model.network for model in (*self.teachers, self.student)}


def llama(layers: int, hidden: int, heads: int, feed_forward: int, kv_heads: int | None = None) -> Network:
    """A Llama; by default, every head has keys and values of its own."""
    return Network(
        family="llama", layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads or heads, feed_forward=feed_forward
    )


def _gpt2(layers: int, hidden: int, heads: int) -> Network:
    return Network(family="gpt2", layers=layers, hidden=hidden, heads=heads, kv_heads=heads, feed_forward=4 * hidden)


def model(
    name: str, network: Network, lr: float, batch: int, epochs: int, warmup: int = 100, decay: float = 0.0
) -> Model:
    schedule = Training(learning_rate=lr, batch=batch, epochs=epochs, warmup_steps=warmup, weight_decay=decay)
    return Model(name=name, network=network, training=schedule)


def _text(scale: Scale) -> dict[str, Any]:
    if scale == "tiny":  # some 64,000 tokens to train on, and 19,000 held out
        return {"vocabulary_size": 2_048, "text_bytes": 200_000, "eval_text_bytes": 60_000}
    if scale == "mini":
        return {"vocabulary_size": 4_096, "text_bytes": 22_000_000, "eval_text_bytes": 1_000_000}
    return {"vocabulary_size": 16_000}


def _baby_llama(scale: Scale) -> Recipe:
    sizes: Mapping[Scale, dict[str, Any]] = {
        "paper": {
            "teachers": (
                model("llama", llama(24, 1024, 8, 3072), 3e-4, 128, 4, 300),
                model("gpt2", _gpt2(24, 1536, 16), 2.5e-4, 128, 4, 300),
            ),
            "student": model("student", llama(16, 512, 8, 1024), 2.5e-4, 32, 6, 200, 0.1),
        },
        "small": {
            "teachers": (
                model("llama", llama(12, 640, 8, 1920), 6e-4, 64, 3, 200),
                model("gpt2", _gpt2(12, 768, 12), 5e-4, 64, 3, 200),
            ),
            "student": model("student", llama(8, 384, 6, 1024), 7e-4, 32, 4, 200, 0.036),
        },
        "mini": {
            "teachers": (
                model("llama", llama(4, 256, 4, 768), 1.5e-3, 16, 4, 200),
                model("gpt2", _gpt2(4, 256, 4), 1.5e-3, 16, 4, 200),
            ),
            "student": model("student", llama(3, 192, 4, 512), 1.5e-3, 16, 5, 200, 0.0167),
        },
        "tiny": {
            "teachers": (
                model("llama", llama(3, 192, 4, 512), 2e-3, 8, 6),
                model("gpt2", _gpt2(3, 192, 4), 2e-3, 8, 6),
            ),
            "student": model("student", llama(2, 144, 4, 384), 2e-3, 8, 12, decay=0.0125),
        },
    }
    # At temperature 2 more of the mass is in the tail, and the sample of it is noisier.
    others: dict[str, Any] = {"offset": "fixed", "temperature": 2.0, "kept_ids": 512, **_text(scale)}
    return Recipe(name="baby-llama", title=f"Baby Llama, scale {scale}", scale=scale, **others, **sizes[scale])


def _baby_llama_2(scale: Scale) -> Recipe:
    sizes: Mapping[Scale, tuple[Any, ...]] = {
        "paper": (llama(32, 960, 15, 2560, kv_heads=5), 7e-4, 128, 8, 600, 5.0),
        "small": (llama(12, 480, 15, 1280, kv_heads=5), 1e-3, 64, 4, 200, 3.5),
        "mini": (llama(4, 240, 6, 640, kv_heads=2), 1.5e-3, 16, 4, 200, 2.33),
        "tiny": (llama(3, 192, 6, 512, kv_heads=2), 2e-3, 8, 12, 100, 1.75),
    }
    one, two, student = (model(name, *sizes[scale]) for name in ("one", "two", "student"))
    return Recipe(
        name="babyllama-2",
        title=f"BabyLlama-2, scale {scale}",
        scale=scale,
        teachers=(one, two),
        student=student,
        offset="random",
        temperature=1.0,
        kept_ids=256,
        # Students' windows start at any token: with at least half a window of context, targets are closest to those of
        # live teachers (docs/recipes.md).
        stride_tokens=WINDOW_TOKENS // 2,
        **_text(scale),
    )


RECIPES = {"baby-llama": _baby_llama, "babyllama-2": _baby_llama_2}


def find_recipe(name: str, scale: Scale) -> Recipe:
    """A recipe by name and scale. Raises InputError for an unknown name."""
    if name not in RECIPES:
        raise InputError(f"there is no recipe {name!r}; expected one of {', '.join(RECIPES)}")
    return RECIPES[name](scale)
