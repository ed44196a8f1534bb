"""The server, asked by the official client: the texts of `generate`, errors in the protocol's form, nothing lost."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import uvicorn

from msn_jax import generate
from msn_jax.decode.engine import Engine
from msn_jax.decode.stops import StopTexts
from msn_jax.serve.app import make_app
from msn_jax.serve.worker import Worker

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SAID = [{"role": "user", "content": "abc"}]
DRAWN = {"temperature": 0.8, "seed": 4}
ASK = {"model": "tiny", "messages": SAID, "max_tokens": 24}
LONG = ASK | {"max_tokens": 200, "seed": 8}  # a seed whose reply does not end before


@contextlib.contextmanager
def running(lm, rows=3, most_waiting=60, key="secret"):
    """(client, worker) of a server in a thread."""
    worker = Worker(Engine(lm, tree="chain4", batch_size=rows, cycles=4, keep=True), most_waiting)
    server = uvicorn.Server(uvicorn.Config(make_app(lm, worker, "tiny", key), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0) as client:
            yield client, worker
    finally:  # a test that fails is not to keep the process alive
        server.should_exit = True
        thread.join()
    assert not worker.is_alive()


@pytest.fixture(scope="module")
def served(tiny_lm):
    with running(tiny_lm) as pair:
        yield pair


@pytest.fixture
def client(served):
    return served[0]


def expected(lm, prompt, most=24, **settings):
    return generate(lm, [prompt], method="ar", max_new_tokens=most, **settings)[0]


def test_a_reply_is_that_of_the_library(client, tiny_lm):
    more = {"min_p": 0.05, "repetition_penalty": 1.4, "top_k": 30}
    for settings in ({"temperature": 0}, DRAWN, DRAWN | {"top_p": 0.9}, DRAWN | more):
        beyond = {name: value for name, value in settings.items() if name in more}
        plain_settings = {name: value for name, value in settings.items() if name not in more}
        reply = client.chat.completions.create(**ASK, **plain_settings, extra_body=beyond)
        plain = expected(tiny_lm, SAID, **settings)
        (choice,) = reply.choices
        assert (choice.message.content, choice.finish_reason) == (plain.text, plain.finish_reason)
        assert choice.message.role == "assistant" and reply.object == "chat.completion" and reply.model == "tiny"
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (plain.prompt_tokens, len(plain.tokens))
        assert reply.usage.total_tokens == plain.prompt_tokens + len(plain.tokens)
        assert reply.usage.tokens_per_pass >= 1
    # Without a seed each draw is another; the protocol's temperature is 1.
    texts = {client.chat.completions.create(**ASK).choices[0].message.content for _ in range(3)}
    assert len(texts) == 3


def test_a_streamed_reply_is_the_whole_one_in_pieces(client, tiny_lm):
    plain = expected(tiny_lm, SAID, **DRAWN)
    chunks = list(client.chat.completions.create(**ASK, **DRAWN, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(chunk.choices[0].delta.content for chunk in pieces) == plain.text and len(pieces) > 2
    assert [chunk.choices[0].delta.role for chunk in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert last.choices == [] and last.usage.completion_tokens == len(plain.tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_reply_ends_before_a_stop_text(client, tiny_lm):
    text = expected(tiny_lm, SAID, **DRAWN).text
    stop = text[7:10]  # a token is one character
    before = text[: text.index(stop)]
    (choice,) = client.chat.completions.create(**ASK, **DRAWN, stop=["never so", stop]).choices
    assert (choice.message.content, choice.finish_reason) == (before, "stop")
    chunks = list(client.chat.completions.create(**ASK, **DRAWN, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == before
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_log_probabilities_of_a_chat(client, tiny_lm):
    plain = expected(tiny_lm, SAID, **DRAWN, logprobs=2)
    stop = plain.text[9:11]
    plain = expected(tiny_lm, SAID, **DRAWN, logprobs=2, stop=stop)
    ask = ASK | DRAWN | {"stop": stop, "logprobs": True, "top_logprobs": 2}
    reply = client.chat.completions.create(**ask)
    (choice,) = reply.choices
    assert choice.message.content == plain.text and reply.usage.completion_tokens == len(plain.tokens)
    assert reply.usage.tokens_per_pass >= 1  # of a reply that was cut as well
    entries = list(choice.logprobs.content)
    assert [e.token for e in entries] == [tiny_lm.tokenizer.decode([token]) for token in plain.tokens]
    assert [bytes(e.bytes).decode() for e in entries] == [e.token for e in entries]
    np.testing.assert_allclose([e.logprob for e in entries], plain.logprobs, atol=1e-4)
    top = [[(e.token, e.logprob) for e in entry.top_logprobs] for entry in entries]
    for ours, theirs in zip(top, plain.top_logprobs, strict=True):
        assert [token for token, _ in ours] == [tiny_lm.tokenizer.decode([token]) for token, _ in theirs]
        np.testing.assert_allclose([logprob for _, logprob in ours], [logprob for _, logprob in theirs], atol=1e-4)
    chunks = list(client.chat.completions.create(**ask, stream=True))
    streamed = [e for chunk in chunks for e in chunk.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in entries] and len(chunks) > 2
    assert client.chat.completions.create(**ASK).choices[0].logprobs is None


def test_log_probabilities_of_a_completion(client, tiny_lm):
    ask = dict(model="tiny", prompt="abc", max_tokens=12, temperature=0, logprobs=3)
    plain = expected(tiny_lm, "abc", most=12, logprobs=3)
    (choice,) = client.completions.create(**ask).choices
    texts = [tiny_lm.tokenizer.decode([token]) for token in plain.tokens]
    told = choice.logprobs
    assert (told.tokens, told.text_offset) == (texts, [len("".join(texts[:n])) for n in range(len(texts))])
    np.testing.assert_allclose(told.token_logprobs, plain.logprobs, atol=1e-4)
    assert [len(top) for top in told.top_logprobs] == [3] * len(texts)
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**ask, stream=True)]
    assert [token for part in streamed for token in part.tokens] == texts
    assert [at for part in streamed for at in part.text_offset] == told.text_offset


def test_a_turn_goes_on_from_what_its_row_has_read(served, tiny_lm, monkeypatch):
    client, worker = served
    seen, submit = [], worker.engine.submit
    monkeypatch.setattr(worker.engine, "submit", lambda request: seen.append(request) or submit(request))
    said = [{"role": "user", "content": "abcde" * 12}]
    for _ in range(3):
        reply = client.chat.completions.create(**ASK | {"messages": said}, **DRAWN).choices[0].message.content
        assert reply == expected(tiny_lm, said, **DRAWN).text
        said += [{"role": "assistant", "content": reply}, {"role": "user", "content": "more"}]
    prompts = [len(request.prompt) for request in seen]
    for n in (1, 2):
        assert seen[n].prefill_tokens <= prompts[n] - prompts[n - 1]


def test_stop_texts_cut_as_on_the_whole_text():
    rng = random.Random(0)
    for _ in range(2000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 2))]
        pieces = ["".join(rng.choices("abc", k=rng.randint(0, 3))) for _ in range(6)]
        cut, shown, whole = StopTexts(stops), "", "".join(pieces)
        for piece in pieces:
            text, ended = cut.add(piece)
            shown += text
            if ended:
                break
        else:
            shown += cut.flush()
        # Character by character: where one is whole, the longest that ends there.
        cuts = [
            n - len(stop)
            for n in range(len(whole) + 1)
            for stop in sorted(stops, key=len)[::-1]
            if whole[:n].endswith(stop)
        ]
        assert (shown, ended) == (whole[: cuts[0]] if cuts else whole, bool(cuts))


def test_several_replies_to_several_prompts(client, tiny_lm):
    reply = client.completions.create(model="tiny", prompt=["ab", "cd"], n=2, max_tokens=9, temperature=1, seed=3)
    texts = [choice.text for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3] and texts[0] != texts[1]
    # Of n replies each is that of the request with its number.
    both = [generate(tiny_lm, [p] * 2, method="ar", max_new_tokens=9, temperature=1.0, seed=3) for p in ("ab", "cd")]
    assert texts == [result.text for results in both for result in results]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (4, 36)
    (choice,) = client.completions.create(model="tiny", prompt=[67, 68], temperature=0).choices
    assert choice.text == expected(tiny_lm, [67, 68], most=16).text
    assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    "change, kind, named",
    [
        ({"model": "other"}, openai.NotFoundError, "the model 'other' does not exist"),
        ({"messages": []}, openai.BadRequestError, "messages: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            openai.BadRequestError,
            "messages.0.con",
        ),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens: "),
        ({"max_tokens": 250}, openai.BadRequestError, "with 250 new ones more than the context of 256"),
        ({"temperature": -1}, openai.BadRequestError, "temperature: "),
        ({"top_p": 0}, openai.BadRequestError, "top_p: "),
        ({"stop": [""]}, openai.BadRequestError, "stop is up to 16 texts"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, "top_logprobs: "),
        ({"frequency_penalty": 1}, openai.BadRequestError, "frequency_penalty is not supported here"),
        ({"extra_body": {"min_p": 2}}, openai.BadRequestError, "min_p: "),
        ({"extra_body": {"repetition_penalty": 0}}, openai.BadRequestError, "repetition_penalty: "),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature is no parameter"),
    ],
)
def test_errors_have_the_protocols_form(client, change, kind, named):
    with pytest.raises(kind, match=named) as e:
        client.chat.completions.create(**ASK | change)
    assert e.value.body.keys() == {"message", "type", "param", "code"}
    assert e.value.body["type"] == "invalid_request_error"


def post(client, content, path="/chat/completions", **headers):
    headers = {"authorization": "Bearer secret", "content-type": "application/json"} | headers
    return httpx.post(str(client.base_url).rstrip("/") + path, content=content, headers=headers, timeout=60)


def test_what_is_no_request_is_refused(client):
    for content, status in ((b"{", 400), (b"[]", 400), (b'{"a": ' * 10_000, 400), (b" " * (2**22 + 1), 413)):
        reply = post(client, content)
        assert reply.status_code == status and reply.json()["error"]["type"] == "invalid_request_error"
    assert post(client, b"{}", path="/no/such").json()["error"]["message"] == "Not Found"
    assert post(client, json.dumps(ASK | {"messages": [{"role": "user", "content": "\ud800"}]})).status_code == 400


def test_a_key_is_asked_for(client):
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        client.with_options(api_key="another").chat.completions.create(**ASK)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()
    root = str(client.base_url).removesuffix("/v1/")
    assert httpx.get(f"{root}/health").json() == {"status": "ok"}
    lines = httpx.get(f"{root}/metrics").text.splitlines()
    assert "msn_jax_running 0.0" in lines and any(line.startswith("msn_jax_generated_tokens_total ") for line in lines)
    assert any(line.startswith('msn_jax_requests_total{path="/v1/chat/completions",status="401"}') for line in lines)


def slowed(worker, seconds, monkeypatch):
    step = worker.engine.step
    monkeypatch.setattr(worker.engine, "step", lambda: time.sleep(seconds) or step())


def settled(worker):
    """Wait until nothing runs."""
    while worker.engine.running or worker.engine.waiting:
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_leaves_its_row(served, stream, monkeypatch):
    client, worker = served
    slowed(worker, 0.05, monkeypatch)
    seen, submit = [], worker.engine.submit
    monkeypatch.setattr(worker.engine, "submit", lambda request: seen.append(request) or submit(request))
    long = LONG | {"stream": stream}
    if stream:
        with client.chat.completions.create(**long) as chunks:
            next(iter(chunks))
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).chat.completions.create(**long)
    settled(worker)
    (request,) = seen
    assert request.finish_reason == "cancelled" and len(request.tokens) < 200


def test_too_many_that_wait_are_refused(tiny_lm, monkeypatch):
    with running(tiny_lm, rows=1, most_waiting=1) as (client, worker):
        slowed(worker, 0.05, monkeypatch)
        long = LONG | {"stream": True}
        first, second = (client.chat.completions.create(**long) for _ in range(2))
        with pytest.raises(openai.RateLimitError, match="too many requests wait"):
            client.chat.completions.create(**ASK)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**ASK | {"n": 3})
        for reply in (first, second):
            reply.close()


def test_a_failure_of_the_device_is_told(served, monkeypatch, caplog):
    client, worker = served

    def fails():
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(worker.engine, "step", fails)
        with pytest.raises(openai.InternalServerError, match="the model failed over this request"):
            client.chat.completions.create(**ASK)
        with pytest.raises(openai.APIError, match="the model failed over this request"):
            list(client.chat.completions.create(**ASK, stream=True))
    assert client.chat.completions.create(**ASK).choices


def test_fifty_clients_at_once(client, tiny_lm):
    def one(i):
        ask = ASK | {"messages": [{"role": "user", "content": chr(97 + i % 20) * (1 + i % 9)}], "max_tokens": 5 + i}
        ask |= {"temperature": 0.9, "seed": i}
        if i % 10 == 3:
            assert post(client, b"{").status_code == 400
        elif i % 10 == 5:
            assert post(client, b" " * (2**22 + 1)).status_code == 413
        elif i % 10 == 7:
            with client.chat.completions.create(**ask, stream=True) as chunks:
                next(iter(chunks))
        elif i % 2:
            chunks = client.chat.completions.create(**ask, stream=True)
            return "".join(chunk.choices[0].delta.content for chunk in chunks if not time.sleep(0.02 * (i % 10 == 9)))
        else:
            return client.chat.completions.create(**ask).choices[0].message.content
        return None

    with ThreadPoolExecutor(50) as pool:
        texts = list(pool.map(one, range(50)))
    for i, text in enumerate(texts):
        if text is not None:
            said = [{"role": "user", "content": chr(97 + i % 20) * (1 + i % 9)}]
            assert text == expected(tiny_lm, said, most=5 + i, temperature=0.9, seed=i).text
    assert sum(text is not None for text in texts) == 35


def resident_bytes():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def test_memory_after_500_requests_is_that_after_100(client):
    def one(i):
        said = [{"role": "user", "content": "".join(chr(97 + (i * k) % 26) for k in range(1 + i * 7 % 90))}]
        ask = ASK | {"messages": said, "max_tokens": 1 + i % 30, "seed": i, "stream": i % 3 == 0}
        reply = client.chat.completions.create(**ask)
        if ask["stream"]:
            with reply as chunks:
                for n, _ in enumerate(chunks):
                    if i % 4 == 3 and n == 1:
                        break

    sizes = []
    with ThreadPoolExecutor(6) as pool:
        for count in (100, 400):
            list(pool.map(one, range(count)))
            sizes.append(resident_bytes())
    assert sizes[1] <= 1.03 * sizes[0]


def test_a_terminated_server_finishes_what_runs(tiny_ckpt, tiny_lm):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = [sys.executable, "-m", "msn_jax.serve", "--ckpt", str(tiny_ckpt), "--port", str(port), "--method", "ar"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(call, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        url = f"http://127.0.0.1:{port}"
        while process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.05)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            ask = dict(model=tiny_ckpt.name, messages=SAID, max_tokens=200, **DRAWN)
            chunks = client.chat.completions.create(**ask, stream=True)
            text = next(chunks).choices[0].delta.content
            process.send_signal(signal.SIGTERM)
            text += "".join(chunk.choices[0].delta.content for chunk in chunks)
            process.wait(timeout=60)
            with pytest.raises(openai.APIConnectionError):
                client.models.list()
        assert "Traceback" not in process.stderr.read()
    assert text == expected(tiny_lm, SAID, most=200, **DRAWN).text
