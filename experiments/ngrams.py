"""The n-grams of a model's own replies, as an adapter that drafts and changes no weight.

    python -m experiments.ngrams --ckpt smollm2-135m-instruct --replies own.jsonl --out DIR

own.jsonl: what own_responses.py wrote. Replies that loop are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.packed import encoded
from msn_jax import InputError, load
from msn_jax.answers import LOOPS, repeated_4grams
from msn_jax.config import DataSource, LoraConfig
from msn_jax.io.adapters import loaded_fingerprint, save_adapter
from msn_jax.ngrams import ORDER, SLOTS, make_table
from msn_jax.rows import read_rows
from msn_jax.terminal import run_command


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", required=True)
    p.add_argument("--replies", type=Path, required=True, help="JSONL of messages, as own_responses.py writes it")
    p.add_argument("--out", type=Path, required=True, help="directory for --adapter")
    p.add_argument("--least", type=int, default=2, help="a context of two tokens or more came so often")
    p.add_argument("--buckets", type=int, default=2**17, help=f"of {SLOTS} contexts each; a power of two")
    args = p.parse_args()
    if args.buckets < 1 or args.buckets & (args.buckets - 1):
        raise InputError(f"--buckets {args.buckets}: accepted: a power of two")
    rows = list(read_rows(DataSource(path=str(args.replies))))
    if not all(isinstance(row.get("messages"), list) for row in rows):
        raise InputError(f"--replies {args.replies}: a row without messages; accepted: what own_responses.py writes")
    talks = [row["messages"] for row in rows]
    lm = load(args.ckpt)
    texts = []
    for tokens, response in encoded(lm, talks, lm.cfg.max_position):
        first = int(response.argmax())
        reply = tokens[first:].tolist()
        if repeated_4grams(reply) < LOOPS:
            texts.append((tokens[max(first - ORDER, 0) : first].tolist(), reply))
    if not texts:
        raise InputError(f"--replies {args.replies}: no reply that does not loop")
    table, lost = make_table(texts, lm.cfg.vocab_size, args.least, args.buckets)
    save_adapter(args.out, table, LoraConfig(), args.ckpt, loaded_fingerprint(lm.params))
    kept, size = int((table.keys > 0).sum()), (args.out / "adapter.safetensors").stat().st_size
    print(f"{len(texts)} replies, {kept:,} contexts, {lost:,} without a place; wrote {args.out}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
