"""The tables of RESULTS.md."""

from __future__ import annotations

from itertools import product

from benchmarks.spec_bench import split_method
from experiments.arms import (
    COMPARED,
    NOISY,
    draft_only,
    last,
    noisy_share,
    plain_of,
    speeds,
    without_adapters,
)
from experiments.statistics import accuracy_difference, by_question, mat_interval, mat_ratio, over_runs


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def interval(values: tuple[float, float, float], digits: int = 2) -> str:
    middle, low, high = values
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def loss_over(result: dict, plain: dict) -> str:
    """Held-out clean loss at the end, in percent over that of `plain`."""
    return f"{100 * (last(result, 'eval_loss') / last(plain, 'eval_loss') - 1):+.2f}%"


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


def against_section(results: dict[str, dict], base: str, arms: list[str]) -> str:
    """Each arm's methods over the same of `base` in the same dtype. Draft-only adapters have trees of their own, over
    whatever `base` has tried; where an arm is its own base, trees that need an adapter over those that do not."""
    rows = []
    for name, dtype, speed in speeds({name: results[name] for name in arms}):
        bases = results[base]["speed"].get(dtype, {"methods": {}})
        for method, other in product(speed["methods"], bases["methods"]):
            ours, theirs = by_question(speed, method), by_question(bases, other)
            family = split_method(method)[0]
            if family not in COMPARED or family != split_method(other)[0]:
                continue
            if name == base:
                wanted = without_adapters(other) and not without_adapters(method)
            else:
                wanted = method.partition("@")[0] == other.partition("@")[0] or draft_only(results[name])
            if ours and theirs and wanted:
                rows.append([dtype, f"{name} {method}", f"{base} {other}", interval(mat_ratio(ours, theirs), 3)])
    return table(["dtype", "", "over", "MAT, no loops, as a ratio"], rows) if rows else ""


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
