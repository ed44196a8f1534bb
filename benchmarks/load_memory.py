"""Host memory that loading a checkpoint takes at its peak, over what the process had before.

    python benchmarks/load_memory.py [--shape 1b]

Writes random bfloat16 weights of a named shape in four shards to a temporary directory, then loads them, each time in
a process of its own: in bfloat16 for decoding, in float32 stacked for training, on one device and on eight simulated
ones. `peak` is the kernel's high-water mark of resident memory (on CPU the devices' arrays are part of it); pages of a
mapped weights file count in it while the file is open. `anonymous` leaves those out (sampled every 5 ms).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from msn_jax.records import print_record
from msn_jax.terminal import run_command

SHARDS = 4
# Name: (stacked for training, dtype, mesh axis to split over, devices).
CASES = {
    "decode": (False, "bfloat16", "tensor", 1),
    "train": (True, "float32", "fsdp", 1),
    "decode, 8 devices": (False, "bfloat16", "tensor", 8),
    "train, 8 devices": (True, "float32", "fsdp", 8),
}


def write_checkpoint(folder: Path, shape: str) -> None:
    """Random weights, in the order of the layers, as published shards have them."""
    import ml_dtypes
    from safetensors.numpy import save_file

    from msn_jax.io import hf
    from msn_jax.io.export import hf_config
    from msn_jax.shapes import SHAPES

    shapes = hf.tensors(SHAPES[shape])
    layer = lambda name: int(name.split(".")[2]) if name.startswith("model.layers.") else -1
    names, whole = sorted(shapes, key=layer), sum(map(math.prod, shapes.values()))
    noise = np.random.default_rng(0).standard_normal(2**20).astype(ml_dtypes.bfloat16)
    shards, filled = [[] for _ in range(SHARDS)], 0
    for name in names:
        shards[filled * SHARDS // whole].append(name)
        filled += math.prod(shapes[name])
    where = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        save_file({name: np.resize(noise, shapes[name]) for name in shard}, folder / file)
        where |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(hf_config(SHAPES[shape])))


def status(*fields: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[field].split()[0]) for field in fields) * 1024


def load(folder: Path, case: str) -> None:
    """In a process of its own: load, and print what it took."""
    import jax

    from msn_jax.io import hf
    from msn_jax.params import declare
    from msn_jax.sharding import make_mesh

    stacked, dtype, axis, devices = CASES[case]
    mesh = make_mesh(**{axis: devices}) if devices > 1 else None
    cfg = hf.read_config(folder)
    jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[0]))
    before, peaks, done = status("VmRSS"), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peaks[0] = max(peaks[0], status("RssAnon", "RssShmem"))

    anonymous = status("RssAnon", "RssShmem")
    thread = threading.Thread(target=watch)
    thread.start()
    params = jax.block_until_ready(hf.load_params(cfg, hf.SafetensorsSource(folder), dtype, mesh, stacked))
    done.set()
    thread.join()
    largest = max(math.prod(s.shape) for s in jax.tree.leaves(declare(cfg, stacked))) * np.dtype(dtype).itemsize
    row = {
        "weights_bytes": sum(a.nbytes for a in jax.tree.leaves(params)),
        "largest_array_bytes": largest,
        "shard_bytes": max(file.stat().st_size for file in folder.glob("*.safetensors")),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "peak_anonymous_bytes": peaks[0] - anonymous,
    }
    print(json.dumps(row))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--shape", default="1b", help="a name in msn_jax/shapes.py")
    p.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.load:
        return load(Path(args.load[0]), args.load[1])
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), args.shape)
        print(f"{'GB':<18} {'weights':>8} {'array':>6} {'shard':>6} {'peak':>6} {'anonymous':>10} {'limit':>6}")
        for case, (stacked, *_, devices) in CASES.items():
            flags = f"--xla_force_host_platform_device_count={devices}"
            done = subprocess.run(
                [sys.executable, __file__, "--load", folder, case],
                env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
                stdout=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                sys.exit(f"load_memory.py: {case} failed; its message is above")
            row = rows[case] = json.loads(done.stdout.splitlines()[-1])
            # What was asked for: the weights and one shard; to train, one stacked array more.
            row["limit_bytes"] = row["weights_bytes"] + row["shard_bytes"] + row["largest_array_bytes"] * stacked
            sizes = [row[name] / 1e9 for name in ("weights_bytes", "largest_array_bytes", "shard_bytes")]
            sizes += [row[name] / 1e9 for name in ("peak_bytes", "peak_anonymous_bytes", "limit_bytes")]
            print(f"{case:<18} {sizes[0]:>8.2f} {sizes[1]:>6.2f} {sizes[2]:>6.2f} {sizes[3]:>6.2f}", end=" ")
            print(f"{sizes[4]:>10.2f} {sizes[5]:>6.2f}{'' if sizes[3] <= sizes[5] else ' exceeded'}", flush=True)
    print_record(shape=args.shape, cases=rows)


if __name__ == "__main__":
    run_command(main)
