"""The plots of RESULTS.md."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.arms import COMPARED, measured, plain_of, plotted
from msn_jax.answers import LOOPS


def draw_plots(results: dict[str, dict], folder: Path) -> list[str]:
    """Write every plot that the results have figures for as folder/NAME.png; returns the names."""
    plots = {
        "mat_by_category": plot_categories,
        "accepted_lengths": plot_accepted,
        "accuracy_by_depth": plot_depths,
    }
    if plain_of(results):
        plots["loss_difference"] = plot_losses
    for name, plot in plots.items():
        figure = plot(results)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)
    return list(plots)


def plot_categories(results: dict[str, dict]) -> Figure:
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
    return figure


def plot_accepted(results: dict[str, dict]) -> Figure:
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
    return figure


def plot_depths(results: dict[str, dict]) -> Figure:
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
    return figure


def plot_losses(results: dict[str, dict]) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, plain in plain_of(results).items():
        base = {line["step"]: line["eval_loss"] for line in results[plain]["metrics"] if "eval_loss" in line}
        lines = [line for line in results[name]["metrics"] if "eval_loss" in line and line["step"] in base]
        percent = [100 * (line["eval_loss"] / base[line["step"]] - 1) for line in lines]
        axes.plot([line["step"] for line in lines], percent, marker="o", label=name)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlabel="step", ylabel="clean held-out loss over plain, %")
    axes.legend(fontsize=8)
    return figure
