"""Compile every config that names a TPU slice with XLA:TPU, and write what a step takes per chip to docs/plan.md.

    python benchmarks/plan_table.py [configs/llama-3-8b-v5e.yaml ...]     # needs the tpu extra; no TPU
    python benchmarks/plan_table.py starcoder2-7b@v5e:4x4                 # decoding: a named shape on a slice
    python benchmarks/plan_table.py llama-3-8b@v5e:2x4 --trees mix16,mix64 --batches 1,8      # cycles of these trees

Rows that are not named stay as they are; without arguments, all training configs. An 8B model takes a few minutes
each on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

if "--trees" in sys.argv:
    # The TPU compiler needs no TPU, but must not look for one.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")

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
TREES_HEAD = """
What a cycle takes by XLA:TPU's own estimates, in bfloat16, all chips of the slice along the tensor axis, the whole
context in the cache: the longer of its operations at the chip's clock and of reading weights and cache, without what
the chips exchange. By tree (nodes): the ratio to one token.

| shape | slice | cache slots | batch | one token, ms | """


def plan(name: str) -> dict:
    if "@" in name:
        shape, topology = name.split("@")
        command = ["decode.py", "--plan", "--ckpt", shape, "--topology", topology, "--tree", "msn69"]
    else:
        command = ["train.py", "--config", name, "--plan"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"plan_table.py: {name} could not be planned; its message is above")
    print(done.stdout, flush=True)
    return {"config": Path(name).name} | json.loads(done.stdout.splitlines()[-1])


def plan_trees(name: str, trees: list[str], batches: list[int], row: dict) -> Iterator[dict]:
    """The row of these trees, with each figure as it comes; those that it holds already are kept."""
    import jax

    from msn_jax.decode.tree_sets import TREE_SETS
    from msn_jax.plan import tree_plan

    shape, topology = name.split("@")
    row = {"config": f"{name} trees", "model": shape, "topology": topology, "jax": jax.__version__} | row
    for batch in batches:
        for tree in ["root", *trees]:
            cycles = row.setdefault("cycles", {}).setdefault(str(batch), {})
            if tree not in cycles:
                cycles[tree] = {"nodes": TREE_SETS[tree].trees[-1].size} | tree_plan(shape, topology, tree, batch)
                print(f"{name}, batch {batch}, {tree}: {cycles[tree]}", flush=True)
                yield row


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


def tree_lines(rows: list[dict]) -> str:
    """A line for each slice and batch, a column for each tree, by size."""
    found = {tree: cycle["nodes"] for row in rows for by in row["cycles"].values() for tree, cycle in by.items()}
    names = sorted(found.keys() - {"root"}, key=lambda tree: (found[tree], tree))
    out = " | ".join(f"{tree} ({found[tree]})" for tree in names) + " |\n" + "|---" * (5 + len(names)) + "|\n"
    for row in rows:
        for batch, by in row["cycles"].items():
            one = by["root"]["estimated_s"]
            cells = [row["model"], row["topology"], f"{by['root']['slots']:,}", batch, f"{1e3 * one:.2f}"]
            ratios = [f"{by[tree]['estimated_s'] / one:.2f}" if tree in by else "" for tree in names]
            out += "| " + " | ".join(cells + ratios) + " |\n"
    return out


def write(rows: dict[str, dict]) -> None:
    ROWS.parent.mkdir(exist_ok=True)
    ordered = [rows[name] for name in sorted(rows)]
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in ordered))
    decode, trees = ([row for row in ordered if key in row] for key in ("programs", "cycles"))
    text = HEAD + "".join(line(row) for row in ordered if row not in decode + trees)
    text += DECODE_HEAD + "".join(map(decode_lines, decode)) if decode else ""
    TABLE.write_text(text + (TREES_HEAD + tree_lines(trees) if trees else ""))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("names", nargs="*", help="configs, or SHAPE@TOPOLOGY to decode; none: all training configs")
    p.add_argument("--trees", default="", help="of SHAPE@TOPOLOGY: these alone, a cycle of each")
    p.add_argument("--batches", default="1,8", help="with --trees")
    args = p.parse_args()
    names = [name if "@" in name else str(Path(name).resolve()) for name in args.names]
    rows = {r["config"]: r for r in map(json.loads, ROWS.read_text().splitlines())} if ROWS.exists() else {}
    if args.trees:
        for name in names:
            earlier = rows.get(f"{name} trees", {})
            for row in plan_trees(name, args.trees.split(","), [int(n) for n in args.batches.split(",")], earlier):
                rows[row["config"]] = row
                write(rows)
        return
    for name in names or map(str, sorted((ROOT / "configs").glob("*.yaml"))):
        meant = {} if "@" in name else yaml.safe_load(Path(name).read_text()).get("mesh", {})
        if names or meant.get("topology") or meant.get("fsdp"):
            row = plan(name)
            rows[row["config"]] = row
            write(rows)


if __name__ == "__main__":
    run_command(main)
