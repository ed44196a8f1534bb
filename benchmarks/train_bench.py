"""Speed of the training step: tokens/s, share of the matmul rate, peak memory, compile time; against torch on request.

    python benchmarks/train_bench.py --ckpt smollm2-135m-instruct [--torch_python .venv-torch/bin/python]

Full fine-tuning on random tokens, noise included. The matmul rate is measured in the same run, between the steps.
torch trains the same weights (exported to a temporary directory) on the same batch with AdamW, in an environment of
its own; the two take turns.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from msn_jax import InputError, train_step
from msn_jax.config import DataConfig, DataSource, ModelStart, NoiseConfig, RunConfig, TrainConfig
from msn_jax.io import export, hf
from msn_jax.io.loading import open_checkpoint
from msn_jax.records import print_record
from msn_jax.shapes import SHAPES
from msn_jax.sharding import make_mesh
from msn_jax.terminal import run_command

TORCH = """
import json, sys, time
import numpy as np, torch
from transformers import AutoModelForCausalLM
folder, batch, dtype = sys.argv[1:4]
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
data = np.load(batch)
ids, labels = (torch.tensor(data[name], dtype=torch.long, device=device) for name in ("tokens", "labels"))
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    value = loss.item()
    print(json.dumps([time.perf_counter() - start, value]), flush=True)
"""


def matmul_rate(dtype, size: int) -> float:
    """FLOP/s of one large matrix product, the best of a few."""
    a = jnp.ones((size, size), dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision))
    multiply(a, a).block_until_ready()
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def make_batch(rows: int, tokens: int, vocab: int) -> dict[str, np.ndarray]:
    """Rows of one example each, the last 40% of it a reply, a usual share."""
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(0, vocab, (rows, tokens), np.int32),
        "segment_ids": np.ones((rows, tokens), np.int32),
        "positions": np.tile(np.arange(tokens, dtype=np.int32), (rows, 1)),
        "response": np.tile(np.arange(tokens) >= 0.6 * tokens, (rows, 1)),
    }


def place_batch(batch: dict[str, np.ndarray], mesh) -> dict[str, jax.Array]:
    """A batch as a step takes it on the mesh."""
    rows, tokens = batch["tokens"].shape
    shapes = train_step.batch_shapes(rows, tokens, mesh)
    return jax.device_put(batch, jax.tree.map(lambda s: s.sharding, shapes))


def random_run(ckpt: str, tokens: int, **train) -> RunConfig:
    """Full fine-tuning on rows of random tokens; train: fields of TrainConfig."""
    return RunConfig(
        model=ModelStart(ckpt=ckpt),
        data=DataConfig(sources=[DataSource(path="random tokens")], max_tokens=tokens),
        noise=NoiseConfig(),
        train=TrainConfig(out="nowhere", steps=1000, learning_rate=1e-5, **train),
    )


def peak_bytes() -> int:
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--ckpt", default="smollm2-135m-instruct", help="checkpoint, or a named shape with random weights")
    p.add_argument("--batch_size", type=int, default=4)
    p.add_argument("--tokens", type=int, default=512, help="a row")
    p.add_argument("--accumulate", type=int, default=1)
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--remat", default="none", choices=("full", "dots", "none"))
    p.add_argument("--head_chunk", type=int, default=128)
    p.add_argument("--steps", type=int, default=5, help="measured, after one that is not")
    p.add_argument("--matmul_size", type=int, default=2048)
    p.add_argument("--torch_python", help="a Python with torch and transformers, to compare with")
    args = p.parse_args()

    devices = jax.devices()
    mesh = make_mesh(fsdp=len(devices))
    if args.ckpt in SHAPES:
        cfg, params = SHAPES[args.ckpt], None
    else:
        opened = open_checkpoint(args.ckpt)
        cfg, params = opened.cfg, hf.load_params(opened.cfg, opened.source, jnp.float32, mesh, stacked=True)
    settings = {name: getattr(args, name) for name in ("batch_size", "accumulate", "dtype", "remat", "head_chunk")}
    run = random_run(args.ckpt, args.tokens, **settings)
    batch = make_batch(args.batch_size, args.tokens, cfg.vocab_size)
    torch = None
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        if args.torch_python:
            if args.ckpt in SHAPES:
                raise InputError("--torch_python needs a checkpoint, not a shape")
            export.export_hf(f"{folder}/hf", cfg, params, opened.tokenizer, opened.stop_ids)
            labels = np.where(batch["response"], batch["tokens"], -100)
            np.savez(f"{folder}/batch.npz", tokens=batch["tokens"], labels=labels)
            command = [args.torch_python, "-c", TORCH, f"{folder}/hf", f"{folder}/batch.npz", args.dtype]
            torch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            if torch.stdout.readline().strip() != "ready":
                raise InputError("--torch_python: torch did not start; its message is above")
        state = train_step.init_state(cfg, run, mesh, params)
        placed = place_batch(batch, mesh)
        step = train_step.jit_train_step(cfg, run, mesh)
        start = time.perf_counter()
        step = step.lower(state, None, placed).compile()
        compile_s = time.perf_counter() - start
        ours, theirs, rates, losses = [], [], [], []
        for i in range(args.steps + 1):
            rates.append(matmul_rate(jnp.dtype(args.dtype), args.matmul_size))
            start = time.perf_counter()
            state, report = jax.block_until_ready(step(state, None, placed))
            ours.append(time.perf_counter() - start)
            if torch:
                torch.stdin.write("\n")
                torch.stdin.flush()
                seconds, loss = json.loads(torch.stdout.readline())
                theirs.append(seconds)
                losses.append(loss)
            print(f"step {i}: {ours[-1]:.2f} s" + (f", torch {theirs[-1]:.2f} s" if torch else ""), file=sys.stderr)
        if torch:
            torch.stdin.close()
            torch.wait()
    tokens = args.batch_size * args.tokens
    parameters = sum(p.size for p in jax.tree.leaves(state.params))
    # The median: a shared machine has its moments.
    step_s, rate = float(np.median(ours[1:])), float(np.median(rates[1:]))
    peak = train_step.peak_flops(devices[0].device_kind, args.dtype)
    flops = 6 * parameters * tokens / step_s / len(devices)
    row = {
        "parameters": parameters,
        "tokens_per_step": tokens,
        "step_s": step_s,
        "tokens_per_s": tokens / step_s,
        "matmul_flops_per_s": rate,
        "matmul_rate_frac": flops / rate,
        "mfu": flops / peak if peak else None,
        "peak_bytes": peak_bytes(),
        "compile_s": compile_s,
    }
    print(f"{parameters:,} parameters, {args.batch_size} x {args.tokens} tokens, {args.dtype}, remat {args.remat}")
    print(f"{tokens / step_s:.0f} tokens/s, {step_s:.2f} s a step, compiled in {compile_s:.0f} s")
    print(f"{flops / rate:.1%} of the matmul rate of this run ({rate / 1e9:.0f} GFLOP/s)")
    if peak:
        print(f"{flops / peak:.1%} of the device's peak")
    print(f"peak memory {row['peak_bytes'] / 2**30:.2f} GiB")
    if theirs:
        row["torch_tokens_per_s"] = tokens / float(np.median(theirs[1:]))
        row["ratio_to_torch"] = row["tokens_per_s"] / row["torch_tokens_per_s"]
        row["torch_first_loss"] = losses[0]
        print(f"torch: {row['torch_tokens_per_s']:.0f} tokens/s; ours is {row['ratio_to_torch']:.2f} times that")
    print_record(dtype=args.dtype, remat=args.remat, **row)


if __name__ == "__main__":
    run_command(main)
