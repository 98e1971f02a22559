"""What each of several processes does in `test_fsdp`: the bound model sharded by FSDP2, on CPUs.

accelerate leaves FSDP out on CPUs, though torch shards there as on GPUs: `on_cpus` takes that choice away.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import accelerate.state
import torch
import torch.distributed
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from student.data.batches import collate
from student.data.windows import DistillationWindows
from student.loss.distillation import DistillationLoss
from student.loss.teacher_targets import Member
from student.training.bound_forward import bind_loss
from student.training.fsdp import keep_precision

V, T, B = 61, 16, 8
CASES = [
    (units, tied, fused, bf16)
    for units in ("layers", "head", "accelerate")
    for tied in (False, True)
    for fused in ("on", "off")
    for bf16 in (False, True)
    if not (units == "head" and tied)  # torch has tied weights in one unit
]


def gradients(cache: str) -> None:
    """Print, for every case, how far the loss and the gradients are from those of one process."""
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    windows = DistillationWindows(cache, ["a", "b"], T)
    members = [Member.of(name, entry) for name, entry in windows.entries.items()]
    batches = [collate(windows.__getitems__(range(B * i, B * i + B))) for i in range(2)]
    batches[1]["labels"][0, 3:] = -100
    count = torch.tensor(float(sum(int((batch["labels"] != -100).sum()) for batch in batches)))
    for units, tied, fused, bf16 in CASES:
        loss = DistillationLoss(V, 0.3, 2.0, members, window_tokens=T)
        whole = bound(loss, tied, fused)
        if bf16:
            whole.to(torch.bfloat16)
        expected = torch.zeros(())
        parts = torch.zeros(1 + len(members), 2)
        for batch in batches:
            output = whole(**batch, num_items_in_batch=count)
            output.loss.backward()
            expected += output.loss.detach()
            parts += output.parts

        model = shard(bound(loss, tied, fused), units, bf16)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        for _ in range(2):  # the second pass meets what the first left behind
            model.zero_grad()
            sums = torch.zeros(1 + parts.numel())
            for i, batch in enumerate(batches):
                model.set_requires_gradient_sync(i == len(batches) - 1)
                mine = of_rank(batch, slice(rank * B // world, (rank + 1) * B // world))
                output = model(**mine, num_items_in_batch=count)
                # Gradients are averaged over the processes, as DDP does.
                (output.loss * world).backward()
                sums += torch.cat([output.loss.detach().reshape(1), output.parts.flatten()])
            torch.distributed.all_reduce(sums)
        off = 0.0
        for sharded, plain in zip(model.parameters(), whole.parameters(), strict=True):
            gradient, full = sharded.grad.full_tensor(), plain.grad.float()
            off = max(off, float((gradient - full).abs().max() / full.abs().max()))
        if rank == 0:
            figures = {"loss": float((sums[0] - expected).abs()), "gradient": off}
            off_parts = sums[1:].reshape(parts.shape) / parts - 1
            figures |= {"count": float(sums[1] - parts[0, 0]), "parts": float(off_parts.abs().max())}
            print(json.dumps([units, tied, fused, bf16, figures]), flush=True)
    torch.distributed.destroy_process_group()


def bound(loss: DistillationLoss, tied: bool, fused: Any) -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied))
    bind_loss(model, loss, fused)
    return model.train()


def shard(model: Any, units: str, bf16: bool) -> Any:
    """The decoder's layers as units, and the rest in the root; the head as one too; or what accelerate makes."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    state = SimpleNamespace(fsdp_plugin=plugin)
    if bf16:
        plugin.set_mixed_precision("bf16")
        if os.environ.get("AS_ACCELERATE_CASTS") != "1":
            keep_precision(SimpleNamespace(state=state))
    if units == "accelerate":
        said = {"mixed_precision": "bf16" if bf16 else "no", "is_main_process": True, "device": torch.device("cpu")}
        return fsdp2_prepare_model(SimpleNamespace(state=state, torch_device_mesh=None, **said), model)
    policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    for module in [*model.model.layers, *([model.lm_head] if units == "head" else [])]:
        fully_shard(module, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def of_rank(batch: Any, rows: slice) -> Any:
    if isinstance(batch, dict):
        return {name: of_rank(value, rows) for name, value in batch.items()}
    return batch[rows]


def on_cpus() -> None:
    """Have accelerate apply FSDP on CPUs, and `student.training.arguments` let it."""
    import student.training.arguments

    student.training.arguments.check_fsdp = lambda args: None
    original = accelerate.state.AcceleratorState.__init__

    def init(self: Any, *words: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        first = "fsdp_plugin" not in self.__dict__
        original(self, *words, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None and first:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = self.distributed_type
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    accelerate.state.AcceleratorState.__init__ = init


if __name__ == "__main__":
    gradients(sys.argv[1])
