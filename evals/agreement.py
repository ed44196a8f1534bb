"""What a narrower dtype costs: agreement of greedy tokens with float32, and the loss on given replies.

    python -m evals.agreement --ckpt CKPT --questions FILE.jsonl --held_out ROWS.jsonl --dtypes bfloat16,int8

The model in float32 answers the questions; every dtype then reads those answers, and is asked at each of their tokens
which one it would have emitted. The loss is per token of the replies in ROWS, which train.py's data formats write.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from msn_jax import generate, load
from msn_jax.config import DataSource
from msn_jax.decode.loop import bucket
from msn_jax.decode.prompts import encode
from msn_jax.io.loading import DTYPES, LM
from msn_jax.io.tokenizer import encode_text
from msn_jax.model import forward, unembed
from msn_jax.questions import read_questions, spread
from msn_jax.records import listed, print_record
from msn_jax.rows import read_rows, to_messages
from msn_jax.score import loglikelihoods
from msn_jax.terminal import run_command


@partial(jax.jit, static_argnames=("cfg", "dtype"))
def _logits(params, tokens, *, cfg, dtype):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = forward(params, cfg, tokens, positions, dtype=dtype)
    return unembed(params, cfg, hidden)


def answer_logits(lm: LM, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Logits float32 [len(answer), V] before each token of an answer."""
    ids = [*prompt, *answer][:-1]
    tokens = np.zeros((1, bucket(len(ids))), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(_logits(lm.params, tokens, cfg=lm.cfg, dtype=lm.activations))[0, len(prompt) - 1 : len(ids)]


def reply_pairs(lm: LM, path: str, limit: int, most: int = 512) -> list[tuple[list[int], list[int]]]:
    """(prompt, first reply) of the first rows that fit `most` tokens."""

    def pairs():
        for row in read_rows(DataSource(path=path)):
            messages = to_messages(row)
            at = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
            pair = encode(lm, messages[:at]), encode_text(lm.tokenizer, messages[at]["content"])
            if pair[1] and len(pair[0]) + len(pair[1]) <= most:
                yield pair

    return list(itertools.islice(pairs(), limit))


def loss(lm: LM, pairs) -> float:
    """Nats a token of the replies."""
    scores = loglikelihoods(lm, pairs, batch_size=1)
    return -sum(score for score, _ in scores) / sum(len(reply) for _, reply in pairs)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", required=True)
    p.add_argument("--questions", required=True, help="JSONL with question_id, category, turns; first turns are asked")
    p.add_argument("--held_out", required=True, help="rows with replies, as train.py reads them")
    p.add_argument("--dtypes", default="bfloat16,int8", help=f"to compare with float32: {', '.join(DTYPES[1:])}")
    p.add_argument("--limit", type=int, default=26, help="questions, spread over the categories")
    p.add_argument("--rows", type=int, default=64, help="of --held_out")
    p.add_argument("--max_new_tokens", type=int, default=96)
    args = p.parse_args()
    dtypes = listed("--dtypes", args.dtypes, DTYPES)

    lm = load(args.ckpt)
    prompts = [
        encode(lm, [{"role": "user", "content": q["turns"][0]}])
        for q in spread(read_questions(args.questions), args.limit)
    ]
    answers = [r.tokens for r in generate(lm, prompts, max_new_tokens=args.max_new_tokens)]
    pairs = reply_pairs(lm, args.held_out, args.rows)
    figures = {"float32": {"loss": loss(lm, pairs)}}
    for dtype in dtypes:
        lm = load(args.ckpt, dtype=dtype)
        same = [
            answer_logits(lm, prompt, answer).argmax(-1) == answer
            for prompt, answer in tqdm(list(zip(prompts, answers, strict=True)), unit="answer", mininterval=5)
        ]
        same = np.concatenate(same)
        figures[dtype] = {"loss": loss(lm, pairs), "greedy_agreement_frac": float(same.mean()), "tokens": same.size}
    for name, f in figures.items():
        print(f"{name:<9} loss {f['loss']:.4f} {f.get('greedy_agreement_frac', 1):8.2%} of greedy tokens as in float32")
    print_record(dtypes=figures)


if __name__ == "__main__":
    run_command(main)
