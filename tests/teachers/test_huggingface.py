"""Teachers from transformers: logits against the model's own, which path each family takes, digests, refusals."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from support.models.families import COMMON, families
from support.models.saved import own_logits, saver
from tokenizers import Tokenizer, models
from torch import Tensor

import student.models.model_files
from storage.errors import InputError
from storage.format.encoding import logprob_floor
from student.models.model_files import config_sha256, find_model, weights_sha256
from teachers.base import Teacher
from teachers.huggingface.teacher import HuggingFaceTeacher
from teachers.reduction.reduce import reduce_topk

HEAD, VOCABULARY, K = 512, 507, 20  # the head is padded beyond the tokenizer
FLOOR = logprob_floor(1 / 32)
COMMIT = "0123456789abcdef0123456789abcdef01234567"

FAMILIES = families(HEAD)
FAST = {"gpt2", "llama", "opt", "qwen2", "gpt_neox", "phi", "mamba"}

Save = Callable[..., Path]


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Saves a random model of a family once; copy the directory before changing it."""
    return saver(tmp_path_factory.mktemp("models"), FAMILIES)


@pytest.fixture
def broken(save: Save, tmp_path: Path) -> Path:
    """A copy of a Llama to break."""
    return Path(shutil.copytree(save("llama"), tmp_path / "llama"))


def load(directory: Path | str, **options: Any) -> tuple[HuggingFaceTeacher, list[str]]:
    messages: list[str] = []
    settings = {"dtype": "float32", "device": "cpu", "on_message": messages.append, **options}
    return HuggingFaceTeacher.load(str(directory), **settings), messages


def refusal(directory: Path | str, **options: Any) -> str:
    """The one line that a user gets."""
    with pytest.raises(InputError) as caught:
        load(directory, **options)
    message = str(caught.value)
    assert len(message) < 700
    assert "\n" not in message
    return message


def overlapping_windows() -> tuple[Tensor, Tensor]:
    """Windows of 24 tokens of which the later ones score their last positions only."""
    windows = torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(3))
    rows = [*range(24), *range(24 + 16, 48), *range(48 + 17, 72), 95]
    return windows, torch.tensor(rows)


def scored(teacher: Teacher) -> Tensor:
    """The logits of the scored rows of `overlapping_windows`."""
    return torch.cat(list(teacher.score(*overlapping_windows())))


def expected_of(directory: Path) -> Tensor:
    """The same, of the model itself."""
    windows, rows = overlapping_windows()
    return own_logits(directory, windows).index_select(0, rows)


def check_top_k(logits: Tensor, expected: Tensor) -> None:
    """The reduced rows are those of a dense float32 softmax and a stable sort, up to swaps within 1e-5."""
    expected = expected[:, :VOCABULARY]
    found = reduce_topk(logits, VOCABULARY, K, torch.full((len(logits),), -1), FLOOR)
    order = expected.sort(dim=1, descending=True, stable=True).indices[:, :K]
    swapped = found.token_ids != order
    distance = (expected.gather(1, found.token_ids) - expected.gather(1, order)).abs()
    assert float(distance.masked_fill(~swapped, 0.0).max()) <= 1e-5
    assert all(len(set(row)) == K for row in found.token_ids.tolist())
    dense = expected.log_softmax(1).gather(1, found.token_ids)
    torch.testing.assert_close(found.logprobs, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget_rows", [1, 5, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_its_own_logits_by_the_path_that_it_allows(
    family: str, budget_rows: int, save: Save
) -> None:
    teacher, messages = load(save(family), logit_budget_bytes=4 * HEAD * budget_rows)
    assert teacher.head == ("fast" if family in FAST else "general")
    assert len(messages) == (0 if family in FAST else 1)
    assert teacher.head_columns == HEAD

    windows, rows = overlapping_windows()
    chunks = list(teacher.score(windows, rows))
    assert all(len(chunk) <= budget_rows and chunk.dtype == torch.float32 for chunk in chunks)
    logits = torch.cat(chunks)
    expected = own_logits(save(family), windows).index_select(0, rows)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    check_top_k(logits, expected)


@pytest.mark.parametrize(
    ("family", "neutral"),
    [
        ("gemma2", {"final_logit_softcapping": None}),
        ("granite", {"logits_scaling": 1.0}),
        ("cohere", {"logit_scale": 1.0}),
    ],
)
def test_the_layers_after_the_head_decide_not_the_name_of_the_family(family: str, neutral: Any, save: Save) -> None:
    teacher, messages = load(save(family, **neutral))
    assert (teacher.head, messages) == ("fast", [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_soft_cap_is_found_where_the_test_windows_do_not_reach_it(dtype: str, save: Save) -> None:
    directory = save("gemma2", initializer_range=0.01, final_logit_softcapping=50.0)
    logits = own_logits(directory, torch.arange(32)[None])
    capped = 50 * torch.tanh(logits / 50)
    assert float((logits - capped).abs().max()) < 1e-5 * float(logits.abs().max()), "the cap shows by itself"
    teacher, messages = load(directory, dtype=dtype)
    assert teacher.head == "general"
    assert "hidden states times" in messages[0]


def test_a_family_without_separate_parts_takes_the_general_path(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = expected_of(save("llama"))
    causal = transformers.LlamaForCausalLM
    for attribute, value, reason in [
        ("base_model", property(lambda self: self), "no backbone"),
        ("base_model", property(lambda self: self.model.layers[0]), "the fast path failed"),
        ("base_model", property(lambda self: self.model.embed_tokens), "the fast path failed"),
        ("get_output_embeddings", lambda self: None, "its output layer is a NoneType"),
        ("get_output_embeddings", lambda self: self.model.layers[0].mlp.up_proj, "differ by shape"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(causal, attribute, value)
            teacher, messages = load(save("llama"))
        assert teacher.head == "general"
        assert reason in messages[0]
        torch.testing.assert_close(scored(teacher), expected, atol=1e-5, rtol=1e-5)


def test_the_general_path_needs_no_logits_to_keep(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = transformers.CohereForCausalLM.forward
    expected = expected_of(save("cohere"))

    def plain(self: Any, input_ids: Tensor, use_cache: bool) -> Any:
        return forward(self, input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(transformers.CohereForCausalLM, "forward", plain)
    teacher, _ = load(save("cohere"), logit_budget_bytes=4 * HEAD * 60)
    torch.testing.assert_close(scored(teacher), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["gpt2", "phi", "mamba", "gemma2", "granite", "cohere"])
def test_half_precision_models_give_logits_without_its_rounding(family: str, dtype: str, save: Save) -> None:
    half = getattr(torch, dtype)
    teacher, _ = load(save(family), dtype=dtype)
    assert teacher.head == ("fast" if family in FAST else "general")
    assert teacher.identity.members[0].dtype == dtype
    windows, rows = overlapping_windows()
    logits = torch.cat(list(teacher.score(windows, rows)))
    assert logits.dtype == torch.float32
    assert float((logits == logits.to(half).float()).float().mean()) < 0.1, "they are rounded"

    # The reference: the hidden states of the same backbone, and everything after them in float32.
    model = transformers.AutoModelForCausalLM.from_pretrained(save(family), dtype=half).eval()
    model.requires_grad_(False)  # torch picks other CPU kernels for matrices that need gradients
    with torch.no_grad():
        hidden = model.base_model(input_ids=windows, use_cache=False).last_hidden_state.flatten(0, 1)[rows]
        expected = model.get_output_embeddings().float()(hidden.float())
    after = {"gemma2": lambda z: 10 * torch.tanh(z / 10), "granite": lambda z: z / 8, "cohere": lambda z: z * 0.0625}
    expected = after.get(family, lambda z: z)(expected)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_insists_on_its_dtype_after_the_head_keeps_its_rounding(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = transformers.CohereForCausalLM.forward

    def strict(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if output.logits.dtype != torch.bfloat16:
            raise RuntimeError("bfloat16 only")
        return output

    monkeypatch.setattr(transformers.CohereForCausalLM, "forward", strict)
    teacher, messages = load(save("cohere"), dtype="bfloat16")
    assert messages[0].endswith("its logits are rounded to bfloat16")
    windows, rows = overlapping_windows()
    logits = torch.cat(list(teacher.score(windows, rows)))
    assert torch.equal(logits, own_logits(save("cohere"), windows, torch.bfloat16)[rows].float())


def test_repeated_calls_repeat_every_bit_and_leave_no_mode_behind(save: Save) -> None:
    windows, rows = overlapping_windows()
    for family in ("gpt2", "gemma2"):
        teacher: Teacher = load(save(family), dtype="bfloat16", logit_budget_bytes=4 * HEAD * 7)[0]
        first = list(teacher.score(windows, rows))
        scored = teacher.score(windows, rows)
        for chunk in first:
            assert torch.equal(next(scored), chunk)
            assert not torch.is_inference_mode_enabled()


def test_dropout_is_off(save: Save) -> None:
    directory = save("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    teacher, _ = load(directory)
    torch.testing.assert_close(scored(teacher), expected_of(directory), atol=1e-5, rtol=1e-5)


def test_attention_is_chosen_and_reported(save: Save) -> None:
    assert load(save("llama"))[0].attention == "sdpa"
    assert load(save("llama"), attention="eager")[0].attention == "eager"


# ---- identity


def test_identity_names_the_model(save: Save) -> None:
    teacher, _ = load(save("llama"))
    (member,) = teacher.identity.members
    assert teacher.identity.combine == "single"
    assert (member.source, member.revision, member.architecture) == ("llama", None, "LlamaForCausalLM")
    assert (member.dtype, member.head_columns, member.trust_remote_code) == ("float32", HEAD, False)
    model = transformers.AutoModelForCausalLM.from_pretrained(save("llama"))
    assert member.parameters == model.num_parameters()


def digest(directory: Path) -> str:
    return weights_sha256(find_model(str(directory)).weights)


def test_the_weights_digest_is_that_of_the_tensors(save: Save, tmp_path: Path) -> None:
    whole = save("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path / "cut", max_shard_size="40KB")
    assert len(find_model(str(tmp_path / "cut")).weights) > 2
    assert digest(tmp_path / "cut") == digest(whole)
    assert load(tmp_path / "cut")[0].identity.members[0].weights_sha256 == digest(whole)

    changed = shutil.copytree(whole, tmp_path / "changed")
    file = changed / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert digest(changed) != digest(whole)

    tensors = safetensors.torch.load_file(whole / "model.safetensors")
    names = sorted(tensors)
    for file, part in {"first": names[5:], "second": names[:5]}.items():
        safetensors.torch.save_file({name: tensors[name] for name in part}, tmp_path / file)
    assert weights_sha256([tmp_path / "first", tmp_path / "second"]) == digest(whole), "another order of files"

    swapped = {"lm_head.weight": "model.embed_tokens.weight", "model.embed_tokens.weight": "lm_head.weight"}
    for name, other in {
        "another name": {swapped.get(name, name): value for name, value in tensors.items()},
        "another shape": {name: value.flatten() for name, value in tensors.items()},
        "another dtype": {name: value.view(torch.int32) for name, value in tensors.items()},
    }.items():
        safetensors.torch.save_file(other, changed / "model.safetensors")
        assert digest(changed) != digest(whole), name


def test_the_config_digest_covers_the_keys_that_decide_the_computation() -> None:
    config = {
        "model_type": "x",
        "rope_theta": 1e4,
        "text_config": {"layers": 2, "dtype": "float32"},
        "limit": "Infinity",
    }
    same = {**config, "dtype": "bfloat16", "transformers_version": "9", "_name_or_path": "/home/me", "use_cache": False}
    same |= {"architectures": ["Y"], "text_config": {"layers": 2, "dtype": "bfloat16"}}
    assert config_sha256(same) == config_sha256(config)
    for change in ({"rope_theta": 1e5}, {"text_config": {"layers": 3}}, {"new": None}):
        assert config_sha256({**config, **change}) != config_sha256(config)


def test_a_config_with_infinity_has_a_digest(broken: Path) -> None:
    text = (broken / "config.json").read_text()
    (broken / "config.json").write_text(text.replace("{", '{"note": [0.0, Infinity],', 1))
    assert find_model(str(broken)).config["note"] == [0.0, "Infinity"]
    assert len(load(broken)[0].identity.members[0].config_sha256) == 64


# ---- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str | None]]:
    """A stand-in for snapshot_download over a folder, and the revisions that it was asked for."""
    repository, asked = tmp_path / "repository", []
    snapshot = tmp_path / "hub" / "snapshots" / COMMIT

    def download(
        hub_id: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None
    ) -> str:
        asked.append(revision)
        for file in repository.rglob("*"):
            name = str(file.relative_to(repository))
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if file.is_file() and wanted and not any(fnmatch.fnmatch(name, p) for p in ignore_patterns or []):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(student.models.model_files, "snapshot_download", download)
    return repository, asked


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
def test_a_hub_model_is_bound_to_its_commit_and_to_the_files_that_are_loaded(
    shard_size: str, save: Save, hub: tuple[Path, list[str | None]]
) -> None:
    repository, asked = hub
    transformers.AutoModelForCausalLM.from_pretrained(save("llama")).save_pretrained(
        repository, max_shard_size=shard_size
    )
    (repository / "onnx").mkdir()
    for name in ("consolidated.safetensors", "pytorch_model.bin", "modeling.py", "onnx/model.safetensors"):
        (repository / name).write_bytes(b"not this one")
    teacher, _ = load("somebody/llama-tiny", revision="v1.0")
    (member,) = teacher.identity.members
    assert (member.source, member.revision) == ("somebody/llama-tiny", COMMIT)
    assert member.weights_sha256 == digest(save("llama"))
    assert asked == (["v1.0"] if shard_size == "1GB" else ["v1.0", COMMIT])
    files = find_model("somebody/llama-tiny")
    names = {path.name for path in files.directory.rglob("*")}
    assert not names & {"consolidated.safetensors", "pytorch_model.bin", "modeling.py", "onnx"}


def test_an_unknown_hub_id_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal("nobody/no-such-model")
    assert message.startswith("nobody/no-such-model: no such directory here")
    assert "the hub cannot be reached" in message


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (GatedRepoError, "accept conditions first"),
        (RepositoryNotFoundError, "no such model, or it is private"),
        (RevisionNotFoundError, "no such revision"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    error: type[HfHubHTTPError], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error("refused", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]

    monkeypatch.setattr(student.models.model_files, "snapshot_download", refuse)
    message = refusal("somebody/a-model")
    assert message.startswith("somebody/a-model: ")
    assert advice in message
    assert "\n" not in message


# ---- context and vocabulary


def test_windows_longer_than_the_model_are_refused(save: Save) -> None:
    teacher, _ = load(save("opt"))
    teacher.check_context(64)
    with pytest.raises(InputError, match="at most 64 tokens at once, the context is 65"):
        teacher.check_context(65)
    teacher.check_context(63, begun=True)
    with pytest.raises(InputError, match="the context is 64 and BOS before it: take a context of 63 or less"):
        teacher.check_context(64, begun=True)
    mamba, _ = load(save("mamba"))
    assert mamba.max_positions is None
    mamba.check_context(1 << 20)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    assert load(save("llama", rope_parameters=rope))[0].max_positions == 256


def test_the_vocabulary_is_that_of_the_tokenizer_beside_the_model(save: Save, broken: Path) -> None:
    assert load(save("llama"))[0].vocabulary() is None
    words = {"<unk>": 0, "a": 1, "b": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_tokens(["<sep>"])
    tokenizer.save_pretrained(broken)
    teacher, _ = load(broken)
    assert teacher.vocabulary() == {**words, "<sep>": 3}
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="the tokenizer beside the model cannot be read"):
        teacher.vocabulary()


# ---- refusals


def test_missing_and_misnamed_directories(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "nothing")
    assert "no such directory" in refusal("./nothing")
    (tmp_path / "file").write_text("")
    assert "found a file" in refusal(tmp_path / "file")
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '{"vocab_size": 3}', '{"model_type": "no_such_model_type"}', "\xff"])
def test_broken_configs(text: str, broken: Path) -> None:
    (broken / "config.json").write_text(text, encoding="latin-1")
    assert str(broken) in refusal(broken)


def test_a_config_that_is_no_size_for_one(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student.models.model_files, "_MAX_JSON_BYTES", 10)
    assert "at most 10 are read as JSON" in refusal(broken)


@pytest.mark.parametrize("keep", [0, 5, 100, 3_000, -1])
def test_truncated_weights(keep: int, broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file}: not a whole safetensors file" in refusal(broken)


def test_weights_that_are_no_safetensors(broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    assert "the file has" in refusal(broken)
    for header in (b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'):
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        assert "not a whole safetensors file" in refusal(broken)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "not a whole safetensors file" in refusal(broken)


def test_weights_in_a_pickle_only(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    assert "found no weights" in refusal(broken)
    (broken / "pytorch_model.bin").write_bytes(b"")
    message = refusal(broken)
    assert "found only pytorch_model.bin" in message
    assert "convert" in message


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_missing_and_misshapen_tensors(name: str, broken: Path) -> None:
    file = broken / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensor = tensors.pop(name)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    assert f"such as {name} (missing)" in refusal(broken)
    safetensors.torch.save_file({**tensors, name: tensor[:-1].contiguous()}, file, {"format": "pt"})
    shapes = f"{tuple(tensor[:-1].shape)}, not {tuple(tensor.shape)}"
    assert f"such as {name} ({shapes})" in refusal(broken)


def test_unused_tensors_are_mentioned(broken: Path) -> None:
    file = broken / "model.safetensors"
    safetensors.torch.save_file({**safetensors.torch.load_file(file), "score.weight": torch.ones(2)}, file)
    _, messages = load(broken)
    assert messages == [f"{broken}: not used: 1 tensor in the files, such as score.weight"]


def test_indexes_that_lead_elsewhere(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "part.safetensors")
    index = broken / "model.safetensors.index.json"
    for weight_map, found in [
        ({"a": "../llama/part.safetensors"}, "outside its directory"),
        ({"a": "other.safetensors"}, "other.safetensors, and there is no such file"),
        ({}, "no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert found in refusal(broken)
    shutil.copyfile(broken / "part.safetensors", broken / "again.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors", "b": "again.safetensors"}}))
    with pytest.raises(InputError, match="both hold a tensor"):
        digest(broken)


def test_code_in_a_model_directory_is_not_run(broken: Path, tmp_path: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config |= {"model_type": "their_own", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "c.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "trust_remote_code" in refusal(broken)
    assert not (tmp_path / "ran").exists()


def test_models_that_are_not_causal(tmp_path: Path) -> None:
    t5 = transformers.T5Config(vocab_size=HEAD, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    assert "T5Config" in refusal(tmp_path / "t5")
    bert = transformers.BertConfig(**{**COMMON, "vocab_size": HEAD, "initializer_range": 0.2})
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    for dtype in ("float32", "bfloat16"):
        assert "change with the tokens after it" in refusal(tmp_path / "bert", dtype=dtype)


def test_broken_weights(broken: Path) -> None:
    file = broken / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["lm_head.weight"][3, 4] = float("nan")
    safetensors.torch.save_file(tensors, file)
    assert "NaN" in refusal(broken)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_gives_float32_logits_too(family: str, dtype: str, save: Save) -> None:
    teacher, _ = load(save(family), dtype=dtype, device="cuda")
    assert teacher.head == ("fast" if family in FAST else "general")
    windows, rows = overlapping_windows()
    logits = torch.cat(list(teacher.score(windows.cuda(), rows.cuda())))
    assert (logits.dtype, logits.device) == (torch.float32, teacher.device)
    if dtype == "float32":
        torch.testing.assert_close(logits.cpu(), own_logits(save(family), windows)[rows], atol=1e-4, rtol=1e-4)
    else:
        half = getattr(torch, dtype)
        assert float((logits == logits.to(half).float()).float().mean()) < 0.1, "they are rounded"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"dtype": "int8"}, "expected one of float32, bfloat16, float16"),
        ({"logit_budget_bytes": 0}, "at least 1, found 0"),
        ({"revision": "main"}, "leave it out"),
        ({"attention": "no_such_attention"}, "no_such_attention"),
        *(({"device": device}, device) for device in ("gpu", "meta", "cuda:99")),
    ],
)
def test_wrong_options(option: dict[str, Any], words: str, save: Save) -> None:
    assert words in refusal(save("llama"), **option)


def test_loading_leaves_the_settings_of_transformers_alone(save: Save, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    load(save("llama"))
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr().err == "", "a log file gets no bars and no tables"
