"""The OpenAI protocol: what requests may say, and the objects that answer them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from msn_jax.config import MOST_LOGPROBS

# What changes no token here, and so may be given.
WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
)
# What is accepted only as if it were not given.
NEUTRAL = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "best_of": 1,
    "echo": False,
    "suffix": "",
}


class Refused(Exception):
    """An error in the protocol's form."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", param=None, code=None):
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of requests may say. `top_k`, `min_p` and `repetition_penalty` are extensions."""

    model_config = ConfigDict(extra="allow")
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    seed: int | None = None
    n: int | None = Field(None, ge=1, le=128)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _nothing_is_ignored(self):
        for name, value in (self.model_extra or {}).items():
            if name in WITHOUT_EFFECT or (name in NEUTRAL and (value is None or value == NEUTRAL[name])):
                continue
            if name in NEUTRAL:
                raise ValueError(f"{name} is not supported here")
            raise ValueError(f"{name} is no parameter of this request")
        if len(self.stops) > 16 or not all(self.stops):
            raise ValueError("stop is up to 16 texts, none of them empty")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def settings(self) -> dict[str, Any]:
        """Fields of DecodeConfig. The protocol's own defaults: temperature 1, and without a seed each draw another."""
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": self.top_k or 0,
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "stop": self.stops,
            "logprobs": self.alternatives,
            "seed": (int.from_bytes(os.urandom(4)) if self.seed is None else self.seed) % 2**32,
        }


class Part(BaseModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: str
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": self.role, "content": "\n".join(parts)}


class ChatAsked(Asked):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _top_needs_logprobs(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def alternatives(self) -> int | None:
        """Likeliest tokens whose log-probabilities are wanted beside each token's own; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionAsked(Asked):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def alternatives(self) -> int | None:
        """As of ChatAsked."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        several = isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int))
        return self.prompt if several else [self.prompt]


def usage(prompt_tokens: int, tokens: int, passes: int | None) -> dict[str, Any]:
    """passes: of the model, None where they are not known; tokens_per_pass is an extension."""
    counted = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }
    return counted | ({"tokens_per_pass": round(tokens / passes, 3)} if passes else {})


Logprob = tuple[int, float, list[tuple[int, float]]]  # id, log-probability, and the likeliest in its place


def chat_logprobs(new: list[Logprob], text_of: Callable[[int], str]) -> dict[str, Any]:
    """Log-probabilities of new tokens as chat completions spell them. text_of: of an id."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = text_of(token)
        whole = "\ufffd" not in text  # or a part of a character
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    content = [entry(token, logprob) | {"top_logprobs": [entry(*one) for one in top]} for token, logprob, top in new]
    return {"content": content, "refusal": None}


def completion_logprobs(new: list[Logprob], text_of: Callable[[int], str], offset: int) -> dict[str, Any]:
    """The same as completions spell them. offset: characters before the first of the tokens."""
    tokens = [text_of(token) for token, _, _ in new]
    return {
        "tokens": tokens,
        "token_logprobs": [logprob for _, logprob, _ in new],
        "top_logprobs": [{text_of(token): logprob for token, logprob in top} for _, _, top in new],
        "text_offset": [offset + sum(map(len, tokens[:n])) for n in range(len(tokens))],
    }
