"""DistillKit's files, written here by hand: bits as texts, curves by least squares."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.caches.imported import K, Known, V, imported, imports, known, same_targets, whole
from support.commands import in_process, refused, succeeded

from storage import LogitCache

SETTINGS: dict[str, Any] = {
    "d": V + 1, "k": K, "exact_k": K, "exact_dtype": "float32", "polynomial_terms": None, "term_dtype": "float32",
    "residual_bins": [], "delta_encoding": False, "error_diffusion": False, "normalize_t": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Known:
    return known()


def bits_to_bytes(bits: str) -> list[int]:
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]


def id_bytes(ids: np.ndarray, d: int) -> list[list[int]]:
    width = math.ceil(math.log2(d))
    return [bits_to_bytes("".join(f"{int(i):0{width}b}" for i in row)) for row in ids]


def number_bytes(values: np.ndarray, dtype: str) -> list[int]:
    if dtype == "bfloat16":
        return list((np.asarray(values, dtype="<f4").view("<u4") >> 16).astype("<u2").tobytes())
    return list(np.asarray(values).astype(np.dtype(dtype).newbyteorder("<")).tobytes())


def value_bytes(rows: np.ndarray, settings: dict[str, Any]) -> tuple[list[list[int]], np.ndarray]:
    """The bytes of rows of log-probs, and the log-probs that they stand for."""
    exact_k, n = settings["exact_k"], settings["k"] - settings["exact_k"]
    t = np.linspace(0, 1, n) if settings["normalize_t"] else np.arange(n)
    terms = [
        np.sqrt(t) if x == "sqrt" else np.exp(t) if x == "exp" else t**x for x in settings["polynomial_terms"] or []
    ]
    out, meant = [], []
    for row in rows:
        series = np.diff(row, prepend=0.0) if settings["delta_encoding"] else row
        data, decoded = number_bytes(series[:exact_k], settings["exact_dtype"]), list(series[:exact_k])
        if terms:
            basis = np.array(terms).T
            kind = np.float16 if settings["term_dtype"] == "float16" else np.float64
            fitted = np.linalg.lstsq(basis, series[exact_k:], rcond=None)[0].astype(np.float32).astype(kind)
            data += number_bytes(fitted, settings["term_dtype"])
            # Of two bytes, each product is rounded, and the sum is; residuals are what that leaves.
            products = (basis.astype(kind) * fitted).astype(np.float64)
            curve = products.sum(axis=1).astype(kind).astype(np.float64)
            left, at = series[exact_k:] - curve, 0
            for one in settings["residual_bins"]:
                part, bits = left[at : at + one["num_elements"]], one["element_bits"]
                largest = np.abs(part).mean() if bits == 1 else np.abs(part).max() / (2 ** (bits - 1) - 1)
                scale = np.float32(max(largest, 1e-9))
                least = -(2 ** (bits - 1))
                q = np.clip(np.round(part / scale), least, -least - 1).astype(int) - least
                q = (part > 0).astype(int) if bits == 1 else q
                data += number_bytes(np.array([scale]), one["scale_dtype"])
                data += bits_to_bytes("".join(f"{x:0{bits}b}" for x in q))
                curve[at : at + one["num_elements"]] += scale * (2 * q - 1 if bits == 1 else q + least)
                at += one["num_elements"]
            decoded += list(curve)
        out.append(data)
        meant.append(np.cumsum(decoded) if settings["delta_encoding"] else np.array(decoded))
    return out, np.array(meant)


def write(folder: Path, columns: dict[str, Any], settings: dict[str, Any], name: str = "data_0.parquet") -> Path:
    folder.mkdir(exist_ok=True)
    types = {"compressed_logprobs": pa.uint8(), "bytepacked_indices": pa.uint8(), "packed_indices": pa.uint64(),
             "exact_values": pa.float32(), "coeffs": pa.float32()}  # fmt: skip
    arrays = {
        key: pa.array(value, pa.list_(pa.list_(types[key]))) if key in types else pa.array(value)
        for key, value in columns.items()
    }
    pq.write_table(pa.table(arrays), folder / name)
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def plain(data: Known, settings: dict[str, Any] = SETTINGS) -> dict[str, Any]:
    """A row for each token but the last, and no padding appended."""
    tops = [data.top(number, settings["k"]) for number in range(len(data.tokens))]
    return {
        "input_ids": [tokens.tolist() for tokens in data.tokens],
        "compressed_logprobs": [value_bytes(values[:-1], settings)[0] for _, values in tops],
        "bytepacked_indices": [id_bytes(ids[:-1], settings["d"]) for ids, _ in tops],
    }


def test_exact_rows_and_the_appended_padding(data: Known, tmp_path: Path) -> None:
    """Texts shorter than the longest got a padding id, so that their last token has a row; it is cut."""
    columns = plain(data)
    pad = 0
    for number, tokens in enumerate(data.tokens):
        if len(tokens) < max(map(len, data.tokens)):
            ids, values = data.top(number)
            columns["input_ids"][number] = [*tokens.tolist(), pad]
            columns["compressed_logprobs"][number] = value_bytes(values, SETTINGS)[0]
            columns["bytepacked_indices"][number] = id_bytes(ids, SETTINGS["d"])
    entry = imported(tmp_path, write(tmp_path / "logits", columns, SETTINGS), "distillkit", "--encoding", "float32")
    longest = max(map(len, data.tokens))
    rows = [range(len(tokens) - (len(tokens) == longest)) for tokens in data.tokens]
    same_targets(entry, data, rows)
    found = entry.entry.imported_from
    assert found is not None
    assert [file.name for file in found.files] == ["data_0.parquet", "compression_config.yaml"]
    assert found.decisions[0].startswith("3 documents end with the padding id")


@pytest.mark.parametrize(("delta", "terms"), [(True, "float32"), (False, "float32"), (False, "float16")])
@pytest.mark.parametrize(
    "bins",
    [
        [],
        [{"scale_dtype": "float32", "element_bits": 1, "num_elements": 5}],
        [
            {"scale_dtype": "float32", "element_bits": 7, "num_elements": 3},
            {"scale_dtype": "float32", "element_bits": 4, "num_elements": 2},
        ],
    ],
)
def test_curves_and_residuals(delta: bool, terms: str, bins: list[Any], data: Known, tmp_path: Path) -> None:
    settings = SETTINGS | {
        "k": 12, "exact_k": 4, "polynomial_terms": [0, 1, "sqrt"], "residual_bins": bins, "delta_encoding": delta,
        "normalize_t": not delta, "term_dtype": terms,
    }  # fmt: skip
    folder = write(tmp_path / "logits", plain(data, settings), settings)
    targets = whole(imported(tmp_path, folder, "distillkit", "--encoding", "float32"))
    for number, start in enumerate(data.starts):
        ids, values = data.top(number, 12)
        _, meant = value_bytes(values[:-1], settings)
        for row, expected in enumerate(meant):
            order = np.lexsort((ids[row], -expected))
            expected = expected - max(0.0, np.logaddexp.reduce(expected))  # a curve may exceed a sum of 1
            np.testing.assert_allclose(targets.logprobs[start + row, :12], expected[order], atol=2e-5)
            assert set(targets.token_ids[start + row, :12]) == set(ids[row])


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_fits_that_exceed_a_sum_of_1(share: float, data: Known, tmp_path: Path) -> None:
    """Where a curve is off, the numbers beside it stay what they are; where most are, the settings are wrong."""
    settings = SETTINGS | {"exact_k": 3, "polynomial_terms": [0, 1, 2, 3, 4]}
    columns = plain(data, settings)
    basis = np.array([np.arange(5) ** power for power in range(5)]).T
    off = {(number, row) for number in range(4) for row in range(len(data.tokens[number]) - 1) if row % 10 < 10 * share}
    for number, row in off:
        values = data.top(number)[1][row]
        fitted = np.linalg.solve(basis, values[3:] + 8.0).astype(np.float32)
        columns["compressed_logprobs"][number][row] = number_bytes(values[:3], "float32") + list(fitted.tobytes())
    folder = write(tmp_path / "logits", columns, settings)
    if share > 0.5:
        refused(imports(tmp_path, folder, "distillkit"), "more than 1")
        return
    entry = imported(tmp_path, folder, "distillkit", "--encoding", "float32")
    targets = whole(entry)
    for number, row in off:
        ids, values = data.top(number)
        found = dict(zip(targets.token_ids[data.starts[number] + row].tolist(),
                         targets.logprobs[data.starts[number] + row].tolist(), strict=True))  # fmt: skip
        np.testing.assert_allclose([found[i] for i in ids[row, :3]], values[row, :3], atol=1e-5)
        np.testing.assert_allclose(np.exp(list(found.values())).sum(), 1, atol=1e-5)
        rest = np.array([found[i] for i in ids[row, 3:]])
        np.testing.assert_allclose(np.diff(rest), np.diff(values[row, 3:]), atol=1e-4)
    assert entry.entry.imported_from is not None
    assert f"{len(off)} rows add up to more than 1" in entry.entry.imported_from.decisions[-1]


def test_packed_segments_are_documents_and_their_last_rows_have_no_label(data: Known, tmp_path: Path) -> None:
    """Two segments in a row; the tokens that the last rows are about are gone. Labels say what is trained on."""
    tops = [data.top(number) for number in range(len(data.tokens))]
    groups = [(0, 1), (2, 3)]
    columns: dict[str, Any] = {
        "input_ids": [],
        "compressed_logprobs": [],
        "bytepacked_indices": [],
        "attention_mask": [],
        "labels": [],
    }
    for group in groups:
        columns["input_ids"].append(np.concatenate([data.tokens[n] for n in group]).tolist())
        columns["compressed_logprobs"].append([b for n in group for b in value_bytes(tops[n][1], SETTINGS)[0]])
        columns["bytepacked_indices"].append([b for n in group for b in id_bytes(tops[n][0], SETTINGS["d"])])
        columns["attention_mask"].append([place for place, n in enumerate(group, 1) for _ in data.tokens[n]])
        columns["labels"].append([label for n in group for label in [-100, -100, *data.tokens[n].tolist()[2:]]])
    folder = write(tmp_path / "logits", columns, SETTINGS)
    entry = imported(tmp_path, folder, "distillkit", "--encoding", "float32")
    same_targets(entry, data, [range(len(tokens)) for tokens in data.tokens])
    assert entry.entry.targets.positions == "all"
    mask = LogitCache.open(tmp_path / "cache").loss_mask
    assert mask is not None
    ends = [*(data.starts[1:] - 1).tolist(), len(entry) - 1]
    assert np.flatnonzero(~mask.read(0, len(entry))).tolist() == sorted([*data.starts.tolist(), *ends])


def test_the_variant_with_texts_appends_no_padding(data: Known, tmp_path: Path) -> None:
    columns = plain(data) | {"messages": [""] * 4, "text": ["a"] * 4}
    tokens = [np.append(one[:-1], 0) for one in data.tokens]  # each ends with the padding id, which is its own
    columns["input_ids"] = [one.tolist() for one in tokens]
    entry = imported(tmp_path, write(tmp_path / "l", columns, SETTINGS), "distillkit", "--encoding", "float32")
    same_targets(entry, Known(tokens, data.logprobs))


def test_ranks_that_the_writer_did_not_get(data: Known, tmp_path: Path) -> None:
    """-inf with an uninitialised id, which spoils the curve: what is finite is taken, the others are left out."""
    settings = SETTINGS | {"k": 12, "exact_k": K, "polynomial_terms": [0, 1], "delta_encoding": True}
    columns = plain(data, settings)
    exact = [number_bytes(np.diff(row, prepend=0.0), "float32") for row in data.top(1, K)[1][:1]]
    nan = number_bytes(np.full(2, np.nan), "float32")
    columns["compressed_logprobs"][1][0] = exact[0] + nan
    columns["bytepacked_indices"][1][0] = id_bytes(np.array([[*data.top(1, K)[0][0], 5, 5, 127, 127]]), V + 1)[0]
    targets = whole(imported(tmp_path, write(tmp_path / "l", columns, settings), "distillkit", "--encoding", "float32"))
    at = data.starts[1]
    assert targets.kept[at] == K
    np.testing.assert_allclose(targets.logprobs[at, :K], data.top(1)[1][0], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": K - 1, "exact_k": K - 1}, "rows of 32 bytes"),
        ({"exact_dtype": "bfloat16"}, "rows of 32 bytes"),
        ({"d": 2 * V + 70}, "rows of 7 bytes"),
        ({"exact_k": 2, "polynomial_terms": [0, 1, 2, 3, 4, 5]}, "leave more mass"),
        ({"delta_encoding": True}, "leave more mass"),
        ({"exact_k": K + 1}, "exact_k 9 is larger than k 8"),
        ({"exact_dtype": "int3"}, "exact_dtype"),
    ],
)
def test_other_settings_than_those_of_the_writer(
    change: dict[str, Any], words: str, data: Known, tmp_path: Path
) -> None:
    """Garbage is not taken for targets: the bytes do not fit, or the numbers do not."""
    folder = write(tmp_path / "l", plain(data, SETTINGS), SETTINGS | change)
    refused(imports(tmp_path, folder, "distillkit"), words)
    assert not (tmp_path / "cache").exists()


def test_rows_of_an_other_delta_encoding_are_refused(data: Known, tmp_path: Path) -> None:
    folder = write(tmp_path / "l", plain(data, SETTINGS | {"delta_encoding": True}), SETTINGS)
    refused(imports(tmp_path, folder, "distillkit"), "more than 1", "other settings")


def test_settings_are_needed_and_a_change_of_them_is_another_entry(data: Known, tmp_path: Path) -> None:
    folder = write(tmp_path / "l", plain(data), SETTINGS)
    text = (folder / "compression_config.yaml").read_text()
    (folder / "compression_config.yaml").unlink()
    refused(imports(tmp_path, folder, "distillkit"), "compression_config.yaml", "--compression-config")
    nested = tmp_path / "settings.yaml"
    nested.write_text(yaml.safe_dump({"model": "x", "compressor": yaml.safe_load(text)}))
    imported(tmp_path, folder, "distillkit", "--compression-config", nested)
    nested.write_text(nested.read_text() + "# another\n")
    refused(imports(tmp_path, folder, "distillkit", "--compression-config", nested), "imported_from.files.1.sha256")


def legacy_words(ids: np.ndarray, bits: int) -> list[list[int]]:
    each = 64 // bits
    return [
        [
            sum(int(i) << (bits * place) for place, i in enumerate(row[at : at + each]))
            for at in range(0, len(row), each)
        ]
        for row in ids
    ]


@pytest.mark.parametrize("kind", ["logprobs", "centred", "curve"])
def test_the_legacy_form(kind: str, data: Known, tmp_path: Path) -> None:
    exact_k, degree = (3, 2) if kind == "curve" else (K, 0)
    settings = {"vocab_size": V, "k": K, "exact_k": exact_k, "polynomial_degree": degree, "with_sqrt_term": True}
    columns: dict[str, Any] = {"input_ids": [], "packed_indices": [], "exact_values": [], "coeffs": []}
    x = np.arange(1, K - exact_k + 1)
    basis = np.array([x**-0.0, x**-1.0, x**-2.0, np.sqrt(x)]).T if kind == "curve" else np.zeros((0, 2))
    for number, tokens in enumerate(data.tokens):
        ids, values = data.top(number)
        if kind == "centred":
            values = values - data.logprobs[number].mean(axis=1)[:, None]
        coefficients = [np.linalg.lstsq(basis, row[exact_k:], rcond=None)[0] for row in values[:-1]]
        columns["input_ids"].append(tokens.tolist())
        columns["packed_indices"].append(legacy_words(ids[:-1], math.ceil(math.log2(V))))
        columns["exact_values"].append(values[:-1, :exact_k].tolist())
        columns["coeffs"].append([row.tolist() for row in coefficients])
    folder = write(tmp_path / "l", columns, settings)
    entry = imported(tmp_path, folder, "distillkit-legacy", "--encoding", "float32")
    if kind == "curve":  # five values, four terms
        targets = whole(entry)
        for number, start in enumerate(data.starts):
            found = targets.logprobs[start : start + len(data.tokens[number]) - 1, :K]
            np.testing.assert_allclose(found[:, :2], data.top(number)[1][:-1, :2], atol=1e-4)
            np.testing.assert_allclose(found, data.top(number)[1][:-1], atol=0.5)
    else:
        same_targets(entry, data, renormalised=kind == "centred")
    refused(imports(tmp_path, folder, "distillkit", out="o"), "distillkit-legacy")
    found = succeeded(in_process("logit-cache", "import", folder, "--guess", "--json"))
    assert json.loads(found.stdout) == {"format": "distillkit-legacy"}


def test_files_come_in_the_order_of_their_numbers(data: Known, tmp_path: Path) -> None:
    columns = plain(data)
    for number in range(4):
        part = {name: values[number : number + 1] for name, values in columns.items()}
        write(tmp_path / "l", part, SETTINGS, f"data_{[1, 2, 10, 11][number]}.parquet")
    entry = imported(tmp_path, tmp_path / "l", "distillkit", "--encoding", "float32")
    same_targets(entry, data)
    names = [file.name for file in entry.entry.imported_from.files]  # type: ignore[union-attr]
    assert names[:-1] == sorted(names[:-1], key=lambda name: int(name[5:-8]))
    assert all(a != b for a, b in pairwise(names))
