"""A SentencePiece model as a tokenizer.json: the same ids, checked against sentencepiece itself.

transformers' own conversion leaves out the space before a text and the removal of superfluous ones. Ids are those of
the pieces, unless the class that a folder names has an order of its own; control pieces are special tokens, which a
text may contain.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from storage.errors import InputError
from storage.progress import Log
from student.models.text_ids import text_ids
from student.models.tokenizer_file import (
    ADDING,
    FILE,
    PROBES,
    as_transformers_does,
    listed_ids,
    read_file,
    same_every_time,
)
from student.models.tokenizer_settings import SETTINGS_FILE, class_name, read_settings

_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "sentencepiece.model")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_SPACE = "▁"
# Kinds of pieces and of models, as in sentencepiece_model.proto.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_UNIGRAM, _BPE = 1, 2


def sentencepiece_file(folder: Path) -> Path | None:
    """The SentencePiece model of a folder, or None where it has none."""
    found = (*(folder / name for name in _NAMES), *sorted(folder.glob("tokenizer.model.v*")))
    return next((path for path in found if path.is_file() and not is_tiktoken(path)), None)


def is_tiktoken(path: Path) -> bool:
    """Whether a file is a vocabulary of tiktoken: lines of a token in base64 and its rank."""
    with path.open("rb") as opened:
        return _TIKTOKEN.match(opened.read(4096)) is not None


def read_sentencepiece(folder: Path, path: Path, asked: str, log: Log | None) -> Any:
    """The tokenizer of a folder whose SentencePiece model is `path`, with the settings beside it.

    Raises InputError where sentencepiece is not installed, and where the tokenizer would give other ids than it.
    """
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError as error:
        raise InputError(
            f"{asked}: {path.name} is a SentencePiece model, which the extra sentencepiece reads: "
            f"pip install 'logit-cache[sentencepiece]'"
        ) from error

    formats: Any = sentencepiece_model_pb2
    data = path.read_bytes()
    try:
        processor, proto = SentencePieceProcessor(model_proto=data), formats.ModelProto.FromString(data)
    except Exception as error:  # of C++ or of protobuf
        raise InputError(f"{asked}: {path.name} is not a SentencePiece model: copy it again") from error
    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE) or trainer.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise InputError(
            f"{asked}: {path.name} is neither a BPE nor a Unigram model with its spaces before words, the kinds of "
            f"SentencePiece models that are read: give a folder with a {FILE}"
        )
    try:
        other = as_transformers_does(folder, False, asked, log)
    except Exception:  # no class is named, or it cannot read the model
        other = None
    if other is not None and not other.is_fast:
        return same_every_time(other, asked, log)
    pieces = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    if other is not None and any(other.get_vocab().get(string, index) != index for string, index in pieces.items()):
        tokenizer = same_every_time(other, asked, log)
    else:
        with tempfile.TemporaryDirectory(prefix="logit-cache-") as whole:
            _write_whole(Path(whole), folder, proto, other)
            tokenizer = read_file(Path(whole), asked, None)
        same_every_time(tokenizer, asked, log)
    _check(tokenizer, processor, path, asked)
    return tokenizer


def _write_whole(whole: Path, folder: Path, proto: Any, other: Any) -> None:
    """A folder's small files and the tokenizer.json that its SentencePiece model stands for."""
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copyfile(path, whole / path.name)
    if (folder / "additional_chat_templates").is_dir():
        shutil.copytree(folder / "additional_chat_templates", whole / "additional_chat_templates")
    # Settings may give names to pieces that were left for it.
    strings = {piece.piece for piece in proto.pieces}
    for string, index in listed_ids(folder).items():
        if string not in strings and index < len(proto.pieces):
            proto.pieces[index].piece, proto.pieces[index].type = string, _CONTROL
    backend = backend_of(proto)
    name = class_name(folder)
    if other is not None:
        # Such as T5's <extra_id_0>; a class's names for BOS and the like are not this model's.
        here = strings | set(map(str, other.special_tokens_map.values()))
        added = [token for _, token in sorted(other.added_tokens_decoder.items()) if str(token) not in here]
        backend.add_tokens(added)
        if name not in ADDING:
            backend.post_processor = other.backend_tokenizer.post_processor
    backend.save(str(whole / FILE))
    settings = {"tokenizer_class": name, **read_settings(folder)}
    if ADDING.get(name or ""):
        settings.setdefault("add_bos_token", True)
    for name in ("bos", "eos", "pad", "unk"):
        index = getattr(proto.trainer_spec, f"{name}_id")
        if 0 <= index < len(proto.pieces):
            settings.setdefault(f"{name}_token", proto.pieces[index].piece)
    (whole / SETTINGS_FILE).write_text(json.dumps(settings), encoding="utf-8")


def _check(tokenizer: Any, processor: Any, path: Path, asked: str) -> None:
    """Refuse a tokenizer that gives a probe other pieces than sentencepiece."""
    for text in PROBES:
        ours = tokenizer.convert_ids_to_tokens(text_ids(tokenizer, text))
        theirs = processor.encode(text, out_type=str)
        unknown = tokenizer.unk_token
        known = tokenizer.get_vocab()
        if ours != [piece if piece in known else unknown for piece in theirs]:
            raise InputError(
                f"{asked}: {path.name} cannot be read exactly: as {FILE} it gives {len(ours)} tokens in place of "
                f"{len(theirs)} for {text[:40]!r}; give a folder with the model's own {FILE}"
            )


def backend_of(proto: Any) -> Any:
    """A `tokenizers.Tokenizer` with the rules and the ids of a SentencePiece ModelProto."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    own = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    if trainer.model_type == _UNIGRAM:
        best = max((piece.score for piece in proto.pieces if piece.type == _NORMAL), default=0.0)
        scores = [_score(piece, best) for piece in proto.pieces]
        tokenizer = Tokenizer(models.Unigram(scores, trainer.unk_id, trainer.byte_fallback))
    else:
        ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        unknown = proto.pieces[trainer.unk_id].piece
        bpe = models.BPE(
            ids, _merges(proto.pieces), unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback,
            # A symbol is one word, and its own token.
            ignore_merges=bool(own),
        )  # fmt: skip
        tokenizer = Tokenizer(bpe)
        if own:
            symbols = "|".join(map(re.escape, sorted(own, key=len, reverse=True)))
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(symbols), "isolated")
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        # Precompiled looks up a whole grapheme and drops what follows the part that it found: composed and cut before.
        lines = [normalizers.Replace("\r\n", "\n\n")] if _line_ends_are_spaces(proto) else []
        steps = [*lines, normalizers.NFC(), normalizers.Precompiled(rules.precompiled_charsmap)]
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", left=1))
    tokenizer.decoder = decoders.Sequence(decoding)
    control = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(string, normalized=False) for string in control])
    return tokenizer


def _line_ends_are_spaces(proto: Any) -> bool:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    return bool(processor.normalize("a\r\nb") == processor.normalize("a\n\nb"))


def _score(piece: Any, best: float) -> tuple[str, float]:
    """A piece and its log-prob; symbols that the user defined win over all others, as in sentencepiece."""
    length = len(piece.piece.encode())
    return piece.piece, length * best - 0.1 if piece.type == _USER_DEFINED else piece.score


def _merges(pieces: Iterable[Any]) -> list[tuple[str, str]]:
    """Pairs of pieces by descending score of what they make."""
    scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
    pairs = [
        (string[:cut], string[cut:])
        for string in sorted(scores, key=lambda each: -scores[each])
        for cut in range(1, len(string))
    ]
    return [(left, right) for left, right in pairs if left in scores and right in scores]
