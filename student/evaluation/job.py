"""The job of `logit-cache evaluate`: a model and the measurements to make of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from storage.config import Settings
from storage.errors import InputError
from storage.files import local_path


class EvaluationJob(Settings):
    """A model, and the measurements to make of it.

    model              a model directory, with a tokenizer where pairs are scored
    cache              path or URL of a held-out token stream of the model's tokenizer
    teachers           entries of that cache to which the KL is measured
    pairs              folder of JSONL files with minimal pairs
    window_tokens      positions of a held-out window; a model that reads more context scores better
    isolate_documents  whether windows stay inside documents; None: as the teachers saw them, across without any
    bos_each_window    whether BOS is put before windows that start elsewhere; by default as for the teachers
    batch_size         windows, or sentences, in one pass at most
    limit              pairs per paradigm; all of them by default
    leading_space      whether a space is put in front of each sentence, as lm-eval's `blimp` does
    device, dtype      of the model as it runs; by default CUDA where there is one, and float32
    lm_eval_tasks      folder to write the pairs to as tasks for lm-eval
    """

    model: str
    cache: str | None = None
    teachers: tuple[str, ...] = ()
    pairs: str | None = None
    window_tokens: int = Field(128, ge=1)
    isolate_documents: bool | None = None
    bos_each_window: bool | None = None
    batch_size: int = Field(64, ge=1)
    limit: int | None = Field(None, ge=1)
    leading_space: bool = True
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lm_eval_tasks: str | None = None

    def check(self) -> None:
        """Raise InputError for fields that do not fit together or a missing model directory; needs no torch."""
        if self.cache is None and self.pairs is None:
            raise InputError(f"{self.model}: nothing to measure: give a held-out --cache, a folder of --pairs, or both")
        if self.teachers and self.cache is None:
            raise InputError(f"{self.model}: --teacher names entries of the held-out cache: give --cache too")
        if self.lm_eval_tasks is not None and self.pairs is None:
            raise InputError("--lm-eval-tasks writes the pairs of --pairs as tasks: give that folder too")
        if not local_path(self.model).is_dir():
            raise InputError(f"{self.model}: expected the directory of a saved model, found no directory there")
