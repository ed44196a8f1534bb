"""What people look at: a page that shows what each pass of a generation accepted, a plot of a training run."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path
from string import Template

from msn_jax.errors import InputError
from msn_jax.io.files import is_remote

# Colour stops for 1..max tokens. Lightness changes steadily along each ramp, so it reads without colour
# vision, and stays on one side of the text colour, so every level keeps a contrast of at least 4.5.
LIGHT = ("f3f6dc", "b3dfc0", "66bfc9", "4c9bd2")
DARK = ("262b3a", "28487a", "1b6585", "147667")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 840, 190, 46, 76, 12, 42  # of a plot and its margins


@dataclass(frozen=True, kw_only=True)
class Run:
    """One generation. Pass i emitted `accepted[i]` tokens, which read `pieces[i]`."""

    method: str
    pieces: list[str]
    accepted: list[int]
    seconds: float  # without compilation
    tokens: int
    identical: bool | None  # to the tokens of plain decoding; None: not compared

    def __post_init__(self):
        if len(self.pieces) != len(self.accepted):
            raise ValueError(f"{len(self.pieces)} pieces of text for {len(self.accepted)} passes")
        if self.tokens != sum(self.accepted):
            raise ValueError(f"{self.tokens} tokens, but the passes accepted {sum(self.accepted)}")

    @property
    def speed(self) -> float:
        """Tokens per second; 0 where there is nothing to measure."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def write_html(path, title: str, prompt: str, runs: list[Run]) -> None:
    """Write the page to `path` in one step: a reader sees the old file or the whole new one.

    All runs share the colour scale and the axes. Ratios are to the first run whose method is `ar`.
    """
    top = max([1, *(n for run in runs for n in run.accepted)])
    longest = max([1, *(run.tokens for run in runs)])
    plain = next((run.speed for run in runs if run.method == "ar"), 0.0)
    page = PAGE.substitute(
        title=escape(title),
        light=_levels(LIGHT, top),
        dark=_levels(DARK, top),
        rows="\n".join(_row(run, plain) for run in runs),
        prompt=_text(prompt),
        runs="\n".join(_section(i, run, top, longest) for i, run in enumerate(runs)),
    )
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(page.encode("utf-8", "replace"))  # lone surrogates have no UTF-8
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _text(text: str) -> str:
    """Escaped text with its line ends marked, so that a pass that emitted only those can be seen."""
    return escape(text).replace("\r", "&#13;").replace("\n", "<i>\n</i>")


def _count(i: int, n: int) -> str:
    return f"pass {i + 1}: {n} token{'' if n == 1 else 's'}"


def _levels(stops: tuple[str, ...], top: int) -> str:
    """CSS rules that set --c, the colour of each number of accepted tokens."""
    rules = []
    for n in range(1, top + 1):
        at = (n - 1) / max(top - 1, 1) * (len(stops) - 1)
        low = min(int(at), len(stops) - 2)
        ends = zip(bytes.fromhex(stops[low]), bytes.fromhex(stops[low + 1]), strict=True)
        rules.append(f".a{n}{{--c:#{bytes(round(a + (b - a) * (at - low)) for a, b in ends).hex()}}}")
    return "".join(rules)


def _row(run: Run, plain: float) -> str:
    passes = len(run.accepted)
    cells = [str(run.tokens), str(passes), f"{run.tokens / passes:.2f}" if passes else "–"]
    cells += [f"{run.speed:.1f}" if run.speed else "–"]
    cells += [f"{run.speed / plain:.2f}×" if plain and run.speed else "–"]
    cells += [{None: "–", True: "yes", False: '<b class="no">no</b>'}[run.identical]]
    return f'<tr><th scope="row">{escape(run.method)}</th><td>' + "</td><td>".join(cells) + "</td></tr>"


def _section(index: int, run: Run, top: int, longest: int) -> str:
    keys = "".join(f'<span class="a{n}">{n}</span>' for n in range(1, top + 1))
    pieces = "".join(
        f'<span id="r{index}p{i}" class="a{n}" title="{_count(i, n)}">{_text(piece)}</span>'
        for i, (piece, n) in enumerate(zip(run.pieces, run.accepted, strict=True))
    )
    body = f'<div class="text">{pieces}</div>' if any(run.pieces) else '<p class="none">No text.</p>'
    plot = _plot(index, run, top, longest) if run.tokens else ""
    return f"""<section><div class="head"><h2>{escape(run.method)}</h2>
<div class="key">tokens accepted in one pass <span>{keys}</span></div></div>\n{body}\n{plot}</section>"""


def _step(span: int, count: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that cuts `span` into at most `count` parts."""
    power = 10 ** int(math.log10(max(span / count, 1)))
    return next(m * power for m in (1, 2, 5, 10) if m * power * count >= span)


def _plot(index: int, run: Run, top: int, longest: int) -> str:
    """Accepted tokens of each pass over the tokens generated so far, and their mean so far."""
    right, base = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(tokens: float) -> str:
        return f"{LEFT + tokens / longest * (right - LEFT):.2f}"

    def y(accepted: float) -> str:
        return f"{base - accepted / top * (base - TOP):.2f}"

    ends = list(accumulate(run.accepted))
    grid, bars, outline = "", "", f"M{x(0)},{base}"
    thin = min(0.8, 250 / longest)  # or the outline of a long run would hide its bars
    for v in range(0, top + 1, _step(top, 6)):
        grid += f'<path class="grid" d="M{LEFT},{y(v)}H{right}"/>'
        grid += f'<text x="{LEFT - 8}" y="{y(v)}" dy="4" text-anchor="end">{v}</text>'
    for v in range(0, longest + 1, _step(longest, 10)):
        grid += f'<path class="tick" d="M{x(v)},{base}v5"/>'
        grid += f'<text x="{x(v)}" y="{base + 18}" text-anchor="middle">{v}</text>'
    for i, (n, end) in enumerate(zip(run.accepted, ends, strict=True)):
        box = f"M{x(end - n)},{base}V{y(n)}H{x(end)}V{base}z"
        tip = f"<title>{_count(i, n)}</title>"
        bars += f'<a href="#r{index}p{i}" tabindex="-1"><path class="bar a{n}" d="{box}">{tip}</path></a>'
        outline += f"V{y(n)}H{x(end)}"
    means = [end / (i + 1) for i, end in enumerate(ends)]
    line = " ".join(f"{x(a)},{y(m)}" for a, m in zip([0, *ends], [means[0], *means], strict=True))
    middle = (TOP + base) / 2
    return f"""<div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group"
aria-label="Accepted tokens per pass, {escape(run.method)}">{grid}{bars}
<path class="outline" stroke-width="{thin:.2f}" d="{outline}V{base}"/>
<path class="tick" d="M{LEFT},{base}H{right}"/>
<polyline class="mean halo" points="{line}"/><polyline class="mean" points="{line}"/>
<text class="meantext" x="{x(ends[-1])}" y="{y(means[-1])}" dx="7" dy="4">mean {means[-1]:.2f}</text>
<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">generated tokens so far</text>
<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">accepted in the pass</text>
</svg></div>"""


# The policy lets nothing be fetched and no script run, whatever a model wrote.
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>$title</title>
<style>
:root{color-scheme:light dark;--page:#fff;--ink:#1a1d21;--soft:#5b636d;--line:#dfe3e8;--edge:#00000029;
 --mean:#c2410c}$light
@media (prefers-color-scheme:dark){:root{--page:#14171c;--ink:#edf0f3;--soft:#9aa4b0;--line:#2c323b;
 --edge:#ffffff38;--mean:#fb923c}$dark}
body{max-width:860px;margin:40px auto 80px;padding:0 24px;background:var(--page);color:var(--ink);
 font:15px/1.5 system-ui,sans-serif}
h1{font-size:24px;line-height:1.25;font-weight:650;margin:0 0 24px;overflow-wrap:anywhere}
h2{font-size:17px;font-weight:600;margin:0}
section{margin-top:36px}.table,.plot{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 0 7px 16px;text-align:right;border-bottom:1px solid var(--line)}
th:first-child{padding-left:0;text-align:left;font-weight:600;white-space:nowrap}
thead th{font-size:13px;font-weight:400!important;color:var(--soft);vertical-align:bottom}
.no{color:var(--mean)}.none,.key{color:var(--soft);font-size:13px}
.head{display:flex;flex-wrap:wrap;justify-content:space-between;align-items:center;gap:4px 24px}
.key span span{display:inline-block;min-width:22px;text-align:center;color:var(--ink);background:var(--c)}
.text{margin-top:10px;padding:14px 16px;border:1px solid var(--line);border-radius:6px;tab-size:4;
 font:14px/1.8 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.prompt{max-height:320px;overflow:auto}
.text span{padding:2px 0;background:var(--c);box-shadow:inset 1px 0 var(--edge);print-color-adjust:exact}
.text span:empty{padding:2px}.text span:target{outline:2px solid var(--mean)}
.text i::before{content:"↵";font-style:normal;opacity:.4}
svg{display:block;width:100%;min-width:600px;margin-top:14px;font-size:12px}
svg text{fill:var(--soft)}.bar{fill:var(--c,none)}.bar:hover{fill:var(--mean)}
.grid,.tick,.outline,.mean{fill:none;stroke:var(--line);pointer-events:none}
.tick,.outline{stroke:var(--soft)}.outline{stroke-opacity:.7}
.mean{stroke:var(--mean);stroke-width:2;stroke-linejoin:round}.halo{stroke:var(--page);stroke-width:5}
svg .meantext{fill:var(--mean)}
</style></head><body><h1>$title</h1>
<div class="table"><table><thead><tr><th scope="col">method</th><th scope="col">tokens</th>
<th scope="col">forward passes</th><th scope="col">mean accepted (MAT)</th>
<th scope="col">tokens/s</th><th scope="col">speed vs ar</th><th scope="col">tokens identical to ar</th></tr>
</thead><tbody>
$rows
</tbody></table></div>
<section><h2>Prompt</h2><div class="text prompt">$prompt</div></section>
$runs
</body></html>
""")


def check_plot(path: str) -> None:
    """Raises InputError, before any work, where `plot_metrics` could not write to `path`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib; pip install 'msn-jax[plots]'")
    if is_remote(path):
        raise InputError(f"--plot cannot write {path}; accepted with it: a local train.out")


def plot_metrics(lines: list[dict], path: str | os.PathLike) -> None:
    """Write a PNG of a run's metrics.jsonl: loss, and top-1 accuracy by noise depth, over the steps.

    lines: objects with `step` and what train.py writes. Needs the `plots` extra, see `check_plot`.
    """
    from matplotlib.figure import Figure  # not pyplot: no display is needed, and no global state is left

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    window = max(1, len(lines) // 20)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("loss_clean", "clean positions"), ("loss_noisy", "noise positions")):
        steps, values = series(name)
        if steps:
            left.plot(steps, _smooth(values, window), label=label)
    steps, values = series("eval_loss")
    if steps:
        left.plot(steps, values, "k.", label="held out, clean text")
    left.set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
    depths = sorted({int(key[10:]) for line in lines for key in line if key.startswith("top1_depth")})
    for depth in depths:
        steps, values = series(f"top1_depth{depth}")
        shade = 0.25 + 0.65 * (depth - 1) / max(len(depths) - 1, 1)
        right.plot(steps, _smooth(values, window), color=(shade, shade, 0.9 - 0.5 * shade), label=f"depth {depth}")
    right.set(xlabel="step", ylabel="top-1 accuracy", title=f"Accuracy by noise depth (mean of {window} steps)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _smooth(values: list[float], window: int) -> list[float]:
    """The mean of each value and up to window - 1 before it."""
    sums = [0.0, *accumulate(values)]
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]
