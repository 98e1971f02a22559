"""The files of a model, their source, the digests that bind a cache to them, and the dtype of their weights.

For digests only safetensors are read: a pickle can run code. That of the weights is taken over tensors, not files::

    tensor  = sha256(name, dtype, shape, raw bytes)
    weights = sha256(of all tensor digests, ordered by name)

so that the same weights split into other files, or stored in another order, are the same teacher. Files are
streamed in blocks and never loaded whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from storage.errors import InputError
from storage.files import local_path
from storage.format.sealing import canonical_json
from storage.progress import Log
from student.models.adapters.files import AdapterFiles, base_of, find_adapter
from student.models.configuration import has_weights, read_config

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The limit of the safetensors format; a longer "header" is not one.
_MAX_HEADER_BYTES = 100_000_000
_MAX_JSON_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_SAVED = ("float32", "bfloat16", "float16")
_OF_SAFETENSORS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.msgpack", "*.h5")
_TOKENIZER_PATTERNS = ["*.txt", "*.model", "*.tiktoken", "*.jinja"]

# Keys of config.json that describe how the model was saved or is to be run, and not its computation. dtype and
# attention are recorded as they ran; `architectures` names the class that saved the files, while the loaded class is
# recorded.
_VOLATILE_KEYS = {
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# The same of adapter_config.json; the base has digests of its own, and dropout is of training.
_VOLATILE_ADAPTER_KEYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "revision",
    "task_type",
}


@dataclass(frozen=True)
class ModelFiles:
    """A model's files on this machine.

    asked: the source as the user named it, for messages. source: as a cache records it, the hub id or the last part of
    the directory's path. revision: the hub's commit. weights: the safetensors files that transformers loads, and no
    others. adapter: the LoRA on that model, where the user named one; all others are about its base then.
    """

    asked: str
    directory: Path
    source: str
    revision: str | None
    config: dict[str, Any]
    weights: tuple[Path, ...]
    adapter: AdapterFiles | None = None


def find_model(source: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelFiles:
    """The files of a local model directory, or of a hub id (downloaded, or found in the hub's local cache).

    Of the directory of an adapter, its files and those of the base that it names. Raises `InputError` for anything that
    is no model with safetensors weights.
    """
    path = local_path(source)
    adapter = find_adapter(path) if path.is_dir() else None
    if adapter is not None:
        if revision is not None:
            raise InputError(f"{source}: a revision belongs to a hub id, and this is an adapter: leave it out")
        base = find_model(adapter.base, adapter.revision, trust_remote_code)
        _read_header(adapter.weights)
        return replace(base, asked=source, adapter=adapter)
    if path.is_dir():
        if revision is not None:
            raise InputError(f"{source}: a revision belongs to a hub id, and this is a directory: leave it out")
        directory = path.resolve()
        config = _config(directory, source)
        return ModelFiles(source, directory, directory.name, None, config, _weight_files(directory, config, source))
    if path.exists():
        raise InputError(f"{source}: expected a model directory (with config.json) or a hub id, found a file")
    if not _HUB_ID.match(source):
        raise InputError(
            f"{source}: no such directory, and it is no hub id either (like gpt2 or EleutherAI/pythia-70m): "
            f"check the path"
        )
    directory = _download(source, revision, ["*.json", WEIGHTS_FILE, *_TOKENIZER_PATTERNS], trust_remote_code)
    # The folder of a snapshot is named after its commit; requesting that commit again cannot return another.
    commit = directory.name
    config = _config(directory, source)
    listed = _listed_files(directory, config, source)
    if any(not (directory / name).is_file() for name in listed):
        directory = _download(source, commit, listed, False)
    return ModelFiles(source, directory, source, commit, config, _weight_files(directory, config, source))


def weights_sha256(files: Iterable[Path]) -> str:
    """The digest of the tensors in safetensors files (see the module); `InputError` for a broken file."""
    tensors: dict[str, _Tensor] = {}
    for file in files:
        for tensor in _read_header(file):
            if tensor.name in tensors:
                raise InputError(
                    f"{tensors[tensor.name].file} and {file}: both hold a tensor {tensor.name!r}: "
                    f"files of two models in one directory"
                )
            tensors[tensor.name] = tensor
    # hashlib releases the interpreter lock on long buffers, so threads are as many hashes at once.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = dict(zip(tensors, pool.map(_tensor_digest, tensors.values()), strict=True))
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()


def config_sha256(config: dict[str, Any]) -> str:
    """The digest of the part of a config.json that decides the computation: canonical JSON without volatile keys."""
    return hashlib.sha256(canonical_json(_without_volatile(config))).hexdigest()


def adapter_config_sha256(config: dict[str, Any]) -> str:
    """The digest of the part of an adapter_config.json that decides the computation.

    peft writes sets of names as lists in any order, and an option that is off as null, false or nothing, where an
    earlier peft did not have it.
    """
    kept = {name: value for name, value in config.items() if name not in _VOLATILE_ADAPTER_KEYS and not _is_off(value)}
    ordered = {name: sorted(value, key=str) if isinstance(value, list) else value for name, value in kept.items()}
    return hashlib.sha256(canonical_json(ordered)).hexdigest()


def adapter_digests(files: ModelFiles) -> dict[str, str]:
    """The digests of a model's adapter, by the names that records have for them; none without one."""
    if files.adapter is None:
        return {}
    return {
        "adapter_sha256": weights_sha256([files.adapter.weights]),
        "adapter_config_sha256": adapter_config_sha256(files.adapter.config),
    }


def model_digests(files: ModelFiles) -> dict[str, str]:
    """All digests of a model, by the names that records have for them."""
    own = {"weights_sha256": weights_sha256(files.weights), "config_sha256": config_sha256(files.config)}
    return own | adapter_digests(files)


def stored_dtype(spec: str, log: Log) -> str:
    """The dtype of most of a model's weights on disk, whatever its configuration says; float32 for a new model.

    An adapter's base has the weights. Where there are several, that is logged. Where the files do not tell, the
    configuration does, or it is float32.
    """
    if not has_weights(spec):
        return "float32"
    spec = base_of(spec)
    config = read_config(spec)
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    sizes: Counter[str] = Counter()
    # Files that transformers has loaded, and that may be in other formats.
    with contextlib.suppress(Exception):
        for dtype, size in _floating_point(_local_folder(spec)):
            sizes[dtype] += size
    most = sizes.most_common(1)[0][0] if sizes else str(named).removeprefix("torch.")
    found = most if most in _SAVED else "float32"
    if sizes.keys() - {found}:
        log(f"{spec}: its weights are in {' and '.join(sorted(sizes))}: saved in {found} (--save-dtype)")
    return found


def _local_folder(spec: str) -> Path:
    path = local_path(spec)
    if path.is_dir():
        return path
    return Path(snapshot_download(spec, allow_patterns=["model*.safetensors"], local_files_only=True))


def _floating_point(folder: Path) -> Iterator[tuple[str, int]]:
    """dtype and number of elements of the floating-point tensors of a model; reads none of them."""
    files = sorted(folder.glob("model*.safetensors"))
    for path in files:
        for tensor in _read_header(path):
            if tensor.dtype in _OF_SAFETENSORS:
                yield _OF_SAFETENSORS[tensor.dtype], prod(tensor.shape)
    for path in [] if files else sorted(folder.glob("pytorch_model*.bin")):
        import torch

        for tensor in torch.load(path, map_location="meta", weights_only=True).values():
            if tensor.is_floating_point():
                yield str(tensor.dtype).removeprefix("torch."), tensor.numel()


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ([], {}, "")


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(item) for key, item in value.items() if key not in _VOLATILE_KEYS}
    return [_without_volatile(item) for item in value] if isinstance(value, list) else value


class _Tensor(NamedTuple):
    """A tensor of a safetensors file: the bytes `start .. stop` of the file's data, which begins at `data_at`."""

    start: int
    stop: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    data_at: int


def _read_header(file: Path) -> list[_Tensor]:
    """Every tensor of a safetensors file, after a check that the file has exactly the length that they imply."""

    def broken(found: str) -> InputError:
        return InputError(f"{file}: not a whole safetensors file: {found}; copy or download it again")

    with file.open("rb") as stream:
        length = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > min(length - 8, _MAX_HEADER_BYTES):
            raise broken(f"{length} bytes, of which the first are {prefix!r}")
        header = stream.read(header_bytes)
    data_at = 8 + header_bytes
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = []
        for name, entry in entries.items():
            start, stop = map(int, entry["data_offsets"])
            tensors.append(_Tensor(start, stop, name, entry["dtype"], tuple(entry["shape"]), file, data_at))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise broken(f"its header does not parse ({error!r:.200})") from None
    expected = 0
    for tensor in sorted(tensors):
        if tensor.start != expected or tensor.stop < tensor.start:
            raise broken(f"tensor {tensor.name!r} begins at byte {tensor.start}, where {expected} was expected")
        expected = tensor.stop
    if length != data_at + expected:
        raise broken(f"its header describes {data_at + expected} bytes, the file has {length}")
    return tensors


def _tensor_digest(tensor: _Tensor) -> bytes:
    about = canonical_json([tensor.name, tensor.dtype, tensor.shape])
    digest = hashlib.sha256(len(about).to_bytes(8, "little") + about)
    left = tensor.stop - tensor.start
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.data_at + tensor.start)
        while left:
            block = stream.read(min(left, _BLOCK_BYTES))
            if not block:
                raise InputError(f"{tensor.file}: became shorter while it was read: is it being written?")
            digest.update(block)
            left -= len(block)
    return digest.digest()


def _config(directory: Path, source: str) -> dict[str, Any]:
    if (directory / "adapter_config.json").is_file():
        raise InputError(f"{source}: holds an adapter: download it (hf download), and give its directory")
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{source}: expected a model directory, found no config.json in it")
    config = _json_object(path)
    if not isinstance(config.get("model_type"), str) and "auto_map" not in config:
        raise InputError(f"{path}: has no model_type: not the config.json of a transformers model")
    return config


def _json_object(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes, at most {_MAX_JSON_BYTES} are read as JSON")
    try:
        # transformers writes Infinity into some configs, which is not JSON; as text it still has a digest.
        value = json.loads(path.read_bytes(), parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}): save the model again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}: save the model again")
    return value


def _listed_files(directory: Path, config: dict[str, Any], source: str) -> list[str]:
    """The names of the weight files, in transformers' own order of preference."""
    chosen = config.get("transformers_weights")
    if chosen is None:
        chosen = WEIGHTS_FILE if (directory / WEIGHTS_FILE).is_file() else INDEX_FILE
    elif not isinstance(chosen, str) or not chosen.endswith((".safetensors", ".safetensors.index.json")):
        raise InputError(f"{source}: config.json names weights {chosen!r}, and only safetensors are read")
    if not chosen.endswith(".json") or not (directory / chosen).is_file():
        names = [chosen]
    else:
        weight_map = _json_object(directory / chosen).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{directory / chosen}: has no weight_map: save the model again")
        names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if name != Path(name).name]
    if outside:
        raise InputError(f"{source}: its weights are listed as {outside[0]!r}, outside its directory")
    return names


def _weight_files(directory: Path, config: dict[str, Any], source: str) -> tuple[Path, ...]:
    names = _listed_files(directory, config, source)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing == [INDEX_FILE]:
        others = sorted({path.name for pattern in _PICKLES for path in directory.glob(pattern)})
        raise InputError(
            f"{source}: expected {WEIGHTS_FILE} or {INDEX_FILE}, found "
            + (f"only {', '.join(others[:3])}: convert the weights to" if others else "no weights: save the model as")
            + " safetensors (save_pretrained in transformers writes them)"
        )
    if missing:
        raise InputError(f"{source}: its weights are listed as {missing[0]}, and there is no such file: copy it again")
    files = tuple(directory / name for name in names)
    for file in files:  # a truncated file should be reported before the model is half built
        _read_header(file)
    return files


def _download(hub_id: str, revision: str | None, names: list[str], code: bool) -> Path:
    at = f" at revision {revision}" if revision else ""
    try:
        # Top level only: subfolders hold other formats and other models.
        ignore = None if code else ["*/*"]
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=names + ["*.py"] * code, ignore_patterns=ignore)
        )
    except GatedRepoError:
        problem = "its owner asks you to accept conditions first: do so on its page, then `hf auth login`"
    except RepositoryNotFoundError:
        problem = "the hub has no such model, or it is private (then `hf auth login`)"
    except RevisionNotFoundError:
        problem = "the model has no such revision"
    except Exception as error:  # any exception of the HTTP client
        problem = f"the hub cannot be reached, and it is not in the local cache ({type(error).__name__})"
    raise InputError(f"{hub_id}{at}: no such directory here, and as a hub id: {problem}")
