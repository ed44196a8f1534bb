"""RESULTS.md and its plots, from results/*.json that evidence.py wrote.

    python benchmarks/results.py

Intervals are 95%: of tokens a pass by resampling questions 10,000 times, the same ones for both arms of a ratio; of a
difference in accuracy by resampling items; of one accuracy Wilson's.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml
from spec_bench import LOOPS, split_method

from msn_jax import InputError
from msn_jax.decode.tree import NOISE, TREE_SETS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
PLAN = Path(__file__).parent / "evidence.yaml"
NOISY = ("paper", "several", "several-1", "several-4", "several-8", "random")
COMPARED = ("jacobi", "tr-jacobi")  # methods whose tokens a pass are compared between arms
# LLaMA3-8B on the machine of the paper (Wang et al., EMNLP 2024): what is known of it with a source.
PAPER = [
    ["plain decoding", "42.13 tokens/s"],
    ["trained with noise, TR-Jacobi, Spec-Bench", "91.63 tokens/s, 2.17x"],
    ["the same on its summarization", "close to 2.8x"],
    ["the same over both domains, chat and code", "2.3x to 2.7x"],
    ["HumanEval and MBPP together, with noise against without", "77.0 against 76.6"],
    ["noise length", "4 is better than 1 (little faster) and 8 (less accurate)"],
]


def load_results() -> dict[str, dict]:
    """Name (ARM-seedS) -> what evidence.py measured, in the order of the plan."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*-seed*.json"))}
    if not found:
        raise InputError(f"{RESULTS}: no results; benchmarks/evidence.py writes them")
    order = ("untouched", "plain", *NOISY, "draft", "shipped")
    rank = lambda result: order.index(result["arm"]) if result["arm"] in order else len(order)
    return dict(sorted(found.items(), key=lambda item: (rank(item[1]), item[1]["seed"])))


def speeds(results: dict[str, dict]) -> list[tuple[str, str, dict]]:
    """(arm, dtype, what was measured in it)."""
    return [(name, dtype, speed) for name, result in results.items() for dtype, speed in result["speed"].items()]


def plain_of(results: dict[str, dict]) -> dict[str, str]:
    """Of each arm with noise the plain one of its seed, where that has run."""
    plain = {name: f"plain-seed{result['seed']}" for name, result in results.items() if result["arm"] in NOISY}
    return {name: base for name, base in plain.items() if base in results}


def plotted(result: dict) -> dict:
    """What a plot shows: bfloat16, in which all arms are measured, else what there is."""
    return result["speed"].get("bfloat16", next(iter(result["speed"].values())))


def by_question(speed: dict, method: str) -> dict[int, tuple[int, int]]:
    """Tokens and passes of a method's outputs that do not loop, by question."""
    sums = defaultdict(lambda: (0, 0))
    for row in speed["answers"]:
        if row["method"] == method and row["rep4_frac"] < LOOPS:
            tokens, forwards = sums[row["question_id"]]
            sums[row["question_id"]] = tokens + row["tokens"], forwards + row["forwards"]
    return dict(sums)


def mat_interval(sums: dict[int, tuple[int, int]]) -> tuple[float, float, float]:
    """MAT with its interval."""
    pairs = np.array(list(sums.values()))
    picked = pairs[np.random.default_rng(0).integers(0, len(pairs), (10_000, len(pairs)))].sum(axis=1)
    tokens, forwards = pairs.sum(axis=0)
    low, high = np.percentile(picked[:, 0] / picked[:, 1], [2.5, 97.5])
    return tokens / forwards, low, high


def mat_ratio(sums: dict[int, tuple[int, int]], base: dict[int, tuple[int, int]]) -> tuple[float, float, float]:
    """MAT over that of `base` with its interval. A question that only one of them answers without a loop counts
    there alone; resampling takes whole questions."""
    questions = sorted(sums.keys() | base.keys())
    both = np.array([(*sums.get(q, (0, 0)), *base.get(q, (0, 0))) for q in questions])
    ratio = lambda s: (s[..., 0] / s[..., 1]) / (s[..., 2] / s[..., 3])
    picked = both[np.random.default_rng(0).integers(0, len(both), (10_000, len(both)))].sum(axis=1)
    low, high = np.percentile(ratio(picked), [2.5, 97.5])
    return float(ratio(both.sum(axis=0))), low, high


def accuracy_difference(task: dict, base: dict) -> tuple[float, float, float]:
    """Points of accuracy over `base` on the same items, with the interval of the paired difference."""
    right, right_base = set(task["correct_items"]), set(base["correct_items"])
    # Only items that differ matter; the others are zeros.
    differences = np.zeros(task["items"])
    changed = sorted(right ^ right_base)
    differences[: len(changed)] = [1.0 if item in right else -1.0 for item in changed]
    picked = differences[np.random.default_rng(0).integers(0, len(differences), (10_000, len(differences)))].mean(
        axis=1
    )
    low, high = np.percentile(100 * picked, [2.5, 97.5])
    return 100 * float(differences.mean()), low, high


def last(result: dict, name: str) -> float | None:
    """The last value of a metric of training."""
    return next((line[name] for line in reversed(result.get("metrics", [])) if name in line), None)


def loss_over(result: dict, plain: dict) -> str:
    """Held-out clean loss at the end, in percent over that of `plain`."""
    return f"{100 * (last(result, 'eval_loss') / last(plain, 'eval_loss') - 1):+.2f}%"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def interval(values: tuple[float, float, float], digits: int = 2) -> str:
    middle, low, high = values
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def speed_section(results: dict[str, dict]) -> str:
    rows = []
    for name, dtype, speed in speeds(results):
        for method, f in speed["methods"].items():
            sums = by_question(speed, method)
            mat = "1.00" if split_method(method)[0] == "ar" else interval(mat_interval(sums)) if sums else "all loop"
            same = f"{f['identical']} / {f['near_ties']} / {f['different']}"
            rows.append(
                [name, dtype, method, mat, f"{f['mat']:.2f}", f"{f['rep4_frac']:.2f}", f"{f['ratio_to_ar']:.2f}", same]
            )
    head = ["arm", "dtype", "method", "MAT, no loops", "MAT, all", "repeated 4-grams", "speed, x ar"]
    return table([*head, "same / near tie / differ"], rows)


def measured(speed: dict, family: str) -> str | None:
    """The METHOD:TREE that stands for a method: the first of it that was measured."""
    return next((method for method in speed["methods"] if split_method(method)[0] == family), None)


def without_noise(method: str) -> bool:
    """Whether METHOD:TREE names trees that have no noise nodes, and so leave a draft-only adapter out."""
    tree = split_method(method)[1]
    return bool(tree) and not any(t.kind(NOISE).any() for t in TREE_SETS[tree].trees)


def against_section(results: dict[str, dict], base: str, arms: list[str]) -> str:
    """Each arm's methods over the same of `base` in the same dtype. Draft-only adapters have trees of their own, over
    whatever `base` has tried; where an arm is its own base, trees with noise nodes over those without."""
    rows = []
    for name, dtype, speed in speeds({name: results[name] for name in arms}):
        bases = results[base]["speed"].get(dtype, {"methods": {}})
        for method, other in product(speed["methods"], bases["methods"]):
            ours, theirs = by_question(speed, method), by_question(bases, other)
            family = split_method(method)[0]
            if family not in COMPARED or family != split_method(other)[0]:
                continue
            if name == base:
                wanted = without_noise(other) and not without_noise(method)
            else:
                wanted = method.partition("@")[0] == other.partition("@")[0] or draft_only(results[name])
            if ours and theirs and wanted:
                rows.append([dtype, f"{name} {method}", f"{base} {other}", interval(mat_ratio(ours, theirs), 3)])
    return table(["dtype", "", "over", "MAT, no loops, as a ratio"], rows) if rows else ""


def over_runs(runs: list[dict], dtype: str) -> dict[str, dict[int, tuple[int, int]]]:
    """`by_question` summed over runs, of each METHOD:TREE that all of them have measured in whatever batch."""
    speeds = [run["speed"][dtype] for run in runs]
    named = [{method.partition("@")[0]: method for method in speed["methods"]} for speed in speeds]
    sums = {}
    for method in (m for m in named[0] if all(m in names for names in named)):
        parts = [by_question(speed, names[method]) for speed, names in zip(speeds, named, strict=True)]
        questions = sorted(set().union(*parts))
        sums[method] = {q: tuple(map(sum, zip(*(p[q] for p in parts if q in p), strict=True))) for q in questions}
    return sums


def ratios_to_plain(noisy: list[dict], plain: list[dict]) -> dict[str, str]:
    """MAT ratio of each METHOD:TREE that all these runs have measured, in bfloat16 if they share it."""
    shared = [dtype for dtype in noisy[0]["speed"] if all(dtype in run["speed"] for run in noisy + plain)]
    if not shared:
        return {}
    dtype = "bfloat16" if "bfloat16" in shared else shared[0]
    ours, theirs = over_runs(noisy, dtype), over_runs(plain, dtype)
    common = (m for m in ours if ours[m] and theirs.get(m) and split_method(m)[0] in COMPARED)
    return {method: interval(mat_ratio(ours[method], theirs[method]), 3) for method in common}


def seeds_section(results: dict[str, dict]) -> str:
    """Noise over plain, the outputs of all seeds taken together."""
    rows = []
    compared = plain_of(results)
    for arm in NOISY:
        names = [name for name in compared if results[name]["arm"] == arm]
        if len(names) < 2:
            continue
        ratios = ratios_to_plain([results[name] for name in names], [results[compared[name]] for name in names])
        rows += [[f"{arm}, {len(names)} seeds", method, ratio] for method, ratio in ratios.items()]
    return table(["arm", "method", "MAT, no loops, over that of plain"], rows) if rows else ""


def trade_section(results: dict[str, dict]) -> str:
    """What noise costs beside what it gives, by its share of the tokens."""
    rows = []
    for name, plain in plain_of(results).items():
        result, base = results[name], results[plain]
        ratios = ratios_to_plain([result], [base])
        shown = []
        for family in COMPARED:
            methods = [m for m in ratios if split_method(m)[0] == family]
            # With a tree of one shape, where it was measured: default trees differ from machine to machine.
            method = max(methods, key=lambda m: ":" in m, default=None)
            shown.append(f"{ratios[method]}, {method}" if method else "-")
        rows.append((noisy_share(result["metrics"]), [name, loss_over(result, base), *shown]))
    head = ["behind noise", "arm", "held-out loss to plain", *(f"MAT to plain, {family}" for family in COMPARED)]
    return table(head, [[f"{100 * share:.0f}%", *row] for share, row in sorted(rows)]) if rows else ""


def draft_only(result: dict) -> bool:
    return "adapter" in result or bool(result.get("train", {}).get("lora", {}).get("draft_only"))


def noisy_share(metrics: list[dict]) -> float:
    """Share of the scored tokens whose input was noise, over training: the loss is the mean of both kinds."""
    noisy = tokens = 0.0
    for line in metrics:
        if "loss_noisy" in line and line["loss_noisy"] != line["loss_clean"]:
            share = (line["loss"] - line["loss_clean"]) / (line["loss_noisy"] - line["loss_clean"])
            noisy += share * line["response_tokens"]
        tokens += line["response_tokens"]
    return noisy / tokens


def training_section(results: dict[str, dict]) -> str:
    rows = []
    for name, result in results.items():
        if "train" not in result:
            continue
        metrics, plain = result["metrics"], results.get(f"plain-seed{result['seed']}")
        tokens = sum(line["response_tokens"] for line in metrics)
        loss, difference = last(result, "eval_loss"), "-"
        if plain and not draft_only(result) and result["arm"] != "plain":
            difference = loss_over(result, plain)
        share = "all, KL" if draft_only(result) else f"{100 * noisy_share(metrics):.0f}%"
        depths = []
        for best in ("top1", "top10"):
            values = [last(result, f"eval_{best}_depth{j}") for j in range(1, 9)]
            depths.append(" ".join(f"{value:.2f}" for value in values if value is not None))
        rows.append([name, str(metrics[-1]["step"]), f"{tokens:,.0f}", share, f"{loss:.4f}", difference, *depths])
    head = ["arm", "steps", "tokens scored", "behind noise", "held-out loss", "to plain"]
    return table([*head, "first right, by noise depth", "one of ten right"], rows)


def tasks_section(results: dict[str, dict]) -> str:
    rows = []
    for name, result in results.items():
        plain = results.get(f"plain-seed{result['seed']}", results.get("plain-seed0", {}))
        for task, f in result.get("tasks", {}).items():
            share = f"{100 * f['accuracy_frac']:.1f} ({100 * f['low95_frac']:.1f} to {100 * f['high95_frac']:.1f})"
            shown = "-"
            base = plain.get("tasks", {}).get(task)
            if base and plain is not result:
                shown = interval(accuracy_difference(f, base), 1)
            rows.append([name, task, str(f["items"]), share, shown])
    return table(["arm", "task", "items", "accuracy, %", "points over plain"], rows) if rows else ""


def plot_categories(results: dict[str, dict]) -> None:
    shown = {name: plotted(r) for name, r in results.items() if r["seed"] == 0}
    categories = sorted(next(iter(shown.values()))["categories"])
    figure, all_axes = plt.subplots(2, 1, figsize=(11, 7), sharex=True)
    width = 0.8 / len(shown)
    for axes, family in zip(all_axes, COMPARED, strict=True):
        for i, (name, speed) in enumerate(shown.items()):
            if method := measured(speed, family):
                heights = [speed["categories"][c][method]["mat_no_loops"] for c in categories]
                axes.bar(np.arange(len(categories)) + i * width, heights, width, label=f"{name}, {method}")
        axes.axhline(1, color="black", linewidth=0.5)
        axes.set_ylabel(f"tokens a pass, {family}")
        axes.margins(y=0.3)  # room for the legend
        axes.legend(fontsize=8, ncols=4)
    all_axes[0].set_title("outputs without loops; no bar: all loop", fontsize=10)
    all_axes[1].set_xticks(np.arange(len(categories)) + 0.4 - width / 2, categories, rotation=30, ha="right")
    save(figure, "mat_by_category")


def plot_accepted(results: dict[str, dict]) -> None:
    shown = {name: result for name, result in results.items() if result["seed"] == 0}
    figure, all_axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axes, family in zip(all_axes, COMPARED, strict=True):
        for name, result in shown.items():
            speed = plotted(result)
            method = measured(speed, family)
            kept = [r for r in speed["answers"] if r["method"] == method and r["rep4_frac"] < LOOPS]
            if not kept:
                continue
            lengths, counts = np.unique([count for row in kept for count in row["accepted"]], return_counts=True)
            axes.plot(lengths, counts / counts.sum(), marker="o", markersize=3, label=f"{name}, {method}")
        axes.set(title=family, xlabel="tokens that a pass emits", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)
    all_axes[0].set_ylabel("share of passes, outputs without loops")
    save(figure, "accepted_lengths")


def plot_depths(results: dict[str, dict]) -> None:
    trained = {name: r for name, r in results.items() if "train" in r and r["seed"] == 0}
    figure, all_axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    for axes, depth in zip(all_axes, (1, 2, 3), strict=True):
        for name, result in trained.items():
            color = None
            for best, style, label in (("top1", "-", name), ("top10", ":", None)):
                key = f"eval_{best}_depth{depth}"
                lines = [(line["step"], line[key]) for line in result["metrics"] if key in line]
                if not lines:
                    continue
                (drawn,) = axes.plot(
                    *zip(*lines, strict=True), style, marker="o", markersize=3, label=label, color=color
                )
                color = drawn.get_color()
        axes.set(title=f"noise depth {depth}", xlabel="step")
    all_axes[0].set_ylabel("right on held-out text")
    figure.suptitle("the first candidate (solid), one of ten (dotted)", fontsize=10)
    all_axes[0].legend(fontsize=8)
    save(figure, "accuracy_by_depth")


def plot_losses(results: dict[str, dict]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, plain in plain_of(results).items():
        base = {line["step"]: line["eval_loss"] for line in results[plain]["metrics"] if "eval_loss" in line}
        lines = [line for line in results[name]["metrics"] if "eval_loss" in line and line["step"] in base]
        percent = [100 * (line["eval_loss"] / base[line["step"]] - 1) for line in lines]
        axes.plot([line["step"] for line in lines], percent, marker="o", label=name)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlabel="step", ylabel="clean held-out loss over plain, %")
    axes.legend(fontsize=8)
    save(figure, "loss_difference")


def save(figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    results = load_results()
    plots = {
        "mat_by_category": plot_categories,
        "accepted_lengths": plot_accepted,
        "accuracy_by_depth": plot_depths,
    }
    compared = plain_of(results)
    if compared:
        plots["loss_difference"] = plot_losses
    for draw in plots.values():
        draw(results)
    text = [
        "# Results\n\nMade by `python benchmarks/results.py` from `results/*.json`; nothing here is typed in by hand.\n"
    ]
    text.append(
        "Every number of a row comes from the runs of its arm, which can be cut off and go on: the commit is that of"
        " the last part. Each command takes `--data DIR`, a folder with `sft/` and `eval/`, and `--runs DIR` besides.\n"
    )
    runs = [[n, f"`{r['command']}`", r["commit"], str(r["seed"]), r["device"]] for n, r in results.items()]
    text.append(table(["arm", "command", "commit", "seed", "device"], runs))
    planned = yaml.safe_load(PLAN.read_text(encoding="utf-8"))["arms"]
    if missing := [arm for arm in planned if arm not in {result["arm"] for result in results.values()}]:
        text.append(
            "Planned and not run here (`python benchmarks/evidence.py --arm NAME`): " + ", ".join(missing) + ".\n"
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
        text.append(
            f"Of {name}: trees without noise leave the adapter out, so they are those of the untouched model.\n"
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
    text.append("## Tasks\n")
    text.append("A draft-only adapter changes no answer, so it has no row.\n")
    text.append(tasks_section(results))
    text.append("## The paper's figures\n")
    text.append("Another model on another machine, to be read beside ours, not against them.\n")
    text.append(table(["LLaMA3-8B", ""], PAPER))
    (ROOT / "RESULTS.md").write_text("\n".join(text), encoding="utf-8")
    print(f"RESULTS.md: {len(results)} arms, {len(plots)} plots")
    print(json.dumps({"arms": list(results), "plots": [f"results/{name}.png" for name in plots]}))


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        sys.exit(f"results.py: error: {e}")
