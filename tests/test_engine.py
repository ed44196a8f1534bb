"""Rows that take turns: every request has the tokens that `ar` gives it alone, whoever sits beside it."""

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msn_jax import DecodeConfig, InputError, generate, stream
from msn_jax.decode import engine as engine_module
from msn_jax.decode import loop, seats
from msn_jax.decode.engine import Engine
from msn_jax.decode.request import Request
from msn_jax.decode.sources.recycling import RANKS
from msn_jax.decode.tree_sets import METHODS
from msn_jax.eagle import drafter_of, init_eagle
from msn_jax.heads import init_heads
from msn_jax.io.loading import draft_of
from msn_jax.ngrams import make_table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)
# Prompts below and above a prefill chunk, one of a single token, with limits from one token on.
ASKED = [
    (RNG.integers(3, 97, n).tolist(), new)
    for n, new in ((1, 9), (9, 30), (33, 1), (150, 12), (5, 40), (70, 3), (2, 25), (64, 8), (65, 17), (17, 2), (40, 33))
]
GREEDY, DRAWN = {}, {"temperature": 0.9, "top_p": 0.95}


def requests(settings_of):
    return [
        Request(prompt, DecodeConfig(max_new_tokens=new, **settings_of(i)), number=i, id=i)
        for i, (prompt, new) in enumerate(ASKED)
    ]


def mixed(i):
    """Greedy and drawn, with seeds of their own, side by side."""
    penalised = {"repetition_penalty": 1.3}
    arms = [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.3, "top_k": 7, "seed": i}, DRAWN, penalised]
    return [*arms, DRAWN | penalised | {"min_p": 0.05}][i % 6]


def decoded(lm, asked, **settings):
    with Engine(lm, **settings) as engine:
        for request in asked:
            engine.submit(request)
        for _ in range(10_000):
            engine.step()
            if all(request.finished for request in asked):
                return asked
    raise AssertionError("some request never ended")


@pytest.fixture(scope="module")
def stopping(tiny_lm):
    """A model two of whose usual tokens end a reply."""
    usual = [r.tokens[-1] for r in decoded(tiny_lm, requests(lambda _: GREEDY), method="ar")]
    own = {"heads": init_heads(tiny_lm.cfg, 3), "ngrams": make_table([([5], usual)], 97, 1, 16)[0]}
    own["draft"] = draft_of(tiny_lm, 1, jnp.float32)
    head = init_eagle(jax.random.key(0), tiny_lm.cfg, 60)
    own["eagle"] = drafter_of(head, tiny_lm.params, tiny_lm.cfg, jnp.float32)
    return dataclasses.replace(tiny_lm, stop_ids=(usual[1], usual[4]), **own)


@pytest.fixture(scope="module")
def alone(stopping):
    """Each request by `ar`, one by one: (tokens, why it ended)."""
    done = decoded(stopping, requests(mixed), method="ar")
    assert {r.finish_reason for r in done} == {"stop", "length"}
    return [(r.tokens, r.finish_reason) for r in done]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cycles", [3, engine_module.UNTIL_DONE], ids=["few", "many"])
def test_refilled_rows_have_the_tokens_of_ar_alone(stopping, alone, method, cycles):
    done = decoded(stopping, requests(mixed), method=method, batch_size=4, cycles=cycles)
    assert [(r.tokens, r.finish_reason) for r in done] == alone
    assert all(sum(r.accepted) == len(r.tokens) <= r.decode.max_new_tokens and r.seconds > 0 for r in done)


@pytest.mark.parametrize("method, tree", [("jacobi", "chain4"), ("recycling", "recycle8"), ("lookup", "chain8")])
def test_a_row_remembers_nothing_of_the_request_before(tiny_lm, method, tree):
    accepted = lambda rows: [
        r.accepted for r in decoded(tiny_lm, requests(lambda _: GREEDY), method=method, tree=tree, batch_size=rows)
    ]
    assert accepted(3) == accepted(11)


def test_the_cache_grows_and_shrinks(tiny_lm, monkeypatch):
    asked = lambda: [
        Request([5] * n, DecodeConfig(max_new_tokens=new, temperature=1.0), number=n)
        for n, new in ((3, 120), (4, 200), (5, 3), (6, 4), (130, 20), (7, 3), (8, 150))
    ]
    expected = [r.tokens for r in decoded(tiny_lm, asked(), method="ar", batch_size=1)]
    monkeypatch.setattr(engine_module, "SMALL", 0)
    monkeypatch.setattr(engine_module, "AHEAD", 16)
    monkeypatch.setattr(loop, "bucket", lambda slots: -(-slots // 96) * 96)
    sizes, resize = [], seats.resize

    def seen(state, **settings):
        sizes.append((state.tokens.shape[1], settings["slots"]))
        return resize(state, **settings)

    monkeypatch.setattr(seats, "resize", seen)
    assert [r.tokens for r in decoded(tiny_lm, asked(), method="recycling", batch_size=2)] == expected
    assert any(new > old for old, new in sizes) and any(new < old for old, new in sizes)


def test_others_go_on_while_a_long_prompt_is_read(tiny_lm, monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNKS_BETWEEN", 1)
    short = Request([7, 8], DecodeConfig(max_new_tokens=60))
    long = Request([9] * 193, DecodeConfig(max_new_tokens=5))  # 192 before its root: three chunks
    with Engine(tiny_lm, method="ar", batch_size=2, cycles=4) as engine:
        engine.submit(short)
        engine.step()
        engine.submit(long)
        grown = []
        while not long.tokens:
            engine.step()
            grown.append(len(short.tokens))
        assert grown == [4, 8, 12, 16]
        while not (short.finished and long.finished):
            engine.step()
    for request in (short, long):
        (plain,) = generate(tiny_lm, [request.prompt], method="ar", max_new_tokens=request.decode.max_new_tokens)
        assert request.tokens == plain.tokens


def test_cancelled_requests_leave_and_change_nobody(stopping, alone):
    asked = requests(mixed)
    with Engine(stopping, method="tr-jacobi", batch_size=2, cycles=2) as engine:
        for request in asked:
            engine.submit(request)
        for turn in range(10_000):
            moved = engine.step()
            assert len(moved) == len(set(moved))
            if turn == 1:
                asked[1].cancelled = asked[7].cancelled = True  # one has a row, one waits
            if turn == 2:
                assert asked[1] in moved and asked[7] in moved
            if not engine.running and not engine.waiting:
                break
        engine.step()
        assert engine.slots == 0
    assert asked[1].finish_reason == asked[7].finish_reason == "cancelled"
    assert asked[1].tokens == alone[1][0][: len(asked[1].tokens)] and not asked[7].tokens
    kept = [i for i in range(len(asked)) if i not in (1, 7)]
    assert [asked[i].tokens for i in kept] == [alone[i][0] for i in kept]


def test_a_closed_engine_names_what_it_left(tiny_lm):
    engine = Engine(tiny_lm, batch_size=1, cycles=1)
    first, second = (engine.submit(Request([3, 4], DecodeConfig(max_new_tokens=9))) for _ in range(2))
    engine.step()
    assert engine.close() == [first, second] and engine.slots == engine.running == engine.waiting == 0
    with pytest.raises(InputError, match="the prompt has 250 tokens, with 7 new ones 257; the model's context is 256"):
        engine.submit(Request([3] * 250, DecodeConfig(max_new_tokens=7)))


@pytest.mark.parametrize("method", ["ar", "tr-jacobi"])
def test_rows_that_are_free_keep_what_they_have_read(tiny_lm, monkeypatch, method):
    monkeypatch.setattr(loop, "bucket", lambda slots: -(-slots // 32) * 32)  # so that the cache changes its size often
    rng = np.random.default_rng(4)
    with Engine(tiny_lm, method=method, batch_size=3, cycles=3, keep=True) as engine:
        texts, saved = [rng.integers(3, 97, 70).tolist() for _ in range(2)], 0
        for turn in range(40):
            prompt = texts[turn % 2][: rng.integers(1, 71)] + rng.integers(3, 97, rng.integers(0, 9)).tolist()
            new = int(rng.integers(1, 40))
            request = engine.submit(Request(prompt, DecodeConfig(max_new_tokens=new, temperature=1.0, seed=turn)))
            beside = engine.submit(Request(prompt[:5], DecodeConfig(max_new_tokens=99)))
            while not request.finished:
                engine.step()
                request.cancelled = turn % 5 == 1 and len(request.tokens) > 3
            beside.cancelled = True
            engine.step()
            (plain,) = generate(tiny_lm, [prompt], method="ar", max_new_tokens=new, temperature=1.0, seed=turn)
            assert request.tokens == plain.tokens[: len(request.tokens)]
            assert request.finish_reason in ("cancelled", plain.finish_reason)
            texts[turn % 2] = (prompt + request.tokens)[:120]
            saved += len(prompt) - 1 - request.prefill_tokens
        assert saved > 500
        first, again = (Request([*range(3, 63)], DecodeConfig(max_new_tokens=9)) for _ in range(2))
        for request, read in ((first, 59), (again, 0)):
            engine.submit(request)
            while not request.finished:
                engine.step()
            assert request.prefill_tokens == read
        assert first.tokens == again.tokens and engine.slots
    assert not engine.slots


def test_two_threads_get_what_one_gets(tiny_lm):
    prompts = [prompt for prompt, _ in ASKED]
    call = lambda: generate(tiny_lm, prompts, max_new_tokens=20, batch_size=4, temperature=0.8, seed=2)
    expected, found = [r.tokens for r in call()], [None] * 3

    def thread(i):
        found[i] = [r.tokens for r in call()]

    threads = [threading.Thread(target=thread, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [expected] * 3


def test_a_shared_memory_comes_back_from_an_answer_that_is_left(tiny_lm):
    lm = dataclasses.replace(tiny_lm, memory={"recycling": jnp.full((1, tiny_lm.cfg.vocab_size, RANKS), -1, jnp.int32)})
    answer = stream(lm, [5, 6, 7], method="recycling", max_new_tokens=60)
    next(answer)
    del answer
    table = np.asarray(lm.memory["recycling"])
    assert (table >= 0).any()
    generate(lm, [[5, 6, 7]] * 3, method="recycling", max_new_tokens=9, batch_size=2)
    assert (np.asarray(lm.memory["recycling"]) >= 0).sum() >= (table >= 0).sum()


SPREAD = """
import sys, msn_jax
from msn_jax.decode.engine import Engine
from msn_jax.decode.request import Request
ids = [[5 + i % 90] * (1 + 13 * i % 80) for i in range(11)]
settings = dict(max_new_tokens=20, batch_size=4, temperature=0.8, seed=3, tree="chain4")
mesh = msn_jax.make_mesh(data=2, tensor=4)
spread, one = (msn_jax.generate(msn_jax.load(sys.argv[1], mesh=m), ids, **settings) for m in (mesh, None))
assert [r.tokens for r in spread] == [r.tokens for r in one]
print("the same")
"""


def test_eight_devices_give_what_one_gives(tiny_ckpt):
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {os.environ['XLA_FLAGS']}"}
    call = [sys.executable, "-c", SPREAD, str(tiny_ckpt)]
    done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "the same\n", done.stderr[-3000:]
