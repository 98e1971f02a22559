"""Teachers whose layers are spread by a device map: the numbers of one device, where tensors go, and refusals.

There is one device here, the CPU, so the layers are really spread over it and the disk, behind accelerate's hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.caches import small as fakes
from support.jobs import cache_logits, refusal
from support.models.families import COMMON, families
from support.models.saved import load, saver
from torch import Tensor, nn

from storage.errors import InputError
from teachers.ensemble import EnsembleTeacher
from teachers.huggingface.device_map import DeviceMap, input_device
from teachers.huggingface.output_layer import Float32Head, OffloadedHead
from teachers.huggingface.scoring import FastPath

V, HEAD = 400, 403
FAMILIES = families(HEAD)
CONFIGS = FAMILIES | {
    "tied": lambda: FAMILIES["llama"](tie_word_embeddings=True),
    # Does not state which of its layers must stay whole.
    "biogpt": lambda: transformers.BioGptConfig(**COMMON, vocab_size=HEAD),
}
SPREAD = DeviceMap("sequential", ("cpu=60KB",), "disk")


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves a random model of a family once."""
    return saver(tmp_path_factory.mktemp("spread"), CONFIGS)


def logits(teacher: Any) -> Tensor:
    windows = torch.randint(V, (4, 24), generator=torch.Generator().manual_seed(3))
    rows = torch.tensor([*range(24), *range(40, 48), 95])
    return torch.cat(list(teacher.score(windows, rows)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "tied", "phi", "gemma2", "gpt2"])
def test_offloaded_layers_give_the_numbers_of_one_device(family: str, dtype: str, save: Callable[[str], Path]) -> None:
    one = load(save(family), dtype=dtype)
    for device_map in (SPREAD, DeviceMap("sequential", ("cpu=30KB",), "disk"), DeviceMap("auto")):
        spread = load(save(family), dtype=dtype, device_map=device_map)
        used = set(getattr(spread._model, "hf_device_map", {}).values())
        assert "disk" in used or device_map.offload is None, "nothing was offloaded, so nothing was tested"
        assert torch.equal(logits(spread), logits(one))
        assert spread.identity == one.identity
        assert (spread.head, spread.device, spread.shard) == (one.head, torch.device("cpu"), None)


def test_a_head_on_the_disk_is_fetched_for_each_chunk(save: Callable[[str], Path]) -> None:
    spread = load(save("llama"), dtype="bfloat16", device_map=SPREAD)
    assert isinstance(spread._path, FastPath)
    assert isinstance(spread._path.head, OffloadedHead)
    linear = spread._model.get_output_embeddings()
    assert linear.weight.device.type == "meta"
    logits(spread)
    assert linear.weight.device.type == "meta", "its weights do not stay"


def test_hidden_states_go_to_the_device_of_the_head() -> None:
    """The other device is the one that has no numbers: a tensor that was not moved there would fail."""

    class Backbone(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 8))

    path = FastPath(Backbone(), Float32Head(torch.ones(30, 8, device="meta"), torch.ones(30, device="meta")))
    (chunk,) = path.score(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([1, 7]), 30, 1 << 20)
    assert (chunk.device.type, tuple(chunk.shape)) == ("meta", (2, 30))


def test_windows_go_where_the_embeddings_compute(save: Callable[[str], Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(save("llama"))
    assert input_device(model) == torch.device("cpu")
    for placement, expected in [
        ({"model.embed_tokens": 1, "model.layers": 0, "lm_head": 0}, ("cuda", 1)),
        ({"model": 2, "lm_head": 3}, ("cuda", 2)),
        ({"": "cpu"}, ("cpu", None)),
        ({"model.embed_tokens": "cpu", "model.layers": "disk", "lm_head": "disk"}, ("cpu", None)),
        # An accelerator computes for layers that are only stored in main memory.
        ({"model.embed_tokens": "cpu", "model.layers": 1, "lm_head": 0}, ("cuda", 1)),
        ({"model.embed_tokens": "mps", "model.layers": "cpu"}, ("mps", None)),
    ]:
        model.hf_device_map = placement
        found = input_device(model)
        assert (found.type, found.index) == expected


def test_members_of_an_ensemble_are_spread_each(save: Callable[[str], Path]) -> None:
    families = ("llama", "gemma2")
    together = EnsembleTeacher([load(save(family), device_map=SPREAD) for family in families], "logit-mean", V)
    alone = EnsembleTeacher([load(save(family)) for family in families], "logit-mean", V)
    assert torch.equal(logits(together), logits(alone))


@pytest.fixture(scope="session")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "cache"
    tokens = np.random.default_rng(0).integers(0, V, 700).astype(np.uint16)
    fakes.make_corpus(str(path), tokens, V)
    return path


def test_a_cache_is_the_same_and_can_be_resumed(stream: Path, save: Callable[[str], Path]) -> None:
    """The placement of layers is no part of an entry's identity: it changes no number."""
    entry, whole = cache_logits(stream, "one", save("llama"), k=8)
    spread, same = cache_logits(
        stream, "spread", save("llama"), k=8, device_map="sequential", offload="disk", max_memory=["cpu=60KB"]
    )
    assert spread.entry == entry.entry.model_copy(update={"created_with": spread.entry.created_with})
    assert np.array_equal(whole.token_ids, same.token_ids)
    assert np.array_equal(whole.logprobs, same.logprobs, equal_nan=True)
    again, _ = cache_logits(stream, "one", save("llama"), k=8, device_map="auto")
    assert not again.missing()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"device_map": "auto", "device": "cpu"}, "--device names one device and --device-map takes several"),
        ({"device_map": "auto", "tensor_parallel": True}, "leave one of them out"),
        ({"offload": "cpu"}, "--offload goes with --device-map"),
        ({"max_memory": ["cpu=1GB"]}, "--max-memory goes with --device-map"),
        ({"device_map": "balanced", "max_memory": ["7=1GB"]}, "there is no device 7"),
        ({"device_map": "balanced", "max_memory": ["cpu=much"]}, "expected DEVICE=SIZE"),
        ({"device_map": "balanced", "max_memory": ["cpu"]}, "expected DEVICE=SIZE"),
        ({"device_map": "sequential", "max_memory": ["cpu=60KB"]}, "does not fit on the devices"),
        ({"device_map": "disk"}, "--device-map: expected 'auto'"),
    ],
)
def test_refusals(fields: dict[str, Any], words: str, stream: Path, save: Callable[[str], Path]) -> None:
    message = refusal(stream, "refused", save("llama"), k=8, **fields)
    assert words in message
    assert not (stream / "teachers" / "refused").exists()


def test_a_model_that_cannot_be_cut_is_refused(save: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=r"BioGptForCausalLM does not state which of its layers must stay whole"):
        load(save("biogpt"), device_map=DeviceMap("sequential", ("cpu=100KB",), "disk"))
    load(save("biogpt"), device_map=DeviceMap("auto"))  # it need not be cut


def test_main_memory_is_taken_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.utils

    monkeypatch.setattr(accelerate.utils, "get_max_memory", lambda: {0: 10, 1: 20, "cpu": 30})
    assert DeviceMap("auto").options() == {"device_map": "auto", "max_memory": {0: 10, 1: 20}}
    assert DeviceMap("auto", ("1=2KB",), "cpu").options()["max_memory"] == {0: 10, 1: 2_000, "cpu": 30}
    with pytest.raises(InputError, match=r"no device cpu .*with --offload cpu main memory"):
        DeviceMap("auto", ("cpu=2KB",)).options()
