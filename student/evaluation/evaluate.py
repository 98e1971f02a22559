"""Evaluation of a saved model: on held-out text of a cache, and on minimal pairs.

Any causal language model that transformers saved can be evaluated; ours and others' are measured alike.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from storage.errors import InputError
from storage.files import local_path
from storage.progress import Log, Track, silent, untracked
from student.data.windows import DistillationWindows
from student.evaluation.held_out import held_out
from student.evaluation.job import EvaluationJob
from student.evaluation.lm_eval_tasks import check_folder, write_tasks
from student.evaluation.minimal_pairs import (
    Sentence,
    encode,
    prefix_id,
    read_pairs,
    sentence_logprobs,
    sentences_of,
    tally,
)
from student.evaluation.report import EvaluationReport, HeldOutScores
from student.models.adapters.attach import inner_model
from student.models.configuration import positions_of, stated_columns
from student.models.loading import load_student
from student.models.tokenizer import model_folder, read_tokenizer
from student.report import HeldOutReport


def evaluate(job: EvaluationJob, track: Track = untracked, log: Log = silent) -> EvaluationReport:
    """Make the measurements of a job; everything that can be wrong with it is checked before the model runs.

    `track(name, total, unit)` opens a progress display and returns the function that advances it; `log` receives a line
    where ids are left out that only the model or only the cache has, or where the tokenizer has other rules than
    transformers applies.
    Raises InputError, IdentityMismatch (the cache has another tokenizer) and the errors of `DistillationWindows`.
    """
    job.check()
    device = _device(job.device)
    pairs = [] if job.pairs is None else read_pairs(job.pairs, job.limit)
    if job.lm_eval_tasks is not None:
        check_folder(job.lm_eval_tasks)
    tokenizer = read_tokenizer(model_folder(job.model) or local_path(job.model), job.model, log=log)
    if pairs and tokenizer is None:
        raise InputError(
            f"{job.model}: expected a tokenizer beside the model, to read sentences with, found none: "
            "save it there with save_pretrained"
        )
    windows = None
    if job.cache is not None:
        windows = DistillationWindows(
            job.cache,
            job.teachers,
            job.window_tokens,
            isolate_documents=job.isolate_documents,
            bos_each_window=job.bos_each_window,
        )
        named = max((entry.vocabulary_size for entry in windows.entries.values()), default=0)
        vocabulary = None if tokenizer is None else tokenizer.get_vocab()
        windows = windows.within(stated_columns(job.model), job.model, log, vocabulary, named)
    sentences = encode(tokenizer, sentences_of(pairs), job.leading_space) if pairs else []
    model = _load(job, sentences, tokenizer, windows, device)

    if job.lm_eval_tasks is not None:
        write_tasks(pairs, job.lm_eval_tasks, job.leading_space)
    held = scores = None
    if windows is not None:
        with track("held-out text", len(windows), "windows") as advance:
            held = _scores(held_out(model, windows, job.batch_size, advance))
    if pairs:
        with track("minimal pairs", len(sentences), "sentences") as advance:
            scores = tally(pairs, sentence_logprobs(model, sentences, job.batch_size, advance).view(-1, 2))
    return EvaluationReport(
        job=job,
        architecture=type(inner_model(model)).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        device=str(device),
        libraries={name: version(name) for name in ("torch", "transformers", "tokenizers")},
        prefix_token=str(tokenizer.convert_ids_to_tokens(prefix_id(tokenizer))) if pairs else None,
        held_out=held,
        minimal_pairs=scores,
    )


def _scores(found: HeldOutReport) -> HeldOutScores:
    bits = found.bits_per_byte
    nats = None if bits is None else bits * math.log(2)
    return HeldOutScores(
        tokens=found.tokens,
        cross_entropy_per_token=found.cross_entropy,
        perplexity_per_token=found.perplexity,
        cross_entropy_per_byte=nats,
        perplexity_per_byte=None if nats is None else float(torch.tensor(nats, dtype=torch.float64).exp()),
        bits_per_byte=bits,
        ece=found.ece,
        accuracy=found.accuracy,
        kl=found.kl,
        kl_not_measured=found.kl_not_measured,
    )


def _device(name: str | None) -> torch.device:
    asked = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(1, device=device).tolist()
    except Exception as error:  # every backend has its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"device {asked!r} cannot be used: {reason}: try --device cpu") from None
    return device


def _load(
    job: EvaluationJob,
    sentences: list[Sentence],
    tokenizer: Any,
    windows: DistillationWindows | None,
    device: torch.device,
) -> PreTrainedModel:
    """The model on its device in evaluation mode, checked against all that it will have to read."""
    longest = max((len(sentence) - 1 for sentence in sentences), default=1)
    needed = 1 + max((max(sentence) for sentence in sentences), default=0)
    if windows is not None:
        needed = max(needed, windows.vocabulary_size)
    # Each measurement has a progress bar of its own.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    names = ("bos", "eos", "pad")
    model: Any = load_student(
        str(local_path(job.model).resolve()),
        vocabulary_size=needed,
        special_ids={name: getattr(tokenizer, f"{name}_token_id", None) for name in names},
        window_tokens=1 if windows is None else windows.input_tokens,
        seed=0,
    )
    positions = positions_of(model.config)
    if positions is not None and positions < longest:
        raise InputError(
            f"{job.pairs}: its longest sentence has {longest} tokens, and {job.model} reads at most {positions}: "
            "leave out longer sentences, or take a model of more positions"
        )
    loaded: PreTrainedModel = model.to(device=device, dtype=getattr(torch, job.dtype)).eval()
    return loaded
