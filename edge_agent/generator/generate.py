"""A prompt in, text out, piece by piece, and why it ended.

The rule: every limit is known here, before the graph. A prompt that leaves no position is refused, or cut at its
beginning if that is asked for; generation stops at the end of the position table and says so. What was read stays in
the cache, so that the next turn of a conversation reads only what is new. A seed gives the same text from a generator
in the same state: what is read at once and what is read bit by bit differ by rounding, which may turn a drawn token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.dataset import load_encoder
from edge_agent.generator.decoding import Decoding
from edge_agent.generator.sampling import Sampler, Sampling
from edge_agent.generator.text import Detokenizer, StopStrings
from fedge.errors import DataError, UsageError

Floats = NDArray[np.float32]
_PROMPT_SHARE_MIN: Final = 2  # a cut prompt keeps at least one part in so many of the position table


class Ending(StrEnum):
    """Why generation stopped."""

    EOS = "end of text"
    STOP = "stop string"
    MAX_TOKENS = "max tokens"
    POSITIONS = "end of the position table"


@dataclass(frozen=True, slots=True)
class Request:
    """What is wanted beside the prompt. `long` says what happens to a prompt that leaves no room: refuse it, or cut
    its beginning off. `stop_ids` end the text as its own end does."""

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    long: Literal["refuse", "cut"] = "refuse"

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError("max-tokens must be at least 1", field="max-tokens", value=self.max_tokens)
        if self.long not in ("refuse", "cut"):
            raise UsageError("a long prompt is refused or cut", field="long", value=self.long)


class Generator:
    """A bundle that writes. Not for use by several threads."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 1,
        adapter: Mapping[str, Floats] | None = None,
        pause: Callable[[], None] | None = None,
    ) -> None:
        self.encoder: Final = load_encoder(bundle.tokenizer)
        self.decoding: Final = Decoding(bundle, threads=threads, adapter=adapter, pause=pause)
        self._eos = bundle.manifest.eos_id
        rows = bundle.manifest.vocabulary
        # A table may have more rows than the tokenizer has tokens.
        self._silent = np.array([not self.encoder.stands_for_text(i) for i in range(rows)])
        self._silent[self._eos] = False
        self._read: list[int] = []  # what the cache holds
        self._reader: Stream | None = None  # for whom

    def stream(self, prompt: str | list[int], request: Request | None = None) -> Stream:
        """Generation after `prompt`, text or ids, which begins when it is iterated over.

        Raises DataError for a prompt that is empty or, unless it may be cut, too long for the position table.
        """
        request = request or Request()
        ids = [*self.encoder.before, *self.encoder(prompt)] if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise DataError("there is no prompt", field="prompt", value=prompt)
        return Stream(self, *self._fitted(ids, request), request)

    def _fitted(self, ids: list[int], request: Request) -> tuple[list[int], int]:
        """The prompt as it will be read, and how many tokens were cut off at its beginning."""
        limit = self.decoding.positions_max
        if len(ids) < limit:
            return ids, 0
        if request.long == "refuse":
            raise DataError(
                "prompt fills the model's position table, nothing can follow it",
                field="tokens",
                value=len(ids),
                hint=f"The table has {limit} positions: shorten the prompt, or have its beginning cut off",
            )
        room = max(limit - request.max_tokens, limit // _PROMPT_SHARE_MIN, 1)
        return ids[-room:], len(ids) - room

    def begin(self, stream: Stream, ids: list[int]) -> Floats:
        """Logits after the last of `ids`; only what differs from what was read before is read."""
        common = 0
        for old, new in zip(self._read, ids[:-1], strict=False):
            if old != new:
                break
            common += 1
        self.decoding.keep(common)
        del self._read[common:]
        self._reader = None
        logits = self.decoding.read(ids[common:])
        self._read, self._reader = list(ids), stream
        return logits

    def go_on(self, stream: Stream, token: int) -> Floats:
        """Logits after one more token. Streams may take turns; each then finds its own text again."""
        if self._reader is not stream:
            return self.begin(stream, [*stream.prompt, *stream.ids])
        self._read.append(token)
        return self.decoding.read([token])

    def sampler(self, sampling: Sampling, seen: list[int]) -> Sampler:
        """Chooses among the ids that stand for text."""
        return Sampler(sampling, self._silent, seen)

    def ends(self, token: int, request: Request) -> bool:
        """Whether this token ends the text."""
        return token == self._eos or token in request.stop_ids


class Stream:
    """Iterate over it for text; `ending`, `ids` and `text` are then what came of it.

    `cut` tokens of the prompt were left out. A stream that is left early leaves the generator as it should be.
    """

    def __init__(self, generator: Generator, prompt: list[int], cut: int, request: Request) -> None:
        self.prompt, self.cut, self.request = prompt, cut, request
        self.ids: list[int] = []
        self.text = ""
        self.ending: Ending | None = None
        self._generator = generator
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def finish(self) -> Stream:
        """Itself, when all has been generated."""
        for _ in self:
            pass
        return self

    def _run(self) -> Iterator[str]:
        stops = StopStrings(self.request.stop)
        words = Detokenizer(self._generator.encoder.plain_text, self.prompt)
        for token in self._tokens():
            yield from self._shown(stops.push(words.push(token)))
            if stops.met is not None:
                self.ending = Ending.STOP
                return
        yield from self._shown(stops.push(words.finish()) + stops.finish())
        if stops.met is not None:
            self.ending = Ending.STOP

    def _tokens(self) -> Iterator[int]:
        generator, request = self._generator, self.request
        sampler = generator.sampler(request.sampling, self.prompt)
        room = generator.decoding.positions_max - len(self.prompt)
        logits = generator.begin(self, self.prompt)
        while True:
            token = sampler.choose(logits)
            if generator.ends(token, request):
                self.ending = Ending.EOS
                return
            self.ids.append(token)
            yield token
            if len(self.ids) >= min(room, request.max_tokens):
                self.ending = Ending.POSITIONS if room < request.max_tokens else Ending.MAX_TOKENS
                return
            logits = generator.go_on(self, token)

    def _shown(self, piece: str) -> Iterator[str]:
        if piece:
            self.text += piece
            yield piece
