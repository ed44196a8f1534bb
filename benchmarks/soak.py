"""Hours of random requests through an engine, each compared with what `ar` makes of it alone.

    python -m benchmarks.soak --ckpt CHECKPOINT --seconds 7200 --seed 0

Prompts, lengths, settings, methods, the time at which a request comes and whether it is cancelled are drawn from the
seed, round by round; a round can be repeated by its number (--rounds). A line a minute says what was found so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time

from msn_jax import DecodeConfig, InputError, load
from msn_jax.decode.engine import Engine
from msn_jax.decode.generate import is_near_tie
from msn_jax.decode.request import Request
from msn_jax.io.loading import DTYPES, LM
from msn_jax.records import print_record
from msn_jax.terminal import run_command

# Few, so that all programs are compiled in the first minutes, and growth after them is a leak.
ENGINES = (
    dict(method="tr-jacobi", tree="chain4", batch_size=4, cycles=3, keep=True),
    dict(method="tr-jacobi", tree="msn69", batch_size=2),
    dict(method="recycling", tree="recycle8", batch_size=4, cycles=5),
    dict(method="lookup", tree="chain8", batch_size=3, cycles=4, keep=True),
    dict(method="ar", batch_size=4, keep=True),
)
MOST_TOKENS = 512  # of a prompt and its reply
ROUND = 24  # requests


def drawn_settings(rng: random.Random, new_tokens: int) -> DecodeConfig:
    settings = {}
    if rng.random() < 0.7:
        settings |= {"temperature": rng.choice((0.3, 0.8, 1.0, 1.5)), "seed": rng.randrange(2**32)}
        settings |= rng.choice(({}, {"top_k": rng.randrange(1, 60)}, {"top_p": rng.uniform(0.3, 1)}, {"min_p": 0.05}))
    if rng.random() < 0.3:
        settings["repetition_penalty"] = rng.choice((1.1, 1.5, 0.9))
    if rng.random() < 0.2:
        settings["stop"] = ["".join(rng.choices("abcdefgh ", k=rng.randrange(1, 3)))]
    if rng.random() < 0.1:
        settings["logprobs"] = rng.randrange(5)
    return DecodeConfig(max_new_tokens=new_tokens, **settings)


def drawn_requests(rng: random.Random, lm: LM) -> list[Request]:
    """Of one round. Some go on from another's prompt; some end at a text that their own reply may hold."""
    most, requests = min(MOST_TOKENS, lm.cfg.max_position), []
    for number in range(ROUND):
        length = rng.choice((1, rng.randrange(1, 40), rng.randrange(1, most - 1)))
        prompt = [rng.randrange(lm.cfg.vocab_size) for _ in range(length)]
        if requests and rng.random() < 0.4:
            prompt = (rng.choice(requests).prompt[: rng.randrange(1, most)] + prompt)[: most - 1]
        if rng.random() < 0.3:  # text that repeats, for drafts to find
            prompt = (prompt[:7] * most)[: len(prompt)]
        new_tokens = rng.randrange(1, min(150, most - len(prompt)) + 1)
        requests.append(Request(prompt, drawn_settings(rng, new_tokens), number=rng.randrange(1000), id=number))
    return requests


def run_round(lm: LM, rng: random.Random, engine: Engine) -> list[Request]:
    """Have a round's requests come, and go, at random times."""
    requests = drawn_requests(rng, lm)
    left = list(requests)
    while left or not all(request.finished for request in requests):
        for _ in range(rng.choice((0, 0, 1, 2, 5)) if engine.running or engine.waiting else 1):
            if left:
                engine.submit(left.pop())
        for request in requests:
            if not request.finished and rng.random() < 0.004:
                request.cancelled = True
                if request in left:
                    left.remove(request)
                    request.finish_reason = "cancelled"
        engine.step()
    return requests


def check(lm: LM, alone: Engine, request: Request) -> str:
    """identical, near_tie or different: beside `ar` alone, of a request that was cancelled as far as it came."""
    plain = alone.submit(Request(request.prompt, request.decode, number=request.number))
    while not plain.finished:
        alone.step()
    expected = plain.tokens[: len(request.tokens)] if request.finish_reason == "cancelled" else plain.tokens
    if request.tokens == expected:
        same_end = request.finish_reason in ("cancelled", plain.finish_reason)
        return "identical" if same_end else "different"
    at = next((i for i, (a, b) in enumerate(zip(request.tokens, expected)) if a != b), len(expected))
    tie = is_near_tie(lm, request.prompt + expected[:at], request.decode, request.number)
    return "near_tie" if at < min(len(request.tokens), len(expected)) and tie else "different"


def resident_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", required=True)
    p.add_argument("--layers", type=int, help="only so many of the model's first layers")
    p.add_argument("--dtype", default="float32", choices=DTYPES)
    p.add_argument("--seconds", type=float, default=7200.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rounds", type=int, nargs=2, metavar=("FIRST", "END"), help="only these, whatever the time")
    args = p.parse_args()
    lm = load(args.ckpt, dtype=args.dtype)
    if args.layers is not None:
        if not 1 <= args.layers <= lm.cfg.layers:
            raise InputError(f"--layers {args.layers}: accepted: 1 to {lm.cfg.layers}")
        params = lm.params.replace(layers=lm.params.layers[: args.layers])
        lm = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, layers=args.layers), params=params)
    first, end = args.rounds or (0, 2**31)
    engines = [Engine(lm, **settings) for settings in ENGINES]
    counts = dict.fromkeys(("identical", "near_tie", "different", "cancelled"), 0)
    began, told, after_first, rounds, tokens = time.monotonic(), time.monotonic(), None, 0, 0
    with Engine(lm, method="ar") as alone:
        for number in range(first, end):
            if time.monotonic() - began > args.seconds:
                break
            rng = random.Random(f"{args.seed} {number}")
            engine = engines[number % len(engines)]
            for request in run_round(lm, rng, engine):
                outcome = check(lm, alone, request)
                counts[outcome] += 1
                counts["cancelled"] += request.finish_reason == "cancelled"
                tokens += len(request.tokens)
                if outcome == "different":
                    print(f"DIFFERENT: seed {args.seed}, round {number}, request {request.id}", flush=True)
            rounds += 1
            if not engine.keep and engine.slots:
                raise AssertionError(f"round {number}: an engine without requests holds {engine.slots} slots")
            if number - first == 4 * len(engines):
                after_first = resident_bytes()
            if time.monotonic() - told > 60:
                told = time.monotonic()
                seconds, mib = round(told - began), resident_bytes() // 2**20
                print(f"{seconds} s, round {number}, {tokens} tokens, {counts}, {mib} MiB resident", flush=True)
    growth = None if after_first is None else round(resident_bytes() / after_first - 1, 4)
    print_record(
        seed=args.seed,
        dtype=args.dtype,
        rounds=rounds,
        requests=rounds * ROUND,
        tokens=tokens,
        seconds=round(time.monotonic() - began),
        **counts,
        resident_growth_frac=growth,
    )


if __name__ == "__main__":
    run_command(main)
