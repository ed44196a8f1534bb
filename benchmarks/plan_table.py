"""Compile every config that names a TPU slice with XLA:TPU, and write what a step takes per chip to docs/plan.md.

    python benchmarks/plan_table.py [configs/llama-3-8b-v5e.yaml ...]     # needs the tpu extra; no TPU
    python benchmarks/plan_table.py starcoder2-7b@v5e:4x4                 # decoding: a named shape on a slice

Rows that are not named stay as they are; without arguments, all training configs. An 8B model takes a few minutes
each on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

from msn_jax.terminal import run_command

ROOT = Path(__file__).parent.parent
TABLE, ROWS = ROOT / "docs" / "plan.md", ROOT / "docs" / "plan.jsonl"
HEAD = """# What the shipped configs take

One training step of each config, compiled by XLA:TPU for its slice (no TPU needed), in GiB a chip. Made by
`python benchmarks/plan_table.py`; the configs without a slice are estimates that count bytes.

| config | slice or devices | mesh | tokens a step | state + batch | temporaries | of a chip |
|---|---|---|---|---|---|---|
"""
DECODE_HEAD = """
The decode loop of their models in bfloat16, all chips of the slice along the tensor axis, the whole context in the
cache, trees of 69 nodes. Kv heads that do not divide over the chips are on every one of them.

| shape | slice | cache slots | batch | weights + cache | temporaries | of a chip | cache copies |
|---|---|---|---|---|---|---|---|
"""


def plan(name: str) -> dict:
    if "@" in name:
        shape, topology = name.split("@")
        command = ["decode.py", "--plan", "--ckpt", shape, "--topology", topology]
    else:
        command = ["train.py", "--config", name, "--plan"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"plan_table.py: {name} could not be planned; its message is above")
    print(done.stdout, flush=True)
    return {"config": Path(name).name} | json.loads(done.stdout.splitlines()[-1])


def gib(row: dict, name: str) -> str:
    return f"{row[name] / 2**30:.2f}"


def line(row: dict) -> str:
    mesh = " x ".join(map(str, row["mesh"]))
    if row.get("estimate"):
        where, sizes = "estimate", [gib(row, "state_bytes"), gib(row, "activation_bytes"), "-"]
    else:
        sizes = [gib(row, "argument_bytes"), gib(row, "temp_bytes"), f"{row['chip_frac']:.0%}"]
        where = row["topology"]
    return "| " + " | ".join([row["config"], where, mesh, f"{row['tokens_per_step']:,}", *sizes]) + " |\n"


def decode_lines(row: dict) -> str:
    out = ""
    for program, loop in row["programs"].items():
        if program.startswith("loop x"):
            cells = [row["model"], row["topology"], f"{row['slots']:,}", program.removeprefix("loop x")]
            cells += [gib(loop, "argument_bytes"), gib(loop, "temp_bytes"), f"{loop['chip_frac']:.0%}"]
            out += "| " + " | ".join([*cells, str(loop["cache_copies"])]) + " |\n"
    return out


def write(rows: dict[str, dict]) -> None:
    ROWS.parent.mkdir(exist_ok=True)
    ordered = [rows[name] for name in sorted(rows)]
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in ordered))
    train, decode = ([row for row in ordered if ("programs" in row) == kind] for kind in (False, True))
    text = HEAD + "".join(map(line, train))
    TABLE.write_text(text + (DECODE_HEAD + "".join(map(decode_lines, decode)) if decode else ""))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("names", nargs="*", help="configs, or SHAPE@TOPOLOGY to decode; none: all training configs")
    names = p.parse_args().names
    named = [name if "@" in name else str(Path(name).resolve()) for name in names]
    rows = {r["config"]: r for r in map(json.loads, ROWS.read_text().splitlines())} if ROWS.exists() else {}
    for name in named or map(str, sorted((ROOT / "configs").glob("*.yaml"))):
        meant = {} if "@" in name else yaml.safe_load(Path(name).read_text()).get("mesh", {})
        if named or meant.get("topology") or meant.get("fsdp"):
            row = plan(name)
            rows[row["config"]] = row
            write(rows)


if __name__ == "__main__":
    run_command(main)
