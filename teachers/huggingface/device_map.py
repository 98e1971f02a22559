"""A model whose layers are spread over the devices of one process, by accelerate's device maps.

Which layer goes where is worked out by transformers and accelerate from the memory of the devices; hooks on the layers
move what they read. Windows go to the device of the input embeddings, logits appear where the output layer computes
(`teachers.huggingface.scoring`). Layers that fit on no device are refused unless main memory or the disk was asked for:
then their weights travel to a device for every batch, which is slow by nature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from storage.errors import InputError

_NO_DEVICE = ("cpu", "disk")  # where there are accelerators, layers there are stored and not computed


@dataclass(frozen=True)
class DeviceMap:
    """How layers are spread.

    strategy    accelerate's: auto and balanced share them equally, sequential fills one device after the other
    max_memory  limits as DEVICE=SIZE, such as 0=20GiB or cpu=64GiB; all that is free for the others
    offload     where layers may lie that fit on no accelerator: cpu (main memory), disk (also the model's own files),
                None for nowhere
    """

    strategy: Literal["auto", "balanced", "sequential"]
    max_memory: tuple[str, ...] = ()
    offload: Literal["cpu", "disk"] | None = None

    def options(self) -> dict[str, Any]:
        """What `from_pretrained` is told. Raises InputError for limits that cannot be read."""
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
        """Raise InputError for a model that does not fit, or that accelerate would cut where it cannot be cut."""
        places = set(getattr(model, "hf_device_map", {}).values())
        if "disk" in places and self.offload != "disk":
            raise InputError(
                f"{source}: does not fit on the devices here together, within their free memory and --max-memory: take "
                f"a smaller dtype or more devices, or say where the other layers may lie: --offload cpu or disk (slow)"
            )
        if len(places) > 1 and not model._no_split_modules:
            raise InputError(
                f"{source}: {type(model).__name__} does not say which of its layers must stay whole, so accelerate "
                f"cannot spread it over devices: leave --device-map out, or use --tensor-parallel"
            )


def input_device(model: Any) -> torch.device:
    """Where windows are expected: where the input embeddings compute."""
    places: dict[str, Any] = getattr(model, "hf_device_map", {})
    real = [place for place in places.values() if place not in _NO_DEVICE]
    if not places or not real:
        return torch.device("cpu") if places else next(model.parameters()).device
    embeddings = model.get_input_embeddings()
    (name,) = [name for name, module in model.named_modules() if module is embeddings][:1]
    parts = name.split(".")
    prefixes = [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
    place = next((places[prefix] for prefix in prefixes if prefix in places), real[0])
    place = real[0] if place in _NO_DEVICE else place
    if not isinstance(place, int):
        return torch.device(place)
    # accelerate names an accelerator by its number alone.
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cuda" if accelerator is None else accelerator.type, place)


def _limit(text: str) -> tuple[int | str, int]:
    from accelerate.utils import convert_file_size_to_int

    device, sign, size = text.partition("=")
    try:
        if not sign:
            raise ValueError
        return int(device) if device.isdecimal() else device, convert_file_size_to_int(size)
    except ValueError:
        raise InputError(f"--max-memory {text!r}: expected DEVICE=SIZE, such as 0=20GiB or cpu=64GiB") from None
