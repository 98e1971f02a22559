"""How a caching job is run, and by which workers: fields that do not affect the stored targets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from logit_cache.engines.shutdown import GRACE_SECONDS
from storage.config import Folder, Settings, name_values

Engine = Literal["local", "ray", "slurm"]
ATTEMPTS = 3


class EngineOptions(Settings):
    """The fields of `cache-logits` beside those of the job, as flags or in the same YAML file.

    engine        local, ray or slurm: how workers are started
    workers       processes, actors or array tasks; None for one per device, or for Slurm one
    worker        i/n, where another launcher starts the processes
    help_others   whether such a process builds all that is missing beside the others, or its share only
    attempts      how often a shard that fails is tried before it has failed permanently
    ray_address   of a running cluster; None for that of RAY_ADDRESS, or a new one on this machine
    grace_seconds from SIGTERM to the end of the process, at most
    log_format    text, or one JSON object per line
    worker_cpus   CPUs that each Ray worker or Slurm task reserves beside its GPU
    slurm         sbatch parameters of the array, such as partition and time
    slurm_folder  for Slurm's logs and submitit's files, on a disk that all nodes see
    wait          whether to wait for the end of the array
    """

    engine: Engine = "local"
    workers: Annotated[int, Field(ge=1, le=100_000)] | None = None
    worker: str | None = None
    help_others: bool = True
    attempts: Annotated[int, Field(ge=1, le=100)] = ATTEMPTS
    grace_seconds: Annotated[float, Field(gt=0, le=86_400)] = GRACE_SECONDS
    log_format: Literal["text", "json"] = "text"
    ray_address: str | None = None
    worker_cpus: Annotated[int, Field(ge=1)] = 1
    slurm: dict[str, str] = Field(default_factory=dict)
    slurm_folder: Folder = "slurm-logs"
    wait: bool = True

    @field_validator("slurm", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if isinstance(value, dict):
            # A flag's `=true` is a boolean in YAML.
            texts = {name: str(item).lower() if isinstance(item, bool) else str(item) for name, item in value.items()}
            return {_parameter(str(name)): item for name, item in texts.items()}
        return {_parameter(name): item for name, item in name_values(value or (), "--slurm partition=gpu").items()}

    @model_validator(mode="after")
    def _agree(self) -> EngineOptions:
        if self.worker is not None and (self.engine != "local" or self.workers is not None):
            raise ValueError("--worker i/n is for processes of another launcher: leave out --engine and --workers")
        given = {"ray-address": self.ray_address is not None, "slurm": bool(self.slurm), "no-wait": not self.wait}
        for flag, is_given in given.items():
            engine = "ray" if flag == "ray-address" else "slurm"
            if is_given and self.engine != engine:
                raise ValueError(f"--{flag} requires --engine {engine}, and this is --engine {self.engine}")
        return self


def _parameter(name: str) -> str:
    """The Python name of an sbatch parameter, which may be written either way."""
    return name.lstrip("-").replace("-", "_")
