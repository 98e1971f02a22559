"""A model whose layers are spread over the devices of one process, by accelerate's device maps.

transformers and accelerate assign layers to devices by the devices' memory; hooks on the layers move their inputs.
Windows go to the device of the input embeddings, logits appear where the output layer computes
(`teachers.huggingface.scoring`). Layers that fit on no device are refused unless offloading to main memory or disk was
requested: then their weights are moved to a device for every batch, which is inherently slow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from storage.errors import InputError

_NO_DEVICE = ("cpu", "disk")  # where there are accelerators, layers there are stored, not computed


@dataclass(frozen=True)
class DeviceMap:
    """How layers are spread over devices.

    strategy    accelerate's: auto and balanced share them equally, sequential fills one device after the other
    max_memory  limits as DEVICE=SIZE, such as 0=20GiB or cpu=64GiB; other devices use all their free memory
    offload     where layers that fit on no accelerator are stored: cpu (main memory), disk (also the model's own
                files); None refuses them
    """

    strategy: Literal["auto", "balanced", "sequential"]
    max_memory: tuple[str, ...] = ()
    offload: Literal["cpu", "disk"] | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`. Raises InputError for limits that are malformed or name no device."""
        from accelerate.utils import get_max_memory

        memory: dict[int | str, Any] = get_max_memory()
        if self.offload is None and len(memory) > 1:
            del memory["cpu"]
        for text in self.max_memory:
            device, limit = _limit(text)
            if device not in memory:
                known = ", ".join(map(str, memory))
                raise InputError(
                    f"--max-memory {text}: there is no device {device} to put layers on; here there are {known}"
                    + ("" if self.offload else ", and with --offload cpu main memory")
                )
            memory[device] = limit
        return {"device_map": self.strategy, "max_memory": memory}

    def check(self, model: Any, source: str) -> None:
        """Raise InputError for a model that does not fit, or that accelerate would split where it cannot be split."""
        used = set(getattr(model, "hf_device_map", {}).values())
        if "disk" in used and self.offload != "disk":
            raise InputError(
                f"{source}: does not fit on the devices here together, within their free memory and --max-memory: take "
                f"a smaller dtype or more devices, or offload the other layers with --offload cpu or disk (slow)"
            )
        if len(used) > 1 and not model._no_split_modules:
            raise InputError(
                f"{source}: {type(model).__name__} does not state which of its layers must stay whole, so accelerate "
                f"cannot spread it over devices: leave --device-map out, or use --tensor-parallel"
            )


def input_device(model: Any) -> torch.device:
    """The device on which windows are expected: where the input embeddings compute."""
    placement: dict[str, Any] = getattr(model, "hf_device_map", {})
    computing = [device for device in placement.values() if device not in _NO_DEVICE]
    if not placement or not computing:
        return torch.device("cpu") if placement else next(model.parameters()).device
    embeddings = model.get_input_embeddings()
    (name,) = [name for name, module in model.named_modules() if module is embeddings][:1]
    parts = name.split(".")
    prefixes = [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
    device = next((placement[prefix] for prefix in prefixes if prefix in placement), computing[0])
    device = computing[0] if device in _NO_DEVICE else device
    if not isinstance(device, int):
        return torch.device(device)
    # accelerate names an accelerator by its number alone.
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cuda" if accelerator is None else accelerator.type, device)


def _limit(text: str) -> tuple[int | str, int]:
    from accelerate.utils import convert_file_size_to_int

    device, sign, size = text.partition("=")
    try:
        if not sign:
            raise ValueError
        return int(device) if device.isdecimal() else device, convert_file_size_to_int(size)
    except ValueError:
        raise InputError(f"--max-memory {text!r}: expected DEVICE=SIZE, such as 0=20GiB or cpu=64GiB") from None
