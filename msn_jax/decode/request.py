"""What an engine is asked, and what became of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from msn_jax.config import DecodeConfig
from msn_jax.decode.stops import StopTexts
from msn_jax.io.loading import LM
from msn_jax.io.tokenizer import decode as to_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one prompt. The fields of a row of decode.py --out."""

    id: Any
    prompt_tokens: int
    tokens: list[int]  # generated ids, the stop token included, or the one that made a stop text whole
    text: str  # of the tokens, as it stands behind the prompt, up to a stop text; without special tokens
    finish_reason: str  # "stop" or "length"
    forwards: int  # model passes after prefill
    accepted: list[int]  # tokens that each pass emitted
    seconds: float  # in the loop, without compilation: the rows that run in a call share its time
    prefill_seconds: float  # for its own prompt; no row decodes meanwhile
    method: str
    logprobs: list[float] | None = None  # of each token, before any sampling setting; None: not asked for
    top_logprobs: list[list[tuple[int, float]]] | None = None  # (id, logprob) of the likeliest in its place

    def row(self) -> dict[str, Any]:
        """Its fields by name; log-probabilities only where they were asked for."""
        fields = dataclasses.asdict(self)
        asked = {name: value is not None for name, value in fields.items() if name.endswith("logprobs")}
        return {name: value for name, value in fields.items() if asked.get(name, True)}

    @property
    def mat(self) -> float:
        """Mean accepted tokens: tokens a pass."""
        return len(self.tokens) / self.forwards

    @property
    def tokens_per_s(self) -> float:
        return len(self.tokens) / self.seconds


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt on its way through an engine. `tokens` grows; the last fields are whole once it is finished."""

    prompt: list[int]
    decode: DecodeConfig  # its method, tree and batch size do not count: those of the engine do
    number: int = 0  # its noise is keyed by it, and by the seed
    id: Any = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    cancelled: bool = False  # set it to free the row for somebody else
    finish_reason: str | None = None  # "stop", "length" or "cancelled"; None: not finished
    accepted: list[int] = dataclasses.field(default_factory=list)  # tokens that each pass emitted
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    logprobs: list[float] = dataclasses.field(default_factory=list)  # where they are asked for, as in Result
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    prefill_tokens: int = 0  # tokens of the prompt that were read; its row knew the others already

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def end_at(self, tokens: int) -> None:
        """Keep so many tokens, the last of which makes a stop text whole."""
        passes = next(n for n in range(1, len(self.accepted) + 1) if sum(self.accepted[:n]) >= tokens)
        del self.accepted[passes:]
        self.accepted[-1] -= sum(self.accepted) - tokens
        del self.tokens[tokens:]
        self.finish_reason = "stop"


def result_of(lm: LM, request: Request, method: str) -> Result:
    """What became of a request that is finished."""
    asked, text = request.decode.logprobs is not None, to_text(lm.tokenizer, request.tokens, after=request.prompt)
    stops = StopTexts(request.decode.stop)
    return Result(
        id=request.id,
        prompt_tokens=len(request.prompt),
        tokens=request.tokens,
        text=stops.add(text)[0] + stops.flush(),
        finish_reason=request.finish_reason,
        forwards=len(request.accepted),
        accepted=request.accepted,
        seconds=request.seconds,
        prefill_seconds=request.prefill_seconds,
        method=method,
        logprobs=request.logprobs if asked else None,
        top_logprobs=request.top_logprobs if asked else None,
    )
