"""Does noise teach what decoding needs? Accuracy by noise depth on held-out text, with and without noise training.

    python -m experiments.noise_depth --out runs/noise_depth [--config configs/tiny.yaml --seeds 0,1,2]

Trains the config once for each kind and seed (train.py, resumable) and compares, teacher-forced on the same held-out
text with the same noise. Depth j predicts the token j + 1 places after the last clean one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from msn_jax.io.run_dir import read_config
from msn_jax.records import kept_rows, print_record
from msn_jax.terminal import run_command

ROOT = Path(__file__).parent.parent


def final_metrics(config: str, folder: Path, kind: str, seed: int) -> dict[str, float]:
    """Of the last step of a run, which is made or finished first where it is not complete."""
    done = kept_rows(folder / "metrics.jsonl")
    if not done or done[-1]["step"] < read_config(folder).train.steps:
        settings = {
            "noise.kind": kind,
            "train.seed": seed,
            "train.out": folder,
            "data.held_out": 600,
            "train.eval_batches": 1000,
            "train.eval_every": 10**6,
        }
        flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
        subprocess.run([sys.executable, "train.py", "--config", config, *flags], cwd=ROOT, check=True)
    return kept_rows(folder / "metrics.jsonl")[-1]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--config", default="configs/tiny.yaml")
    p.add_argument("--out", required=True, help="directory of the runs")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--kinds", default="ahead,none")
    args = p.parse_args()
    kinds, seeds = args.kinds.split(","), [int(seed) for seed in args.seeds.split(",")]
    out = Path(args.out).absolute()
    runs = {kind: [final_metrics(args.config, out / f"{kind}-{s}", kind, s) for s in seeds] for kind in kinds}
    names = sorted(name for name in runs[kinds[0]][0] if name.startswith("eval_"))
    table = {kind: {name: [run[name] for run in found] for name in names} for kind, found in runs.items()}
    print(f"mean of {len(seeds)} seeds (each seed)")
    for name in names:
        cells = (f"{np.mean(v):.4f} ({', '.join(f'{x:.4f}' for x in v)})" for v in (table[k][name] for k in kinds))
        print(f"{name:<20} " + "  ".join(f"{kind}: {cell}" for kind, cell in zip(kinds, cells, strict=True)))
    print_record(seeds=seeds, kinds=table)


if __name__ == "__main__":
    run_command(main)
