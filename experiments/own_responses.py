"""Replies of a model itself to the prompts of training data: what a draft-only adapter is best trained on.

    python -m experiments.own_responses --ckpt smollm2-135m-instruct --sources a.jsonl b.jsonl.gz --rows 1000 \
      --out own.jsonl

Writes rows of `messages`: the prompt up to the first reply of each row, and the model's greedy reply. Prompts come from
the sources in turn, each in a random order. A reply that loops is dropped. A run that was cut off goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
from tqdm import tqdm

from msn_jax import DecodeConfig, load
from msn_jax.answers import LOOPS, repeated_4grams
from msn_jax.config import DataSource
from msn_jax.decode.generate import generate_batches
from msn_jax.decode.prompts import encode
from msn_jax.records import keep_rows, kept_rows, same_settings
from msn_jax.rows import Unusable, read_rows, to_messages
from msn_jax.terminal import run_command


def prompts_of(path: str, seed: int) -> list[list[dict]]:
    """The conversation up to the first reply of every usable row, shuffled."""
    found = []
    for row in read_rows(DataSource(path=path)):
        if row.get("tools"):
            continue  # its prompt is more than its messages
        try:
            messages = to_messages(row)
        except Unusable:
            continue
        found.append(list(itertools.takewhile(lambda m: m["role"] != "assistant", messages)))
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


def in_turn(sources: list[str], seed: int) -> list[list[dict]]:
    turns = itertools.zip_longest(*(prompts_of(path, seed) for path in sources))
    return [prompt for turn in turns for prompt in turn if prompt is not None]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", required=True)
    p.add_argument("--sources", nargs="+", required=True, help="JSONL files or hub ids, as data.sources takes them")
    p.add_argument("--rows", type=int, required=True, help="prompts to answer")
    p.add_argument("--max_prompt_tokens", type=int, default=160)
    p.add_argument("--max_new_tokens", type=int, default=160)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--method", default="ar")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()

    # More --rows of the same go on; a reply does not depend on the batch it was made in.
    fixed = {name: value for name, value in vars(args).items() if name not in ("out", "rows", "batch_size")}
    same_settings(args.out.with_name(args.out.name + ".settings.json"), fixed)
    done = kept_rows(args.out)
    asked = done[-1]["asked"] if done else 0
    lm = load(args.ckpt, dtype=args.dtype)
    prompts = ((prompt, encode(lm, prompt)) for prompt in in_turn(args.sources, args.seed))
    short = itertools.islice((pair for pair in prompts if len(pair[1]) <= args.max_prompt_tokens), args.rows)
    config = DecodeConfig(method=args.method, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)
    bar = tqdm(total=args.rows, initial=asked, unit="row", mininterval=10)
    todo = itertools.islice(short, asked, None)
    while batch := list(itertools.islice(todo, args.batch_size)):
        (results,) = generate_batches(lm, [ids for _, ids in batch], config)
        asked += len(batch)
        lines = [
            {"messages": [*prompt, {"role": "assistant", "content": result.text}], "asked": asked}
            for (prompt, _), result in zip(batch, results, strict=True)
            if repeated_4grams(result.tokens) < LOOPS and result.text.strip()
        ]
        keep_rows(args.out, lines)
        done += lines
        bar.update(len(batch))
    print(f"{asked} prompts answered, {len(done)} replies kept; wrote {args.out}")


if __name__ == "__main__":
    run_command(main)
