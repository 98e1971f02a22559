"""Any causal language model of transformers as a teacher: loaded whole, tested, and identified by digests.

The backbone runs in the requested dtype; logits are float32 (how and why: `teachers.huggingface.scoring`).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from storage.errors import InputError
from storage.format.identity import has_tokenizer
from storage.format.manifest.teacher import Teacher as TeacherRecord
from storage.format.manifest.teacher import TeacherIdentity
from storage.text import counted
from student.loss.documents import mixes_documents
from student.models.adapters.attach import check_installed, merged, with_adapter
from student.models.model_files import (
    ModelFiles,
    adapter_digests,
    config_sha256,
    find_model,
    weights_sha256,
)
from student.models.tokenizer import read_tokenizer
from teachers.huggingface.device_map import DeviceMap, input_device
from teachers.huggingface.output_layer import head_of, linear_of
from teachers.huggingface.scoring import TOLERANCE, FastPath, choose_path, forward, is_causal
from teachers.huggingface.sharded_head import ShardedPath, choose_sharded_path, tensor_parallel_options
from teachers.ranks import ColumnShard, Ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_LOGIT_BUDGET_BYTES = 256 << 20

_TEST_WINDOWS, _TEST_TOKENS = 2, 16


class HuggingFaceTeacher:
    """A causal language model that scores windows; see `teachers.base.Teacher` for the attributes.

    Created by `load`. `max_positions`: the longest window that the model supports, None where it has no limit or states
    none.
    """

    def __init__(
        self,
        model: Any,
        files: ModelFiles,
        dtype: Literal["float32", "bfloat16", "float16"],
        trust_remote_code: bool,
        logit_budget_bytes: int,
        on_message: Callable[[str], None],
        ranks: Ranks | None = None,
    ) -> None:
        self._model = model
        self._files = files
        self._trust_remote_code = trust_remote_code
        self._budget = logit_budget_bytes
        self._on_message = on_message
        self.device: torch.device = input_device(model)
        self.attention = str(getattr(model.config, "_attn_implementation", None) or "none")
        self.max_positions = _max_positions(model.config)

        windows = _test_windows(model, self.max_positions).to(self.device)
        logits = _test_forward(model, windows, files.asked, ranks)
        if not is_causal(model, windows, logits, dtype):
            raise InputError(
                f"{files.asked}: not a causal language model: its logits at a position change with the tokens "
                f"after it, so there is no distribution of the next token to store"
            )
        self.head_columns = int(logits.shape[-1])
        self.shard: ColumnShard | None = None
        self._columns = self.head_columns
        if ranks is None:
            self._path, problem = choose_path(model, windows, logits, dtype)
        else:
            self._path, self.shard, problem = choose_sharded_path(model, windows, logits, dtype, ranks, files.asked)
            self._columns = self.shard.widest
        self._path_by_id = self._path
        self.order: Tensor | None = None
        self.head: Literal["fast", "general"] = self._path.kind
        if problem is not None:
            on_message(
                f"{files.asked}: scored with the model's own forward, as the faster path does not serve it: "
                + (problem if self._path.float32 else f"{problem}; its logits are rounded to {dtype}")
            )
        self.identity = TeacherRecord(
            members=(
                TeacherIdentity(
                    source=files.source,
                    revision=files.revision,
                    architecture=type(model).__name__,
                    weights_sha256=_weights_sha256(files, ranks),
                    config_sha256=config_sha256(files.config),
                    dtype=dtype,
                    head_columns=self.head_columns,
                    parameters=_parameters(model),
                    trust_remote_code=trust_remote_code,
                    **_adapter_identity(files),
                ),
            )
        )

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: Literal["float32", "bfloat16", "float16"],
        device: str,
        revision: str | None = None,
        attention: str | None = None,
        trust_remote_code: bool = False,
        logit_budget_bytes: int = DEFAULT_LOGIT_BUDGET_BYTES,
        on_message: Callable[[str], None] | None = None,
        device_map: DeviceMap | None = None,
        ranks: Ranks | None = None,
    ) -> HuggingFaceTeacher:
        """A teacher from a model directory or a hub id; or from the directory of an adapter, merged into its base.

        dtype: of the backbone; the head's output and everything after it are float32. attention: one of
        transformers' implementations, None for its own choice. logit_budget_bytes: the most that one chunk of
        float32 logits takes. on_message: receives each remark about how the model runs; by default it is logged.
        device_map: how the layers are spread over devices, instead of `device`. ranks: the processes that each hold a
        part of every layer, each on a device of its own, instead of both; all of them call this.
        Raises `InputError`, one line with the remedy, for anything that cannot be loaded whole.
        """
        on_message = on_message or logging.getLogger(__name__).warning
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        if logit_budget_bytes < 1:
            raise InputError(f"logit_budget_bytes must be at least 1, found {logit_budget_bytes}")
        assert device_map is None or ranks is None
        target = None if device_map is not None or ranks is not None else _device(device)
        source = os.fspath(source)
        files = find_model(source, revision, trust_remote_code)
        if files.adapter is not None:
            check_installed(source)
            if device_map is not None or ranks is not None:
                raise InputError(
                    f"{source}: an adapter is merged into its base in the memory of one device: for --device-map and "
                    "--tensor-parallel merge it first (merge_and_unload in peft), and save that"
                )
        options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        if device_map is not None:
            options |= device_map.options()
        elif ranks is not None:
            options |= tensor_parallel_options(ranks)
        model = _load(files, dtype, target, options, trust_remote_code, on_message)
        if device_map is not None:
            device_map.check(model, files.asked)
        return cls(model, files, dtype, trust_remote_code, logit_budget_bytes, on_message, ranks)

    def check_context(self, context_tokens: int, begun: bool = False) -> None:
        """Raise `InputError` if windows of `context_tokens`, begun with BOS if `begun`, exceed what the model reads."""
        if self.max_positions is not None and context_tokens + begun > self.max_positions:
            raise InputError(
                f"{self._files.asked} reads at most {self.max_positions} tokens at once, the context is "
                f"{context_tokens}{' and BOS before it' if begun else ''}: take a context of "
                f"{self.max_positions - begun} or less"
            )

    def vocabulary(self) -> dict[str, int] | None:
        """The token strings and ids of the tokenizer in the model's directory; None if there is none.

        Raises `InputError` for one that cannot be read.
        """
        folder = self._files.directory
        if self._files.adapter is not None and has_tokenizer(self._files.adapter.directory):
            folder = self._files.adapter.directory
        with _quiet_transformers():
            tokenizer = read_tokenizer(folder, self._files.asked, self._trust_remote_code)
        return None if tokenizer is None else dict(tokenizer.get_vocab())

    def packs(self, length: int) -> bool:
        """See `teachers.base.Teacher.packs`; all ranks ask together. Says why not, if so."""
        ids = int(self._model.get_input_embeddings().weight.shape[0])
        tolerance = 4 * TOLERANCE[self.identity.loaded[0].dtype]
        problem = mixes_documents(self._model, ids, length, tolerance, self.device, self.max_positions)
        if problem is not None:
            self._on_message(f"{self._files.asked}: documents are read in rows of their own, not packed: {problem}")
        return problem is None

    def score(self, windows: Tensor, rows: Tensor, positions: Tensor | None = None) -> Iterator[Tensor]:
        """Logits float32 [r, columns] of the rows, chunk by chunk; see `teachers.base.Teacher.score`."""
        positions = None if positions is None else positions.to(self.device)
        read = windows.to(self.device), rows.to(self.device)
        return self._path.score(*read, self._columns, self._budget, positions)

    def output_embeddings(self) -> Tensor:
        """The weights of the output layer; see `teachers.base.Teacher.output_embeddings`."""
        path = self._path_by_id
        if isinstance(path, FastPath | ShardedPath):
            return path.head.embeddings()
        return head_of(linear_of(self._model, self.head_columns, self._files.asked)).embeddings()

    def in_order(self, order: Tensor) -> HuggingFaceTeacher:
        ordered = copy.copy(self)
        ordered.order = order
        padding = torch.arange(len(order), self.head_columns)
        ordered._path = self._path_by_id.in_order(torch.cat([order.cpu(), padding]))
        return ordered


def _test_windows(model: Any, max_positions: int | None) -> Tensor:
    ids = int(model.get_input_embeddings().weight.shape[0])
    tokens = min(_TEST_TOKENS, max_positions or _TEST_TOKENS)
    return torch.randint(ids, (_TEST_WINDOWS, tokens), generator=torch.Generator().manual_seed(0))


def _parameters(model: Any) -> int:
    """The number of parameters, tied ones counted once: also where accelerate offloaded them, which unties them."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if not getattr(model, "hf_device_map", None) or not isinstance(tied, dict):
        return sum(parameter.numel() for parameter in model.parameters())
    named = model.named_parameters(remove_duplicate=False)
    return sum(parameter.numel() for name, parameter in named if name not in tied)


def _weights_sha256(files: ModelFiles, ranks: Ranks | None) -> str:
    """The weights' digest; of several ranks, one on each machine reads the files, and all digests must be equal."""
    if ranks is None:
        return weights_sha256(files.weights)
    reads = ranks.rank == 0 or os.environ.get("LOCAL_RANK") == "0"
    found = [digest for digest in ranks.objects(weights_sha256(files.weights) if reads else None) if digest]
    if len(set(found)) > 1:
        raise InputError(f"{files.asked}: its weights differ between the machines of this job: copy them again")
    return str(found[0])


def _adapter_identity(files: ModelFiles) -> dict[str, Any]:
    if files.adapter is None:
        return {}
    return {"adapter": files.adapter.directory.name, **adapter_digests(files)}


def _test_forward(model: Any, windows: Tensor, source: str, ranks: Ranks | None) -> Tensor:
    try:
        with torch.inference_mode():
            logits = forward(model, windows).float()
    except Exception as error:
        raise InputError(
            f"{source}: the model fails on a window of {windows.shape[1]} tokens ({_first_line(error)})"
            + ("" if ranks is None else f"; its heads may not divide by {ranks.size} ranks: start another number")
        ) from error
    if bool(logits.isnan().any()):
        raise InputError(
            f"{source}: the logits of a test window are NaN: its weights are broken, or overflow in its dtype "
            f"(then take bfloat16 or float32)"
        )
    return logits


def _load(
    files: ModelFiles,
    dtype: str,
    device: torch.device | None,
    options: dict[str, Any],
    trust_remote_code: bool,
    on_message: Callable[[str], None],
) -> Any:
    """The model on its device (None: as `options` place it), in eval mode, with every parameter from the files."""
    auto: Any = transformers.AutoModelForCausalLM
    try:
        with _quiet_transformers():
            model, info = auto.from_pretrained(
                files.directory,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, so that the error below can name them
                **options,
            )
        if files.adapter is not None:
            model = merged(with_adapter(model, files.adapter, trained=False), files.asked)
        if device is not None:
            model = model.to(device)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{files.asked}: does not fit on {device or 'the devices'} in {dtype} ({_first_line(error)}): take a "
            f"smaller dtype, or a device with more memory"
        ) from error
    except InputError:  # of the adapter
        raise
    except Exception as error:
        if "distributed_config" in options and "tp_plan" in str(error):
            raise InputError(
                f"{files.asked}: transformers {transformers.__version__} has no plan for spreading its layers over "
                f"ranks ({_first_line(error)}): use --device-map instead of --tensor-parallel"
            ) from error
        code = "auto_map" in files.config and not trust_remote_code
        raise InputError(
            f"{files.asked}: transformers {transformers.__version__} cannot load it as a causal language model: "
            + _first_line(error)
            + (". It brings code of its own, which runs only with trust_remote_code" if code else "")
        ) from error
    # from_pretrained fills missing and misshapen parameters with random numbers and warns.
    misshapen = {str(key): f"{tuple(found)}, not {tuple(needed)}" for key, found, needed in info["mismatched_keys"]}
    absent = dict.fromkeys(info["missing_keys"], "missing") | misshapen
    if absent:
        name = min(absent)
        raise InputError(
            f"{files.asked}: {len(absent)} parameters of {type(model).__name__} are missing in the files, or have "
            f"another shape there, such as {name} ({absent[name]}): not a whole causal language model, or the "
            f"config.json of another one"
        )
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        on_message(f"{files.asked}: not used: {counted(len(unused), 'tensor')} in the files, such as {unused[0]}")
    # Windows are whole and unmasked; otherwise transformers warns of each one that contains the padding id.
    model.config.pad_token_id = None
    return model.eval().requires_grad_(False)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r}: expected cpu, cuda, cuda:1, mps or another that torch knows") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: torch {torch.__version__} finds no usable GPU here: try --device cpu")
    try:
        torch.empty(1, device=device).tolist()
    except Exception as error:  # every backend has its own
        raise InputError(f"device {name!r} cannot be used: {_first_line(error)}") from error
    return device


def _max_positions(config: Any) -> int | None:
    """The longest input that a configuration states, extended by its rotary scaling."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = getattr(text, name, None)
        if isinstance(limit, int) and limit > 0:
            break
    else:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if isinstance(original, int) and isinstance(factor, int | float):
        return max(limit, int(original * factor))
    return limit


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Suppress the load report, whose tables repeat what is one line here, and progress bars in log files."""
    log: Any = transformers.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    if not sys.stderr.isatty():
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]:.300}"
