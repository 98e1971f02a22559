"""MaxText's top-k logits of a teacher: ArrayRecord files, a tf.train.Example for each row of its batches.

`inputs` [S], `top_k_logits` and `top_k_indices` [S * k], row s about the token after `inputs[s]`; the logits have no
normaliser. `inputs_segmentation` [S] numbers the documents of a row, 0 for padding: each is a document here, and the
last row of one has no label. Without it, a row is one document. `targets` [S] are the next tokens, and
`targets_segmentation` [S] is 0 where these are not trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logit_cache.importing.document import Document, Format, Rows, Source, segments
from logit_cache.importing.files import once, starts_with, token_array, wrong
from storage.errors import InputError, error_text

# Of every file of Riegeli records, of which ArrayRecord is a kind.
_MAGIC = bytes.fromhex("83af70d10d884a3f")
_BATCH_RECORDS = 16
_NEEDED = ("inputs", "top_k_logits", "top_k_indices")
# The schema of tf.train.Example, but for lists of bytes: TensorFlow is not needed for it.
_EXAMPLE = """
name: "example.proto" package: "logit_cache" syntax: "proto3"
message_type { name: "FloatList" field { name: "value" number: 1 type: TYPE_FLOAT label: LABEL_REPEATED } }
message_type { name: "Int64List" field { name: "value" number: 1 type: TYPE_INT64 label: LABEL_REPEATED } }
message_type {
  name: "Feature"
  field { name: "float_list" number: 2 type_name: ".logit_cache.FloatList" }
  field { name: "int64_list" number: 3 type_name: ".logit_cache.Int64List" }
}
message_type {
  name: "Entry"
  field { name: "key" number: 1 type: TYPE_STRING }
  field { name: "value" number: 2 type_name: ".logit_cache.Feature" }
}
message_type {
  name: "Features"
  field { name: "feature" number: 1 type_name: ".logit_cache.Entry" label: LABEL_REPEATED }
}
message_type { name: "Example" field { name: "features" number: 1 type_name: ".logit_cache.Features" } }
"""
_Features = dict[str, NDArray[Any]]


def _documents(source: Source) -> Iterator[Document]:
    try:
        from array_record.python import array_record_module
        from google.protobuf import message
    except ImportError:
        raise InputError("--format maxtext needs array_record: pip install 'logit-cache[maxtext]'") from None
    return _read(source, array_record_module.ArrayRecordReader, message.DecodeError)


def _read(source: Source, reader: Any, damaged: type[Exception]) -> Iterator[Document]:
    for file, path in enumerate(source.files):
        for number, record in enumerate(_records(path, reader)):
            where = f"{path} record {number}"
            try:
                features = _features(record)
            except damaged:
                raise InputError(f"{where}: no tf.train.Example; expected a file of MaxText's top-k logits") from None
            yield from _of_record(source, file, where, features)


def _records(path: Path, open_reader: Any) -> Iterator[bytes]:
    """Raises InputError for a file that is damaged, or that its writer did not close."""
    try:
        reader = open_reader(str(path))
        if not reader.ok():
            raise InputError(f"{path}: no end of its records is there: it was cut off, or its writer was killed")
        count = reader.num_records()
        for start in range(0, count, _BATCH_RECORDS):
            yield from reader.read(list(range(start, min(start + _BATCH_RECORDS, count))))
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(f"{path}: cannot be read as ArrayRecord ({error_text(error, 300)}); fetch it again") from None


@functools.cache
def _example() -> Any:
    """The message tf.train.Example."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    file = text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("logit_cache.Example"))


def _features(record: bytes) -> _Features:
    """The lists of numbers of an Example by name: float32 or int64."""
    found: _Features = {}
    for entry in _example().FromString(record).features.feature:
        floats, integers = entry.value.float_list.value, entry.value.int64_list.value
        found[entry.key] = np.array(floats, dtype=np.float32) if floats else np.array(integers, dtype=np.int64)
    return found


def _of_record(source: Source, file: int, where: str, features: _Features) -> Iterator[Document]:
    missing = [name for name in _NEEDED if name not in features]
    if missing:
        wrong(where, f"an Example with {', '.join(_NEEDED)}", ", ".join(sorted(features)) or "none of numbers")
    ids = token_array(features["inputs"], where, "inputs")
    logits, indices = features["top_k_logits"], features["top_k_indices"]
    if not len(ids) or not len(logits) or len(logits) != len(indices) or len(logits) % len(ids):
        wrong(where, f"as many logits and indices for each of {len(ids)} tokens", f"{len(logits)} and {len(indices)}")
    for name in ("inputs_segmentation", "targets_segmentation", "targets"):
        if len(features.get(name, ids)) != len(ids):
            wrong(where, f"as many {name} as tokens, {len(ids)}", len(features[name]))
    if "inputs_segmentation" not in features:
        source.note("records do not say where documents and padding begin (inputs_segmentation), and are one each")
    values = logits.reshape(len(ids), -1).astype(np.float64)
    columns = indices.reshape(len(ids), -1)
    for number, part in segments(features.get("inputs_segmentation", np.ones(len(ids), dtype=np.int64))):
        at = f"{where} segment {number}"
        rows = functools.partial(Rows, 0, columns[part], values[part])
        yield Document(file, at, ids[part], once(at, rows), _trained(features, ids, part, at))


def _trained(features: _Features, ids: NDArray[np.uint32], part: slice, where: str) -> NDArray[np.bool_] | None:
    """Which tokens of a document are trained on, bool [L]; None for all. Raises InputError for other next tokens."""
    if "targets_segmentation" not in features:
        return None
    here = features["targets_segmentation"][part][:-1] != 0
    targets = features.get("targets", np.append(ids[1:], 0))[part][:-1]
    if (here & (targets != ids[part][1:])).any():
        wrong(where, "targets that are the next tokens", "others: inputs and targets are not of one text")
    return None if here.all() else np.append(True, here)


FORMAT = Format(
    name="maxtext",
    about="MaxText's ArrayRecord files with top_k_logits",
    suffixes=(".array_record",),
    recognises=lambda path: starts_with(path, _MAGIC),
    documents=_documents,
    values=("unnormalised",),
    reading="after",
)
