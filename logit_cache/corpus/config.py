"""The fields of `logit-cache tokenize`, as flags or a YAML file give them."""

from __future__ import annotations

import datetime
import json
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from logit_cache.corpus.conversations.template import RESERVED
from logit_cache.corpus.rows import Form
from logit_cache.corpus.tokenizer import BYTES, SPECIAL_TOKENS
from storage.config import Settings, name_values


def _only_a_date(value: Any) -> Any:
    """A date, or one that is written YYYY-MM-DD: pydantic takes numbers of seconds, too."""
    if isinstance(value, datetime.date) or (isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value)):
        return value
    raise ValueError("expected a date as YYYY-MM-DD")


def _json_value(text: str) -> Any:
    """The JSON value that a text is, true and false also with a capital; any other text is itself."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


class CorpusConfig(Settings):
    """The fields of `logit-cache tokenize`.

    text: sources (see `logit_cache.corpus.sources`), read in this order; source_column: the field of a row that names
    its source, for files that are not named by themselves.
    out: path or URL of the cache.
    tokenizer: a folder, a cache or a hub id; or train_tokenizer: the vocabulary size of a new one.
    special_tokens: further special tokens of a new one.
    chat_template: a file with a Jinja template, in place of the tokenizer's own, or the name of one of its own.
    template_variables: values for the template, a mapping or NAME=VALUE texts. date: that it may print.
    row_form: how rows are read that have the fields of several forms (`logit_cache.corpus.rows`). skip_bad_rows: leave
    out rows that cannot be read, and record their number.
    document_separator: plain text is cut into documents at this string, which is not tokenised; None: one document
    per file. append_token: a token of the vocabulary, appended to each document. bos: whether documents of text begin
    as the tokenizer begins a text; None: as the tokenizer does.
    """

    text: Annotated[tuple[str, ...], Field(min_length=1)]
    out: str
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    train_tokenizer: int | None = None
    special_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    chat_template: str | None = None
    document_separator: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    append_token: str | None = None
    bos: bool | None = None
    template_variables: dict[str, Any] = Field(default_factory=dict)
    date: Annotated[datetime.date, BeforeValidator(_only_a_date)] | None = None
    row_form: Form | None = None
    text_field: str = "text"
    messages_field: str = "messages"
    source_column: Annotated[str, Field(min_length=1)] | None = None
    split: str = "train"
    skip_bad_rows: bool = False
    trust_remote_code: bool = False

    @field_validator("template_variables", mode="before")
    @classmethod
    def _parse_variables(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple, str)):
            pairs = name_values(value, "--template-variable enable_thinking=false")
            value = {name: _json_value(text) for name, text in pairs.items()}
        clash = sorted(RESERVED & value.keys()) if isinstance(value, dict) else []
        if clash:
            raise ValueError(f"{clash[0]!r} is an input of every template, and no variable of yours")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"a template's variables are JSON values ({error})") from None
        return value

    @model_validator(mode="after")
    def _one_tokenizer(self) -> CorpusConfig:
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ValueError("give either --tokenizer or --train-tokenizer, not both and not neither")
        least = BYTES + len(SPECIAL_TOKENS) + len(set(self.special_tokens) - set(SPECIAL_TOKENS))
        if self.train_tokenizer is not None and self.train_tokenizer < least:
            raise ValueError(
                f"--train-tokenizer {self.train_tokenizer}: a byte-level vocabulary has at least {least} ids, "
                f"256 bytes and {least - BYTES} special tokens"
            )
        if self.special_tokens and self.train_tokenizer is None:
            raise ValueError("--special-token goes with --train-tokenizer; a finished tokenizer has its own")
        return self
