"""Compile every config that names a TPU slice with XLA:TPU, and write what a step takes per chip to docs/plan.md.

    python benchmarks/plan_table.py [configs/llama-3-8b-v5e.yaml ...]     # needs the tpu extra; no TPU

Rows of configs that are not named stay as they are. An 8B model takes a few minutes each on two cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
TABLE, ROWS = ROOT / "docs" / "plan.md", ROOT / "docs" / "plan.jsonl"
HEAD = """# What the shipped configs take

One training step of each config, compiled by XLA:TPU for its slice (no TPU needed), in GiB a chip. Made by
`python benchmarks/plan_table.py`; the configs without a slice are estimates that count bytes.

| config | slice or devices | mesh | tokens a step | state + batch | temporaries | of a chip |
|---|---|---|---|---|---|---|
"""


def plan(config: Path) -> dict:
    command = [sys.executable, "train.py", "--config", str(config), "--plan"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"plan_table.py: {config} could not be planned; its message is above")
    print(done.stdout, flush=True)
    return {"config": config.name} | json.loads(done.stdout.splitlines()[-1])


def line(row: dict) -> str:
    gib = lambda name: f"{row[name] / 2**30:.2f}"
    mesh = " x ".join(map(str, row["mesh"]))
    if row.get("estimate"):
        where, sizes = "estimate", [gib("state_bytes"), gib("activation_bytes"), "-"]
    else:
        where, sizes = row["topology"], [gib("argument_bytes"), gib("temp_bytes"), f"{row['chip_frac']:.0%}"]
    return "| " + " | ".join([row["config"], where, mesh, f"{row['tokens_per_step']:,}", *sizes]) + " |"


def main() -> None:
    named = [Path(name).resolve() for name in sys.argv[1:]]
    configs = named or sorted((ROOT / "configs").glob("*.yaml"))
    rows = {r["config"]: r for r in map(json.loads, ROWS.read_text().splitlines())} if ROWS.exists() else {}
    for config in configs:
        meant = yaml.safe_load(config.read_text()).get("mesh", {})
        if named or meant.get("topology") or meant.get("fsdp"):
            rows[config.name] = plan(config)
            ROWS.parent.mkdir(exist_ok=True)
            ROWS.write_text("".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))
            TABLE.write_text(HEAD + "".join(line(rows[name]) + "\n" for name in sorted(rows)))


if __name__ == "__main__":
    main()
