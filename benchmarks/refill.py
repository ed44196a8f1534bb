"""Tokens a second of rows that take the next prompt when they are done, against batches that wait for their last row,
and against one prompt after the other.

    python -m benchmarks.refill --ckpt smollm2-135m-instruct --questions FILE.jsonl --batch_size 8

All have the same prompts, in the same order, by the same method; a batch is prefilled together, to its longest prompt.
Seconds are those without compilation. A reply is identical where it is the one by one's.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time

import jax
import numpy as np

from msn_jax import DecodeConfig, InputError, load
from msn_jax.decode import loop
from msn_jax.decode.engine import ACCELERATOR_CHUNK, PREFILL_CHUNK, Engine, trees_of
from msn_jax.decode.prompts import as_chat, encode
from msn_jax.decode.request import Request
from msn_jax.decode.tree_sets import METHODS
from msn_jax.io.loading import DTYPES
from msn_jax.questions import read_questions, spread
from msn_jax.records import print_record
from msn_jax.terminal import run_command


@dataclasses.dataclass
class Arm:
    replies: list[list[int]]  # tokens of each request
    prefill_seconds: float
    seconds: float  # of decoding

    @property
    def tokens(self) -> int:
        return sum(map(len, self.replies))

    @property
    def speed(self) -> float:
        """Tokens/s with prefill."""
        return self.tokens / (self.prefill_seconds + self.seconds)


def in_batches(lm, asked: list[Request], method: str, tree: str | None, size: int) -> Arm:
    """By batches."""
    trees, chunk = trees_of(lm, method, tree, size), PREFILL_CHUNK.get(lm.backend, ACCELERATOR_CHUNK)
    done, ran = Arm([], 0.0, 0.0), set()
    for at in range(0, len(asked), size):
        batch = asked[at : at + size]
        most = max(r.decode.max_new_tokens for r in batch)
        slots = loop.bucket(max(loop.slots_needed(len(r.prompt), most, trees.width, chunk) for r in batch))

        def prefilled():
            rows = [r.prompt for r in batch] + [[0]] * (size - len(batch))  # noqa: B023
            sizes = dict(slots=slots, dtype=lm.dtype, backend=lm.backend)  # noqa: B023
            decode = DecodeConfig(max_new_tokens=most)  # noqa: B023
            state = loop.init_state(lm.cfg, trees, rows, decode, lm.stop_ids, **sizes)
            limits = [len(r.prompt) + r.decode.max_new_tokens for r in batch] + [1] * (size - len(batch))  # noqa: B023
            state = state.replace(limit=np.array(limits, np.int32), done=np.arange(size) >= len(batch))  # noqa: B023
            return loop.prefill(lm.params, state, cfg=lm.cfg, chunk=chunk)

        run = lambda state, cycles: jax.block_until_ready(
            loop.run(lm.params, state, np.int32(cycles), lm.drafter, cfg=lm.cfg, trees=trees)
        )[0]
        if slots not in ran:
            for tree_ in range(len(trees.trees)):
                run(prefilled().replace(tree=np.int32(tree_)), 1)
            ran.add(slots)
        began = time.perf_counter()
        state = jax.block_until_ready(prefilled())
        read = time.perf_counter()
        host = jax.device_get(run(state, 2**31 - 1).replace(drafts=None))
        done.prefill_seconds += read - began
        done.seconds += time.perf_counter() - read
        for row, request in enumerate(batch):
            done.replies.append(host.tokens[row, len(request.prompt) : host.cache.length[row] + 1].tolist())
    return done


def refilled(lm, asked: list[Request], method: str, tree: str | None, size: int) -> Arm:
    """By an engine."""
    with Engine(lm, method=method, tree=tree, batch_size=size) as engine:
        for request in asked:
            engine.submit(request)
        while not all(request.finished for request in asked):
            engine.step()
            engine.collect()
    return Arm([r.tokens for r in asked], sum(r.prefill_seconds for r in asked), sum(r.seconds for r in asked))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", required=True)
    p.add_argument(
        "--questions", required=True, help="JSONL with question_id, category, turns; the first turn is asked"
    )
    p.add_argument("--method", default="tr-jacobi", choices=METHODS)
    p.add_argument("--tree")
    p.add_argument("--dtype", default="float32", choices=DTYPES)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--limit", type=int, default=64, help="prompts, spread over the categories")
    p.add_argument("--max_new_tokens", type=int, default=128)
    p.add_argument(
        "--least_new_tokens", type=int, help="where given, each prompt has its own limit, drawn from here to the most"
    )
    p.add_argument("--seed", type=int, default=0, help="of these limits")
    args = p.parse_args()
    questions = spread(read_questions(args.questions), args.limit)
    least = args.least_new_tokens or args.max_new_tokens
    if not questions or not 1 <= least <= args.max_new_tokens:
        raise InputError("no questions, or --least_new_tokens above --max_new_tokens")
    lm = load(args.ckpt, dtype=args.dtype)
    draw = random.Random(args.seed)
    limits = [draw.randint(least, args.max_new_tokens) for _ in questions]
    prompts = [encode(lm, as_chat(question["turns"][0])) for question in questions]
    asked = lambda: [Request(ids, DecodeConfig(max_new_tokens=n)) for ids, n in zip(prompts, limits, strict=True)]
    size = args.batch_size
    arms = {"one by one": (refilled, 1), "batches": (in_batches, size), "refill": (refilled, size)}
    for warm in (size + 1, None):  # what compiles does so before the clock
        done = {name: arm(lm, asked()[:warm], args.method, args.tree, rows) for name, (arm, rows) in arms.items()}
    alone, batches = done["one by one"], done["batches"]
    figures = {}
    for name, arm in done.items():
        figures[name] = {
            "tokens_per_s": round(arm.speed, 1),
            "ratio_to_batches": round(arm.speed / batches.speed, 3),
            "decode_tokens_per_s": round(arm.tokens / arm.seconds, 1),
            "decode_ratio_to_one_by_one": round(arm.tokens / arm.seconds * alone.seconds / alone.tokens, 3),
            "prefill_seconds": round(arm.prefill_seconds, 2),
            "seconds": round(arm.seconds, 2),
            "tokens": arm.tokens,
            "identical": sum(a == b for a, b in zip(alone.replies, arm.replies, strict=True)),
            "prompts": len(arm.replies),
        }
        print(f"{name:<11} {figures[name]}")
    print_record(dtype=args.dtype, seed=args.seed, method=args.method, batch_size=args.batch_size, methods=figures)


if __name__ == "__main__":
    run_command(main)
