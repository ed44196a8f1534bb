"""A plot of a training run."""

from __future__ import annotations

import importlib.util
import os
from itertools import accumulate

from msn_jax.errors import InputError
from msn_jax.io.files import is_remote


def check_plot(path: str) -> None:
    """Raises InputError, before any work, where `plot_metrics` could not write to `path`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib; pip install -e '.[plots]' in the checkout")
    if is_remote(path):
        raise InputError(f"--plot cannot write {path}; accepted with it: a local train.out")


def plot_metrics(lines: list[dict], path: str | os.PathLike) -> None:
    """Write a PNG of a run's metrics.jsonl: loss, and top-1 accuracy by noise depth, over the steps.

    lines: objects with `step` and what train.py writes. Needs the `plots` extra, see `check_plot`.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot: no display is needed, and no global state is left

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    window = max(1, len(lines) // 20)
    # One above the other: on a narrow screen, too, the words can be read.
    figure = Figure(figsize=(6.5, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    for name, label in (("loss_clean", "clean positions"), ("loss_noisy", "noise positions")):
        steps, values = series(name)
        if steps:
            upper.plot(steps, _smooth(values, window), label=label)
    steps, values = series("eval_loss")
    if steps:
        upper.plot(steps, values, "k.", label="held out, clean text")
    upper.set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
    depths = sorted({int(key[10:]) for line in lines for key in line if key.startswith("top1_depth")})
    for depth in depths:
        steps, values = series(f"top1_depth{depth}")
        colour = colormaps["viridis"](0.85 * (depth - 1) / max(len(depths) - 1, 1))  # its end is pale on white
        lower.plot(steps, _smooth(values, window), color=colour, label=f"depth {depth}")
    lower.set(xlabel="step", ylabel="top-1 accuracy", title=f"Accuracy by noise depth (mean of {window} steps)")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(edgecolor="none")
    figure.savefig(path, dpi=120)


def _smooth(values: list[float], window: int) -> list[float]:
    """The mean of each value and up to window - 1 before it."""
    sums = [0.0, *accumulate(values)]
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]
