"""A model behind one or several servers as a teacher: which one it is, and its rows in the form of the reducer's.

A server tells names, never weights. So a model is known again by its answers: the log-probs that it gives the first
tokens of the stream are recorded, and whoever answers for it later, after a restart or as one server of several, must
give them again, within the noise of asking twice. That finds another model under the same name; that the weights are
those which the name promises, it cannot find.

The log-probs are sums of float32 over all columns of the model's head, padding included: what lies in columns without
an id counts as mass outside the stored ids. That mass is one less the sum of theirs, so it is off by what the
normaliser is off, at most `FLOAT32_MASS_ERROR`, which the entry records; one below `_LEAST_MASS` is not told from it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from storage.errors import IdentityMismatch, InputError
from storage.format.encoding import FLOAT32_MASS_ERROR
from storage.format.manifest.teacher import MOST_PROBES, ServedIdentity
from storage.format.manifest.teacher import Teacher as TeacherRecord
from storage.text import printable
from teachers.reduction.reduce import ReducedRows
from teachers.served.fleet import Fleet
from teachers.served.protocols import (
    BESIDE_WINDOW,
    PROTOCOLS,
    Prompt,
    Protocol,
    ServedRows,
    WrongAnswer,
    rows_of,
)
from teachers.served.server import Refused, Server

Key = TypeVar("Key")

_LEAST_MASS = 2.0**-20
# Nats, in the mean over the probe: half precision moves single log-probs by about as much, other weights by more.
_SAME_WEIGHTS = 0.05
_NOISE_FACTOR = 3.0
_LEAST_PROBE = -1e4
# Of an answer: an id, its log-prob, its rank, and its text, which may be a long one.
_MOST_BYTES_AN_ID = 1 << 10
_PROBE_TEXTS = ("The quick brown fox, 1234.5!", " def f(x):\n    return x", "naïve Übergröße — 漢字 🙂", "\t a  b\n\n")
_STREAM_TEXTS, _STREAM_TOKENS = 8, 64


class ServedTeacher:
    """One model behind servers, asked for `k` ids a row.

    device         where its rows appear
    max_positions  the longest window that the servers read; None where none says
    versions       of the engine, for the entry's `created_with`
    """

    device = torch.device("cpu")

    def __init__(self, fleet: Fleet, model: str, about: list[_About], k: int) -> None:
        self._fleet, self._model, self._k = fleet, model, k
        self._about = about[0]
        self.protocol = about[0].protocol
        limits = [each.max_model_len for each in about if each.max_model_len is not None]
        self.max_positions = min(limits) - BESIDE_WINDOW if limits else None
        self.versions: dict[str, str] = {
            self.protocol.engine: " + ".join(dict.fromkeys(each.version for each in about))
        }
        self._tokenizer_compared = False
        self._probe: tuple[Prompt, NDArray[np.float64], float] | None = None

    @classmethod
    def connect(
        cls,
        urls: Sequence[str],
        model: str | None,
        k: int,
        each: int = 16,
        seconds: float = 300.0,
        patience: float = 60.0,
    ) -> ServedTeacher:
        """The teacher that servers serve under a name, which need not be given where it is their only one.

        each: requests in flight at a server; seconds: for one request; patience: for servers that do not answer, also
        for one that is not up yet. Raises InputError for servers of another kind or of several models, ServersLost.
        """
        fleet = Fleet([Server(url, each, seconds) for url in urls], each, patience)
        about = [_about(fleet, server, model) for server in fleet.servers]
        for url, other in zip(urls, about, strict=True):
            if (other.name, other.protocol) != (about[0].name, about[0].protocol):
                raise InputError(
                    f"{url}: serves {other.name} by {other.protocol.engine}, {urls[0]} {about[0].name} by "
                    f"{about[0].protocol.engine}: servers that share a job serve one model"
                )
        return cls(fleet, about[0].name, about, k)

    def check_context(self, context_tokens: int, begun: bool = False) -> None:
        """Raise InputError if windows of `context_tokens`, begun with BOS if `begun`, exceed what the servers read."""
        if self.max_positions is not None and context_tokens + begun > self.max_positions:
            needed = context_tokens + begun + BESIDE_WINDOW
            raise InputError(
                f"{self._url}: reads at most {self.max_positions + BESIDE_WINDOW} tokens at once (its max_model_len), "
                f"and a context of {context_tokens}{' and BOS before it' if begun else ''} needs {needed}: the token "
                f"after it, and one that is generated: start it with {self.protocol.longer_context} {needed}, or take "
                f"a context of {self.max_positions - begun} or less"
            )

    def check_tokenizer(self, tokenizer: Any, stream: NDArray[np.int64], remedy: str) -> None:
        """Raise IdentityMismatch where the ids that a server gives a text are another text in the stream's tokenizer.

        tokenizer: of transformers; stream: int64 [n], tokens from all over it, whose texts are sent too. Prompts are
        ids, so only which id is which string counts: a server may cut a text otherwise, as transformers' own class for
        a family does where a tokenizer.json has other rules. One without such an endpoint is not checked, which is
        logged and recorded.
        """

        def decoded(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

        pieces = [stream[first : first + _STREAM_TOKENS] for first in range(0, len(stream), _STREAM_TOKENS)]
        texts = (*_PROBE_TEXTS, *(tokenizer.decode(piece.tolist(), skip_special_tokens=True) for piece in pieces))
        for server in self._fleet.servers:
            for text in filter(None, texts):
                theirs = self._tokenize(server, text)
                if theirs is None:
                    logging.getLogger(__name__).warning(
                        f"{server.url}: does not tokenize, so its tokenizer was not compared with that of the cache"
                    )
                    return
                # Not the text itself, which a normaliser may change.
                if decoded(theirs) != decoded(tokenizer(text, add_special_tokens=False)["input_ids"]):
                    shown = f"{text[:24]!r} is {_few(theirs)} there, which is {decoded(theirs)[:24]!r} here"
                    raise IdentityMismatch(f"{server.url}: its tokenizer is not the cache's", [shown], remedy)
        self._tokenizer_compared = True

    def _tokenize(self, server: Server, text: str) -> list[int] | None:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        for path in self.protocol.tokenize:
            try:
                found = self._fleet.patiently(server, partial(server.post, path, body))
            except Refused as refused:
                if refused.status not in (404, 405):
                    raise
                continue
            ids = found.get("tokens") if isinstance(found, dict) else None
            if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < 1 << 31 for each in ids):
                raise InputError(f"{server.url}: expected the ids of a text from {path}, found {str(found)[:80]!r}")
            return ids
        return None

    def identify(self, stream: NDArray[np.int64], recorded: ServedIdentity | None) -> TeacherRecord:
        """Who answers: asked twice for the first tokens of the stream, int64 [n], at every server.

        Where that is what was `recorded`, within the noise, the record is. Finds caps on log-probs, too. Raises
        InputError where a server refuses, gives no log-probs, or gives others than the first one.
        """
        ids = stream[: MOST_PROBES + 1]
        prompt = Prompt(ids, np.arange(len(ids) - 1))
        first, noise = None, 0.0
        for server in self._fleet.servers:
            for _ in range(2):
                found = self._fleet.patiently(server, partial(self._probed, server, prompt))
                if first is None:
                    first = found
                elif server is self._fleet.servers[0]:
                    noise = _distance(found, first)
                else:
                    self._same(server, found, first, noise)
        assert first is not None
        probe = tuple(float(np.float32(value)) for value in first)
        known = np.array(recorded.probe if recorded is not None else ())
        if len(known) == len(probe) and _distance(known, first) <= _limit(noise):
            probe = tuple(known.tolist())
        self._probe = prompt, np.array(probe), noise
        identity = ServedIdentity(
            source=_public(self._model),
            model=None if self._about.root is None else _public(self._about.root),
            engine=self.protocol.engine,
            tokenizer="compared on probes" if self._tokenizer_compared else "not compared",
            probe=probe,
            mass_error=FLOAT32_MASS_ERROR,
        )
        return TeacherRecord(members=(identity,))

    def _probed(self, server: Server, prompt: Prompt) -> NDArray[np.float64]:
        """The log-probs of a prompt's own tokens; records hold no infinity, which a masked id has."""
        found: NDArray[np.float64] = np.maximum(self._ask(server, prompt).label_logprob, _LEAST_PROBE)
        return found

    def _same(self, server: Server, found: NDArray[np.float64], first: NDArray[np.float64], noise: float) -> None:
        distance = _distance(found, first)
        if distance > _limit(noise):
            raise InputError(
                f"{server.url}: serves another model than this job's {self._model}: its log-probs of {len(first)} "
                f"tokens are {distance:.3g} nats from those, at most {_limit(noise):.3g} expected: restart it with the "
                f"job's model, or cache this one under another --name"
            )

    def known_again(self, server: Server) -> None:
        """Raise InputError where a server that was away has come back as another one."""
        assert self._probe is not None
        prompt, first, noise = self._probe
        self._same(server, self._probed(server, prompt), first, noise)

    def rows(self, prompts: Iterable[tuple[Prompt, Key]]) -> Iterator[tuple[Key, ServedRows] | None]:
        """The rows of each prompt, as they come; None while there are none. Raises InputError, ServersLost."""
        for answer in self._fleet.answers(prompts, lambda server, item: self._ask(server, item[0]), self.known_again):
            yield None if answer is None else (answer[0][1], answer[1])

    def _ask(self, server: Server, prompt: Prompt) -> ServedRows:
        body = self.protocol.body(self._model, prompt.ids.tolist(), self._k)
        try:
            most = len(prompt.ids) * (self._k + 1) * _MOST_BYTES_AN_ID
            answer = server.post(self.protocol.generate, body, max(most, 1 << 20))
            return rows_of(self.protocol, answer, prompt, self._k)
        except WrongAnswer as error:
            raise InputError(
                f"{server.url}: expected the log-probs of {self._k} ids for each token of a prompt, found {error}: "
                f"start it as {self.protocol.engine} itself does, without other settings of log-probs"
            ) from None
        except Refused as error:
            said = error.reason.lower()
            if "logprob" in said:
                raise InputError(
                    f"{server.url}: gives fewer log-probs than -k {self._k} ({error.reason}): start it with "
                    f"{self.protocol.more_logprobs} {self._k}, or take a smaller -k"
                ) from None
            if "length" in said or "context" in said:
                raise InputError(
                    f"{server.url}: cannot read a window and {BESIDE_WINDOW} tokens more ({error.reason}): start it "
                    f"with {self.protocol.longer_context} {len(prompt.ids) + 1}, or take shorter windows"
                ) from None
            raise

    @property
    def _url(self) -> str:
        return self._fleet.servers[0].url


class _Card(BaseModel):
    """What a server says of one of its models; all else of it is ignored."""

    id: Annotated[str, Field(min_length=1, max_length=1024)]
    owned_by: str | None = None
    root: Annotated[str, Field(max_length=1024)] | None = None
    max_model_len: Annotated[int, Field(ge=1)] | None = None


class _Cards(BaseModel):
    data: list[_Card]


@dataclass(frozen=True)
class _About:
    """What a server says of itself."""

    name: str
    root: str | None
    protocol: Protocol
    version: str
    max_model_len: int | None


def _about(fleet: Fleet, server: Server, wanted: str | None) -> _About:
    try:
        said = _Cards.model_validate(fleet.patiently(server, partial(server.get, "v1/models")))
    except (ValidationError, Refused) as error:
        if isinstance(error, Refused) and error.status != 404:
            raise
        raise InputError(
            f"{server.url}: lists no models at {server.root}/v1/models: give the address of a vLLM or SGLang server, "
            f"such as http://HOST:8000/v1"
        ) from None
    cards = {card.id: card for card in said.data}
    names = printable(", ".join(cards)[:1000])
    if wanted is None and len(cards) != 1:
        raise InputError(f"{server.url}: serves several models: name one of them with --served-model: {names}")
    name = wanted or said.data[0].id
    if name not in cards:
        raise InputError(f"{server.url}: serves no {name}: give --served-model one of: {names}")
    card = cards[name]
    protocol = next((each for engine, each in PROTOCOLS.items() if engine == card.owned_by), None)
    if protocol is None:
        raise InputError(
            f"{server.url}: is neither vLLM nor SGLang (its models are owned by {card.owned_by!r}): other servers give "
            f"no log-probs of a prompt's tokens"
        )
    return _About(name, card.root, protocol, _version(fleet, server, protocol), card.max_model_len)


def _version(fleet: Fleet, server: Server, protocol: Protocol) -> str:
    for path in protocol.versions:
        try:
            found = fleet.patiently(server, partial(server.get, path))
        except Refused:
            continue
        if isinstance(found, dict) and found.get("version"):
            return printable(str(found["version"])[:64])
    return "unknown"


def stream_samples(read: Callable[[int, int], NDArray[Any]], positions: int) -> NDArray[np.int64]:
    """Tokens from all over a stream of so many positions, int64 [n], for `ServedTeacher.check_tokenizer`.

    read: start, stop → the tokens between them.
    """
    starts = np.unique(np.linspace(0, max(0, positions - _STREAM_TOKENS), _STREAM_TEXTS, dtype=np.int64))
    return np.concatenate([read(int(start), min(int(start) + _STREAM_TOKENS, positions)) for start in starts]).astype(
        np.int64
    )


def reduced_rows(rows: ServedRows, has_label: NDArray[np.bool_], vocabulary_size: int, floor: float) -> ReducedRows:
    """The rows as the reducer would have made them, with NaN for what a server does not tell.

    has_label: bool [r], whether the token behind a row is its label. floor: nats; lower values are stored as it.
    Raises InputError for ids from `vocabulary_size` on.
    """
    count, k = rows.token_ids.shape
    if count and int(rows.token_ids.max()) >= vocabulary_size:
        raise InputError(
            f"the server gives id {int(rows.token_ids.max())} as a likely one, and the cache's tokenizer has "
            f"{vocabulary_size} ids: the model has another tokenizer, or was not trained on its padding: take a "
            f"smaller -k, or make a cache with its tokenizer"
        )
    log_tail = np.full(count, -math.inf) if k == vocabulary_size else log_mass_outside(rows.logprobs)

    def floats(values: NDArray[np.float64]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32))

    unknown = np.full(count, math.nan)
    return ReducedRows(
        token_ids=torch.from_numpy(rows.token_ids),
        logprobs=floats(np.maximum(rows.logprobs, floor)),
        kept=torch.full((count,), k),
        certain=torch.full((count,), k),
        log_tail=floats(log_tail),
        log_tail_half=floats(unknown),
        label_logprob=floats(np.where(has_label, np.maximum(rows.label_logprob, floor), math.nan)),
        entropy=floats(unknown),
    )


def log_mass_outside(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    """log of the mass [r] outside ids of these log-probs [r, K], -inf in columns that do not count."""
    found: NDArray[np.float64] = np.log(np.maximum(1 - np.exp(logprobs).sum(axis=1), _LEAST_MASS))
    return found


def _distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(np.abs(one - other).mean()) if len(one) else 0.0


def _limit(noise: float) -> float:
    return max(_SAME_WEIGHTS, _NOISE_FACTOR * noise)


def _public(name: str) -> str:
    """A hub id, or the last part of a path: records hold no paths."""
    return name.rstrip("/").rsplit("/", 1)[-1] if name.startswith(("/", ".", "~")) or name.count("/") > 1 else name


def _few(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:6]))}{', …' if len(ids) > 6 else ''}]"
