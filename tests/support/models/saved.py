"""Random models of transformers' families, saved once for the tests of a file."""

from __future__ import annotations

import argparse
import functools
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, ByT5Tokenizer, PreTrainedTokenizerFast

from logit_cache.corpus.tokenizer import train_tokenizer
from teachers.huggingface.teacher import HuggingFaceTeacher


def saver(folder: Path, configs: Mapping[str, Callable[..., Any]]) -> Callable[..., Path]:
    """What saves a model of a named configuration, with biases that are not 0, and gives its directory.

    Once for each name and options, so a directory that is to be changed is copied first.
    """

    def save(name: str, **options: Any) -> Path:
        path = folder / ",".join(f"{key}={value}" for key, value in options.items()) / name
        if not path.exists():
            torch.manual_seed(len(name))
            model = transformers.AutoModelForCausalLM.from_config(configs[name](**options))
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(path)
        return path

    return save


def load(directory: Path, **options: Any) -> HuggingFaceTeacher:
    """A saved model as a teacher, in float32 on the CPU unless asked otherwise, without a remark."""
    return HuggingFaceTeacher.load(
        str(directory), **{"dtype": "float32", "device": "cpu", "on_message": lambda _: None, **options}
    )


def own_logits(directory: Path, windows: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The model's own logits of all positions of windows [B, C], in order."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        return model(input_ids=windows).logits.flatten(0, 1)


def dense_logprobs(
    teacher: Path, tokens: np.ndarray, context: int, stride: int, begin: tuple[int, ...] = ()
) -> torch.Tensor:
    """float64 log-softmax of the model's own logits, window by window after `begin`, for every position."""
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    rows = torch.full((len(tokens), model.config.vocab_size), torch.nan, dtype=torch.float64)
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        for block in range(0, len(tokens), stride):
            start = max(0, block + stride - context)
            read = torch.cat([torch.tensor(begin, dtype=torch.int64), ids[start : start + context]])
            logits = model(read[None]).logits[0, len(begin) :].double()
            rows[block : block + stride] = torch.log_softmax(logits, -1)[block - start : block - start + stride]
    return rows


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def sample_text() -> str:
    """About 200 KB of real text, with other scripts, long runs of spaces and Windows line ends here and there."""
    source = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, textwrap))
    lines = source.splitlines(keepends=True)
    extra = [
        "日本語のテキスト、ここに。\n",
        "naïve cafe\u0301 ﬁne ½\r\n",
        "👩\u200d👩\u200d👧 emoji 😀😀\n",
        "   \t \n\n\n",
        "Grüße, Ärger\r\n\r\n",
    ]
    return "".join(line + (extra[i // 40 % len(extra)] if i % 40 == 0 else "") for i, line in enumerate(lines))


def _lines() -> Iterator[str]:
    yield from sample_text().splitlines(keepends=True)


@functools.cache
def tiny_tokenizer(kind: str) -> Any:
    """A transformers tokenizer of the kind; do not change it (`chat_template` included): it is shared."""
    return make_tokenizer(kind)


def make_tokenizer(kind: str) -> Any:
    """`seeds` (ours), `gpt2`, `llama3`, `llama2`, `metaspace`, `unigram`, `wordpiece`, or `bytes` (not a fast one)."""
    if kind == "seeds":
        return train_tokenizer(_lines(), 600)
    if kind == "bytes":
        return ByT5Tokenizer()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind in ("gpt2", "llama3"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.decoder = decoders.ByteLevel()
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        tokenizer.pre_tokenizer = (
            level
            if kind == "gpt2"
            else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA_3), "isolated"), level])
        )
        trainer: Any = trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    elif kind in ("llama2", "metaspace"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.decoder = decoders.Metaspace()
        if kind == "llama2":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            # Trained on words, and then without a pre-tokenizer: the whole text is one word, as in the real one.
            tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        bytes_ = [f"<0x{value:02X}>" for value in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    else:
        raise ValueError(kind)
    tokenizer.train_from_iterator(_lines(), trainer)
    if kind == "llama2":
        tokenizer.pre_tokenizer = None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


FAST = ("seeds", "gpt2", "llama3", "llama2", "metaspace", "unigram", "wordpiece")
