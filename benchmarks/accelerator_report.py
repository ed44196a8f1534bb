"""docs/accelerators.md from what accelerator.py left in one or more folders; nothing is typed in.

python benchmarks/accelerator_report.py DIR... [--write docs/accelerators.md]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

from msn_jax.answers import figures

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, with `benchmarks` beside it

from benchmarks.stages.files import read, row_of  # noqa: E402

STAGES = ("check", "passes", "graphs", "decode", "train", "learn")


def read_all(folder: Path) -> dict[str, dict]:
    """The stages that a folder holds."""
    return {name: file for name in STAGES if (file := read(folder / f"{name}.json"))}


def table(head: list[str], rows: list[list]) -> list[str]:
    return ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"] + [
        "| " + " | ".join(str(cell) for cell in row) + " |" for row in rows
    ]


def decode_figures(answers: list[dict]) -> dict[str, dict]:
    """By method what answers.figures says, and the time of a pass."""
    by_method = defaultdict(list)
    for row in answers:
        by_method[row["method"]].append(row)
    return {
        name: figures(rows, by_method["ar"])
        | {"ms_a_pass": round(1e3 * sum(r["seconds"] for r in rows) / max(1, sum(r["forwards"] for r in rows)), 3)}
        for name, rows in by_method.items()
    }


def answers_of(stage: dict) -> list[dict]:
    """All answers that the stage `decode` has kept."""
    return [answer for row in stage["rows"] for answer in row.get("answers", [])]


def passes_table(stage: dict) -> list[str]:
    groups = defaultdict(dict)
    for row in stage["rows"]:
        if "nodes" in row["what"]:
            key = tuple(row["what"][k] for k in ("weights", "dtype", "slots", "batch"))
            groups[key][row["what"]["nodes"]] = row
    if not groups:
        return []
    nodes = sorted({n for rows in groups.values() for n in rows})
    head = ["weights", "dtype", "slots", "batch", "one token, ms", "to the floor", *[f"{n} nodes" for n in nodes[1:]]]
    cells = []
    for key, rows in groups.items():
        one = rows.get(1, {})
        if "ms" not in one:
            continue
        ratio = lambda row, one=one: f"{row['ms'] / one['ms']:.2f}" if "ms" in row else "failed"
        first = [f"{one['ms']:.2f}", f"{one['ms'] / one['floor_ms']:.2f}"]
        cells.append([*key, *first, *[ratio(rows[n]) if n in rows else "" for n in nodes[1:]]])
    return table(head, cells)


def section(folder: Path) -> list[str]:
    stages = read_all(folder)
    if not stages:
        return [f"{folder.name}: no figures"]
    machine = next(iter(stages.values()))["machine"]
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB for jax" if machine["memory_bytes"] else ""
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    commits = sorted({stage["commit"] for stage in stages.values()})
    lines = [f"## {machine['device']}", ""]
    lines += [f"{machine['devices']} device{memory}{driver}, jax {machine['jax']}; commit {', '.join(commits)}."]
    makers = {
        "check": check_lines,
        "passes": passes_lines,
        "graphs": graphs_lines,
        "decode": decode_lines,
        "train": train_lines,
        "learn": learn_lines,
    }
    for name, stage in stages.items():
        lines += ["", *makers[name](stage, stages)]
        if not stage["complete"]:
            reasons = sorted({left["reason"] for left in stage["left_out"]}) or ["cut off"]
            lines += ["", f"Not all of this was measured: {'; '.join(reasons)}."]
    return lines + lines_of(folder / "lines.jsonl")


def lines_of(file: Path) -> list[str]:
    """The closing JSON lines of step_cost.py and train_bench.py that stand in a folder's lines.jsonl."""
    if not file.exists():
        return []
    lines = ["", "### From step_cost.py and train_bench.py"]
    for line in map(json.loads, file.read_text().splitlines()):
        lines += ["", f"`{line['command']}` at {line['commit']}:"]
        if "nodes" in line:
            cells = [[n, f"{row['ms']:.2f}", f"{row['ratio_to_first']:.2f}"] for n, row in line["nodes"].items()]
            lines += table(["nodes", "ms a pass", "to the first"], cells)
        else:
            mfu = f", {line['mfu']:.1%} of the device's peak" if line["mfu"] else ""
            lines += [
                f"{line['parameters'] / 1e6:.0f} million parameters, remat {line['remat']}: "
                f"{line['tokens_per_s']:.0f} tokens/s{mfu}, {line['matmul_rate_frac']:.0%} of the rate of a "
                f"large product, {line['peak_bytes'] / 2**30:.1f} GiB at most, compiled in "
                f"{line['compile_s']:.0f} s."
            ]
    return lines


def check_lines(stage: dict, _) -> list[str]:
    lines = ["### Is the output right"]
    if row := row_of(stage, what="float32 product"):
        lines += ["", f"A float32 product is off by at most {row['largest_error']:.1e} of its largest value."]
    if row := row_of(stage, what="cudnn attention"):
        got = f"off by at most {row['largest_error']:.1e}" if "largest_error" in row else f"fails: {row['error']}"
        lines += ["", f"Gradients of cuDNN's attention, bfloat16, packed rows, against XLA's form: {got}."]
    rows = []
    for row in stage["rows"]:
        if "method" in row["what"]:
            named = [row["what"]["dtype"], shown(row["what"]["method"])]
            if "error" in row:
                rows.append([*named, f"failed: {row['error']}", "", "", "", ""])
                continue
            gaps = [d["gap"] for d in row["first_differences"]]
            counts = [row[k] for k in ("identical", "near_ties", "different")]
            rows.append([*named, row["against"], row["outputs"], *counts[:1], sum(counts[1:]), most(gaps)])
    head = ["dtype", "method", "against", "answers", "identical", "others", "largest gap of the two best scores there"]
    return lines + table(head, rows)


def most(gaps: list[float]) -> str:
    return f"{max(gaps):.4f}" if gaps else ""


def shown(method: str) -> str:
    """The method as a reader sees it: + stands for the adapter."""
    return f"{method[1:]}, adapter" if method.startswith("+") else method


def passes_lines(stage: dict, _) -> list[str]:
    lines = ["### What a pass costs", ""]
    if row := row_of(stage, what="copy"):
        lines += [
            f"Inside the compiled loop; the floor reads weights and the filled half of the cache once, at the "
            f"{row['bytes_per_s'] / 1e9:.0f} GB/s of a copy in the same run. By nodes: ratios to one token."
        ]
    return lines + passes_table(stage)


def graphs_lines(stage: dict, stages: dict) -> list[str]:
    lines = ["### The same under CUDA graphs", "", f"`XLA_FLAGS={stage['machine']['xla_flags']}`."]
    answers = [row_of(file, what="answers") for file in (stage, stages.get("passes"))]
    if all(answers):
        same = answers[0]["tokens"] == answers[1]["tokens"]
        again = "the same" if answers[0]["second_run_same"] else "other"
        lines += [f"Answers {'the same' if same else 'NOT the same'} as without, a second run gave {again} ones."]
    return lines + passes_table(stage)


def decode_lines(stage: dict, _) -> list[str]:
    lines = ["### Decoding"]
    answers, programs = answers_of(stage), row_of(stage, what="programs")
    if not answers or not programs:
        return [*lines, "", "No question was answered in the time."]
    flags, methods = stage["machine"]["xla_flags"], decode_figures(answers)
    asked = [row["what"] for row in stage["rows"] if "answers" in row]
    lines += [
        "",
        f"{len(asked)} questions of `{asked[0]['questions']}` ({methods['ar']['outputs']} answers, up to "
        f"{programs['max_new_tokens']} tokens), {asked[0]['dtype']}, batch 1" + (f", `{flags}`." if flags else "."),
    ]
    head = ["method", "nodes", "tokens/s", "to ar", "ms a pass", "tokens a pass", "without loops", "identical"]
    cells = [
        [shown(name), programs["nodes"][name], f"{f['tokens_per_s']:.1f}", f"{f['ratio_to_ar']:.2f}",
         f"{f['ms_a_pass']:.2f}", f"{f['mat']:.2f}", f"{f['mat_no_loops']:.2f}", f"{f['identical']} of {f['outputs']}"]
        for name, f in methods.items()
    ]  # fmt: skip
    lines += table(head, cells)
    if row := row_of(stage, what="compiled loop"):
        talks = {name: count for name, count in row["counts"].items() if name not in ("while(", "conditional(")}
        lines += ["", f"Exchanges with the host in the compiled loop of {row['method']}: {sum(talks.values())}."]
    return lines


def train_lines(stage: dict, _) -> list[str]:
    lines, rows = ["### A training step", ""], []
    for row in stage["rows"]:
        what = row["what"]
        if what.get("what") == "matrix product":
            lines += [f"A large bfloat16 product reaches {row['flops_per_s'] / 1e12:.0f} TFLOP/s in the same run."]
            continue
        named = [what["weights"], what["attention"], f"{what['rows']} x {what['tokens']}", what["remat"]]
        if "error" in row:
            rows.append([*named, "does not fit", "", "", ""])
            continue
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else ""
        memory = f"{row['program_bytes'] / 2**30:.1f}" if row["program_bytes"] else ""
        rows.append([*named, f"{row['tokens_per_s']:.0f}", f"{row['step_s']:.3f}", mfu, memory])
    head = ["weights", "attention", "rows x tokens", "remat", "tokens/s", "s a step", "MFU", "GiB of the program"]
    return lines + table(head, rows)


def learn_lines(stage: dict, _) -> list[str]:
    lines = ["### What was learnt in the time left"]
    for row in stage["rows"]:
        if "arm" in row["figures"]:
            lines += ["", "```json", json.dumps(row["figures"]), "```"]
    return lines


def summary(folder: Path) -> dict:
    """The last line of accelerator.py: what a reader asks first."""
    stages = read_all(folder)
    out = {"folder": folder.name}
    if "decode" in stages:
        out["methods"] = decode_figures(answers_of(stages["decode"]))
    if "passes" in stages:
        out["passes_ms"] = {
            " ".join(str(v) for v in row["what"].values()): round(row["ms"], 3)
            for row in stages["passes"]["rows"]
            if "ms" in row
        }
    if "train" in stages:
        rows = [row for row in stages["train"]["rows"] if "tokens_per_s" in row]
        out["train_tokens_per_s"] = {
            " ".join(str(v) for v in row["what"].values()): round(row["tokens_per_s"]) for row in rows
        }
    for stage in stages.values():
        out |= {"device": stage["machine"]["device"], "commit": stage["commit"]}
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("folders", nargs="+", type=Path, help="what accelerator.py --out wrote")
    p.add_argument("--write", type=Path, help="the page to write; else it is printed")
    args = p.parse_args()
    lines = ["# Accelerators", ""]
    names = " ".join(folder.name for folder in args.folders)
    lines += [f"Made by `benchmarks/accelerator_report.py` from the figures of `benchmarks/accelerator.py` ({names})."]
    for folder in args.folders:
        lines += ["", *section(folder)]
    page = "\n".join(lines) + "\n"
    if args.write:
        args.write.write_text(page)
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
