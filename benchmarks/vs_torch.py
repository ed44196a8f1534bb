"""Plain decoding against torch transformers `generate`: the same weights, float32, greedy, taking turns.

    python benchmarks/vs_torch.py --ckpt MODEL.gguf --torch_python TORCH_VENV/bin/python

TORCH_VENV holds torch, transformers, accelerate and gguf; this package needs neither torch nor accelerate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

PROMPTS = [
    "Explain how a bicycle stays upright while it is moving.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "What are the main differences between a lake and a sea?",
    "Describe the steps to make bread at home.",
]


def serve_torch(ckpt: str, new_tokens: int) -> None:
    """Answer each line of token ids on standard input with the new ids and the seconds they took."""
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(ckpt)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    print("ready", flush=True)
    for line in sys.stdin:
        ids = torch.tensor([json.loads(line)])
        seconds = []
        for count in (1, new_tokens):  # the first token carries the prefill, which is not compared
            start = time.perf_counter()
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
            seconds.append(time.perf_counter() - start)
        tokens = out[0, ids.shape[1] :].tolist()
        print(json.dumps({"tokens": tokens, "tokens_per_s": (new_tokens - 1) / (seconds[1] - seconds[0])}), flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", required=True, help="a .gguf file")
    p.add_argument("--torch_python", default=sys.executable, help="the Python of the venv that has torch")
    p.add_argument("--max_new_tokens", type=int, default=128)
    p.add_argument("--batch_size", type=int, default=8, help="also measured: ar at this batch size")
    p.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.serve:
        return serve_torch(args.ckpt, args.max_new_tokens)

    from msn_jax import DecodeConfig, load
    from msn_jax.decode.generate import generate_batches
    from msn_jax.decode.prompts import encode
    from msn_jax.records import print_record

    lm = load(args.ckpt)
    command = [
        args.torch_python,
        __file__,
        "--serve",
        "--ckpt",
        args.ckpt,
        "--max_new_tokens",
        str(args.max_new_tokens),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    torch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    if torch.stdout.readline() != "ready\n":
        sys.exit(f"vs_torch.py: error: {args.torch_python} cannot load {args.ckpt} with torch and transformers")

    prompts = [encode(lm, [{"role": "user", "content": text}]) for text in PROMPTS]
    no_stop = DecodeConfig(method="ar", max_new_tokens=args.max_new_tokens)
    lm = type(lm)(**{**vars(lm), "stop_ids": ()})
    ours, theirs, batched, same = [], [], [], 0
    list(generate_batches(lm, prompts[:1], no_stop))  # both compile or warm up outside the comparison
    for ids in prompts:
        ((result,),) = list(generate_batches(lm, [ids], no_stop))
        ours.append(result.tokens_per_s)
        torch.stdin.write(json.dumps(ids) + "\n")
        torch.stdin.flush()
        answer = json.loads(torch.stdout.readline())
        theirs.append(answer["tokens_per_s"])
        same += answer["tokens"] == result.tokens
        many = DecodeConfig(method="ar", max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)
        (rows,) = list(generate_batches(lm, [ids] * args.batch_size, many))
        # `seconds` of a row is the batch's over its size.
        batched.append(sum(len(r.tokens) for r in rows) / sum(r.seconds for r in rows))
    torch.stdin.close()
    mean = lambda values: len(values) / sum(1 / v for v in values)
    figures = {
        "ar_tokens_per_s": round(mean(ours), 2),
        "torch_tokens_per_s": round(mean(theirs), 2),
        "ratio_to_torch": round(mean(ours) / mean(theirs), 3),
        "batch_size": args.batch_size,
        "batch_tokens_per_s": round(mean(batched), 2),
        "batch_ratio_to_batch_1": round(mean(batched) / mean(ours), 3),
        "prompts": len(prompts),
        "identical_to_torch": same,
    }
    for name, value in figures.items():
        print(f"{name:<24} {value}")
    print_record(dtype="float32", **figures)


if __name__ == "__main__":
    main()
