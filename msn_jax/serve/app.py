"""The routes of the server: requests of the OpenAI protocol become requests of an engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.exceptions import HTTPException
from starlette.requests import Request as Http

from msn_jax.config import DecodeConfig
from msn_jax.decode.prompts import encode
from msn_jax.decode.request import Request
from msn_jax.decode.stops import StopTexts
from msn_jax.errors import InputError
from msn_jax.io.loading import LM
from msn_jax.io.tokenizer import TextStream
from msn_jax.serve.protocol import (
    ChatAsked,
    CompletionAsked,
    Logprob,
    Refused,
    chat_logprobs,
    completion_logprobs,
    usage,
)
from msn_jax.serve.worker import FAILED, Busy, Worker

MOST_BYTES = 2**22  # of a request's body
LOOK_S = 0.2  # between two looks whether a client is still there
COMPLETION_TOKENS = 16  # the protocol's default of /v1/completions


@dataclasses.dataclass
class Choice:
    """One of the replies to a request."""

    request: Request
    text: TextStream
    stops: StopTexts
    finish_reason: str | None = None
    tokens: int = 0
    told: int = 0  # tokens whose log-probabilities have been given away
    offset: int = 0  # characters of their texts

    def new_logprobs(self) -> list[Logprob] | None:
        """Of the tokens since the last call; None where nobody asked for them."""
        request, new = self.request, slice(self.told, self.tokens)
        if request.decode.logprobs is None:
            return None
        self.told = self.tokens
        return list(zip(request.tokens[new], request.logprobs[new], request.top_logprobs[new], strict=True))

    def add(self, ids: list[int], reason: str | None) -> str:
        """The text that new ids make; sets why it ended, where it did."""
        if self.finish_reason is not None:
            return ""
        if reason == FAILED:
            raise Refused(500, "the model failed over this request", "server_error")
        self.tokens += len(ids)
        piece = self.text.add(ids) + (self.text.flush() if reason else "")
        shown, cut = self.stops.add(piece)
        if cut:
            self.finish_reason, self.request.cancelled = "stop", True
        elif reason:
            self.finish_reason = reason
            shown += self.stops.flush()
        return shown


@dataclasses.dataclass
class Answer:
    """The replies to one request as they come. Close it, or the rows go on for nobody."""

    worker: Worker
    choices: list[Choice]

    def __post_init__(self):
        loop, self._news = asyncio.get_running_loop(), asyncio.Queue()

        def tell_of(index: int) -> Callable:
            put = lambda *news: self._news.put_nowait((index, *news))
            return lambda ids, reason: loop.call_soon_threadsafe(put, ids, reason)

        self.worker.submit([c.request for c in self.choices], [tell_of(i) for i in range(len(self.choices))])

    async def pieces(self) -> AsyncIterator[tuple[int, str]]:
        """(index of the choice, new text), the last one of a choice when it has its finish_reason."""
        try:
            while not all(choice.finish_reason for choice in self.choices):
                index, ids, reason = await self._news.get()
                before = self.choices[index].finish_reason
                text = self.choices[index].add(ids, reason)
                if text or self.choices[index].finish_reason != before:
                    yield index, text
        finally:
            self.close()

    def close(self) -> None:
        for choice in self.choices:
            choice.request.cancelled = choice.request.cancelled or not choice.request.finished

    def usage(self) -> dict[str, Any]:
        prompt_tokens = sum(len(c.request.prompt) for c in self.choices if c.request.number == 0)
        whole = all(c.request.accepted for c in self.choices)  # none was cut at a stop text
        passes = sum(len(c.request.accepted) for c in self.choices) if whole else None
        return usage(prompt_tokens, sum(c.tokens for c in self.choices), passes)


class Server:
    """What the routes share."""

    def __init__(self, lm: LM, worker: Worker, name: str, api_key: str | None):
        self.lm, self.worker, self.name, self.api_key = lm, worker, name, api_key
        self.began = int(time.time())
        self.registry = CollectorRegistry()
        self.answered = Counter("msn_jax_requests", "Requests answered.", ["path", "status"], registry=self.registry)
        self.registry.register(self)

    def collect(self):
        """Figures of the engine, for the registry."""
        worker, engine = self.worker, self.worker.engine
        for name, what, value in (
            ("msn_jax_running", "Replies that have a row.", engine.running),
            ("msn_jax_waiting", "Replies that wait for one.", engine.waiting),
            ("msn_jax_cache_slots", "Slots of the cache for each row.", engine.slots),
        ):
            yield GaugeMetricFamily(name, what, value)
        for name, what, value in (
            ("msn_jax_prompt_tokens", "Tokens of prompts.", worker.prompt_tokens),
            ("msn_jax_generated_tokens", "Tokens of replies.", worker.tokens),
            ("msn_jax_passes", "Model passes of replies that came to their end.", worker.passes),
        ):
            yield CounterMetricFamily(name, what, value)

    def check_key(self, http: Http) -> None:
        given = http.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.api_key is not None and not hmac.compare_digest(given, self.api_key.encode()):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    def ask(self, asked: ChatAsked | CompletionAsked, prompts: Sequence, most: int | None) -> Answer:
        """Have every prompt answered `n` times. most: new tokens, None for all that the context has room for."""
        if asked.model != self.name:
            what = f"the model {asked.model!r} does not exist here; accepted: {self.name}"
            raise Refused(404, what, param="model", code="model_not_found")
        choices, settings = [], asked.settings()
        for prompt in prompts:
            ids = encode(self.lm, prompt)
            room = self.lm.context - len(ids)
            new_tokens = room if most is None else most
            if not 1 <= new_tokens <= room:
                message = f"the prompt has {len(ids)} tokens, with {max(new_tokens, 1)} new ones more than the context"
                message = f"{message} of {self.lm.context}"
                raise Refused(400, message, param="max_tokens", code="context_length_exceeded")
            decode = DecodeConfig(max_new_tokens=new_tokens, **settings)
            for number in range(asked.n or 1):
                stops = StopTexts(asked.stops)
                choices.append(Choice(Request(ids, decode, number), TextStream(self.lm.tokenizer, after=ids), stops))
        if not choices:
            raise Refused(400, "no prompt", param="prompt")
        try:
            return Answer(self.worker, choices)
        except Busy:
            raise Refused(429, "too many requests wait; try again later", "rate_limit_error") from None


@dataclasses.dataclass
class Form:
    """How one of the two routes spells its answers."""

    server: Server
    prefix: str
    kind: str
    streamed_kind: str
    piece: Callable[[str, bool], dict]  # of a text, and whether it is the first of its choice
    whole: Callable[[str], dict]
    spelled: Callable[[list[Logprob], Callable[[int], str], int], dict]  # of new tokens, after so many characters

    def __post_init__(self):
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.server.name}

    def object(self, kind: str, choices: list[dict], **more) -> dict:
        return {**self.head, "object": kind, "choices": choices, **more}

    def logprobs(self, choice: Choice) -> dict | None:
        """Of the tokens that came since it was last asked."""
        text_of = lambda token: self.server.lm.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        new = choice.new_logprobs()
        if new is None:
            return None
        before = choice.offset
        choice.offset += sum(len(text_of(token)) for token, _, _ in new)
        return self.spelled(new, text_of, before)

    async def respond(self, http: Http, asked: ChatAsked | CompletionAsked, answer: Answer) -> Response:
        if asked.stream:
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return StreamingResponse(self.events(answer, with_usage), media_type="text/event-stream")
        texts = [""] * len(answer.choices)

        async def read() -> None:
            async for index, text in answer.pieces():
                texts[index] += text

        reading = asyncio.create_task(read())
        try:
            while not (await asyncio.wait([reading], timeout=LOOK_S))[0]:
                if await http.is_disconnected():
                    return Response(status_code=499)  # to nobody
            await reading
        finally:
            reading.cancel()
            answer.close()
        choices = [
            {"index": i, "logprobs": self.logprobs(c), "finish_reason": c.finish_reason, **self.whole(text)}
            for i, (text, c) in enumerate(zip(texts, answer.choices, strict=True))
        ]
        return JSONResponse(self.object(self.kind, choices, usage=answer.usage()))

    async def events(self, answer: Answer, with_usage: bool) -> AsyncIterator[str]:
        event = lambda data: f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
        begun, none = set(), {"usage": None} if with_usage else {}
        try:
            async for index, text in answer.pieces():
                told = answer.choices[index]
                head = {"index": index, "logprobs": self.logprobs(told), "finish_reason": told.finish_reason}
                choice = head | self.piece(text, index not in begun)
                begun.add(index)
                yield event(self.object(self.streamed_kind, [choice], **none))
            if with_usage:
                yield event(self.object(self.streamed_kind, [], usage=answer.usage()))
            yield "data: [DONE]\n\n"
        except Refused as e:  # the status has been sent
            yield event(e.body)
        finally:
            answer.close()


def chat_form(server: Server) -> Form:
    said = lambda text, first: {"delta": ({"role": "assistant"} if first else {}) | {"content": text}}
    whole = lambda text: {"message": {"role": "assistant", "content": text}}
    spelled = lambda new, text_of, _: chat_logprobs(new, text_of)
    return Form(server, "chatcmpl", "chat.completion", "chat.completion.chunk", said, whole, spelled)


def completion_form(server: Server) -> Form:
    kind, piece, whole = "text_completion", lambda text, _: {"text": text}, lambda text: {"text": text}
    return Form(server, "cmpl", kind, kind, piece, whole, completion_logprobs)


class Guard:
    """Around all routes: bodies are read up to a bound, and replies counted."""

    def __init__(self, app, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body, more = b"", True

        async def again():
            nonlocal body
            if body is None:
                return await receive()
            message, body = {"type": "http.request", "body": body, "more_body": False}, None
            return message

        async def noted(message):
            if message["type"] == "http.response.start":
                known = scope.get("route")  # or paths that nobody serves would fill the memory
                self.server.answered.labels(known.path if known else "other", message["status"]).inc()
            await send(message)

        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > MOST_BYTES:
                too_large = Refused(413, f"the request has more than {MOST_BYTES} bytes")
                return await JSONResponse(too_large.body, 413, {"connection": "close"})(scope, receive, noted)
        await self.app(scope, again, noted)


def make_app(lm: LM, worker: Worker, name: str, api_key: str | None = None) -> FastAPI:
    """The application around a worker, which it starts, and stops when what runs is done. name: of the model."""
    server = Server(lm, worker, name, api_key)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        worker.start()
        await asyncio.to_thread(worker.warm)
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, server=server)

    @app.exception_handler(Refused)
    async def refused(_: Http, e: Refused):
        return JSONResponse(e.body, e.status)

    @app.exception_handler(InputError)
    async def input_error(_: Http, e: InputError):
        return JSONResponse(Refused(400, str(e)).body, 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Http, e: RequestValidationError):
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"][1:]))
        message = first["msg"].removeprefix("Value error, ")
        return JSONResponse(Refused(400, f"{where}: {message}" if where else message, param=where or None).body, 400)

    @app.exception_handler(HTTPException)
    async def http_error(_: Http, e: HTTPException):
        return JSONResponse(Refused(e.status_code, str(e.detail)).body, e.status_code)

    @app.exception_handler(Exception)
    async def failed(_: Http, e: Exception):
        return JSONResponse(Refused(500, "the server failed over this request", "server_error").body, 500)

    @app.post("/v1/chat/completions")
    async def chat(http: Http, asked: ChatAsked):
        server.check_key(http)
        most = asked.max_completion_tokens or asked.max_tokens
        answer = server.ask(asked, [[message.plain() for message in asked.messages]], most)
        return await chat_form(server).respond(http, asked, answer)

    @app.post("/v1/completions")
    async def completions(http: Http, asked: CompletionAsked):
        server.check_key(http)
        answer = server.ask(asked, asked.prompts, asked.max_tokens or COMPLETION_TOKENS)
        return await completion_form(server).respond(http, asked, answer)

    @app.get("/v1/models")
    async def models(http: Http):
        server.check_key(http)
        entry = {"id": name, "object": "model", "created": server.began, "owned_by": "msn_jax"}
        return {"object": "list", "data": [entry]}

    @app.get("/health")
    async def health():
        return {"status": "ok"} if worker.is_alive() else JSONResponse({"status": "stopped"}, 503)

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(generate_latest(server.registry), media_type="text/plain; version=0.0.4")

    return app
