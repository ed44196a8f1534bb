"""The page of decode.py --html: what each pass of a generation accepted, and where its tokens came from."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np

from msn_jax.decode.request import Result
from msn_jax.decode.sources.retrieval import retrieve
from msn_jax.io.loading import LM
from msn_jax.io.tokenizer import TextStream

# Colour stops for 1..max tokens. Lightness changes steadily along each ramp, so it reads without colour
# vision, and stays on one side of the text colour, so every level keeps a contrast of at least 4.5.
LIGHT = ("f3f6dc", "b3dfc0", "66bfc9", "4c9bd2")
DARK = ("262b3a", "28487a", "1b6585", "147667")
HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 190, 46, 76, 12, 42  # of a plot and its margins
WIDE, NARROW = 840, 362  # widths of the plot, the second for a telephone: text keeps its size


OWN, RETRIEVED, PREDICTED = "own", "retrieved", "predicted"  # where a token came from
ORIGINS = {
    OWN: "the model's own next token: each pass ends with one",
    RETRIEVED: "drafted from the text so far, and accepted",
    PREDICTED: "drafted in another way (a prediction of the model's, or its earlier replies), and accepted",
}


class Piece(NamedTuple):
    """A token as it reads, and where it came from: OWN, RETRIEVED or PREDICTED."""

    text: str
    origin: str = OWN


@dataclass(frozen=True, kw_only=True)
class Run:
    """One generation. Pass i emitted `accepted[i]` tokens, which are `pieces[i]`."""

    method: str
    pieces: list[list[Piece]]
    accepted: list[int]
    offered: list[str]  # by pass: the draft from the text that stood at the place of its last token, and was not it
    seconds: float  # without compilation
    tokens: int
    identical: bool | None  # to the tokens of plain decoding; None: not compared

    def __post_init__(self):
        if len(self.pieces) != len(self.accepted):
            raise ValueError(f"{len(self.pieces)} pieces of text for {len(self.accepted)} passes")
        if [len(piece) for piece in self.pieces] != self.accepted or len(self.offered) != len(self.accepted):
            raise ValueError("each token of a pass is a piece of text")
        if self.tokens != sum(self.accepted):
            raise ValueError(f"{self.tokens} tokens, but the passes accepted {sum(self.accepted)}")

    @property
    def speed(self) -> float:
        """Tokens per second; 0 where there is nothing to measure."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def run_of(lm: LM, prompt: list[int], result: Result, plain: Result | None = None) -> Run:
    """What the page shows of a result. prompt: its ids; plain: the result of `ar`, to compare with.

    A draft that retrieval offers too counts as retrieved; the last token of a pass is the model's own.
    """
    stream, pieces, offered, at = TextStream(lm.tokenizer, after=prompt), [], [], 0
    found = _retrieved(prompt, result)
    for row, count in zip(found, result.accepted, strict=True):
        new = result.tokens[at : at + count]
        drafted = [RETRIEVED if row[: i + 1] == new[: i + 1] else PREDICTED for i in range(count - 1)]
        pieces.append([Piece(stream.add([token]), origin) for token, origin in zip(new, [*drafted, OWN], strict=True)])
        missed = row[count - 1] if row[: count - 1] == new[: count - 1] and result.method != "ar" else -1
        offered.append(lm.tokenizer.decode([missed]) if missed not in (-1, new[-1]) else "")
        at += count
    pieces[-1][-1] = Piece(pieces[-1][-1].text + stream.flush(), OWN)
    return Run(
        method=result.method,
        pieces=pieces,
        offered=offered,
        accepted=result.accepted,
        seconds=result.seconds,
        tokens=len(result.tokens),
        identical=None if plain is None or plain is result else result.tokens == plain.tokens,
    )


def _retrieved(prompt: list[int], result: Result) -> list[list[int]]:
    """By pass: the continuation that retrieval had for the text before it, as long as the longest pass."""
    text = np.array([*prompt, *result.tokens], np.int32)
    last = len(prompt) - 1 + np.array([0, *accumulate(result.accepted)][:-1], np.int32)
    return retrieve(np.broadcast_to(text, (len(last), len(text))), last, max(result.accepted))[0][:, 0].tolist()


def write_html(path, title: str, prompt: str, runs: list[Run], settings: dict[str, Any]) -> None:
    """Write the page to `path` in one step: a reader sees the old file or the whole new one.

    settings: what the page says of how it was made, by name.
    All runs share the colour scale and the axes. Ratios are to the first run whose method is `ar`.
    """
    top = max([1, *(n for run in runs for n in run.accepted)])
    longest = max([1, *(run.tokens for run in runs)])
    plain = next((run.speed for run in runs if run.method == "ar"), 0.0)
    page = PAGE.substitute(
        title=escape(title),
        light=_levels(LIGHT, top),
        dark=_levels(DARK, top),
        settings=" · ".join(escape(f"{name} {value}") for name, value in settings.items()),
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
    passes = "".join(_pass(index, i, run) for i in range(len(run.accepted)))
    some = any(piece.text for pieces in run.pieces for piece in pieces)
    body = f'<div class="text">{passes}</div>' if some else '<p class="none">No text.</p>'
    plots = "\n".join(_plot(index, run, top, longest, width) for width in (WIDE, NARROW) if run.tokens)
    drafted = [piece.origin for pieces in run.pieces for piece in pieces]
    origins = " ".join(
        f'<span title="{about}"><u class="{name}">{name}</u> {drafted.count(name)}</span>'
        for name, about in ORIGINS.items()
        if name in drafted
    )
    if rejected := sum(map(bool, run.offered)):
        about = "what followed the same words before is not what the model says here"
        origins += f' <span title="{about}"><span class="missed">text offered another</span> {rejected}</span>'
    head = f"""<h2>{escape(run.method)}</h2>
<div class="key">tokens accepted in one pass <span>{keys}</span></div>"""
    inner = f'{body}\n<p class="origins key">{origins}</p>\n{plots}'
    if run.method == "ar":  # the same text without a draft: there for whom it interests
        return f'<section><details><summary class="head">{head}</summary>\n{inner}</details></section>'
    return f'<section><div class="head">{head}</div>\n{inner}</section>'


def _pass(index: int, i: int, run: Run) -> str:
    """The text of one pass, a token in a mark of where it came from."""
    n, offered = run.accepted[i], run.offered[i]
    title = _count(i, n) + (f"; the text offered {offered!r} for the last, which was rejected" if offered else "")
    tokens = "".join(f'<u class="{p.origin}">{_text(p.text)}</u>' for p in run.pieces[i])
    return f'<span id="r{index}p{i}" class="a{n}{" missed" if offered else ""}" title="{escape(title)}">{tokens}</span>'


def _step(span: int, count: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that cuts `span` into at most `count` parts."""
    power = 10 ** int(math.log10(max(span / count, 1)))
    return next(m * power for m in (1, 2, 5, 10) if m * power * count >= span)


def _plot(index: int, run: Run, top: int, longest: int, width: int) -> str:
    """Accepted tokens of each pass over the tokens generated so far, and their mean so far."""
    right, base = width - RIGHT, HEIGHT - BOTTOM

    def x(tokens: float) -> str:
        return f"{LEFT + tokens / longest * (right - LEFT):.2f}"

    def y(accepted: float) -> str:
        return f"{base - accepted / top * (base - TOP):.2f}"

    ends = list(accumulate(run.accepted))
    grid, bars, outline = "", "", f"M{x(0)},{base}"
    thin = min(0.8, 0.3 * width / longest)  # or the outline of a long run would hide its bars
    for v in range(0, top + 1, _step(top, 6)):
        grid += f'<path class="grid" d="M{LEFT},{y(v)}H{right}"/>'
        grid += f'<text x="{LEFT - 8}" y="{y(v)}" dy="4" text-anchor="end">{v}</text>'
    for v in range(0, longest + 1, _step(longest, width // 70)):
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
    kind = "narrow" if width == NARROW else "wide"
    return f"""<div class="plot {kind}"><svg viewBox="0 0 {width} {HEIGHT}" role="group"
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
section{margin-top:36px}.table{overflow-x:auto}
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
.text span:not(:has(u:not(:empty))){padding:2px}.text span:target{outline:2px solid var(--mean)}
u{text-decoration:none}u.retrieved{border-bottom:2px solid var(--ink)}u.predicted{border-bottom:2px dotted var(--ink)}
.origins>span{margin-right:20px}.missed{border-right:2px solid var(--mean)}
summary{cursor:pointer}summary h2::before{content:"▸ "}details[open] summary h2::before{content:"▾ "}
.settings{margin:-16px 0 24px;color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.text i::before{content:"↵";font-style:normal;opacity:.4}
svg{display:block;width:100%;margin-top:14px;font-size:12px}.narrow{display:none}
svg text{fill:var(--soft)}.bar{fill:var(--c,none)}.bar:hover{fill:var(--mean)}
.grid,.tick,.outline,.mean{fill:none;stroke:var(--line);pointer-events:none}
.tick,.outline{stroke:var(--soft)}.outline{stroke-opacity:.7}
.mean{stroke:var(--mean);stroke-width:2;stroke-linejoin:round}.halo{stroke:var(--page);stroke-width:5}
svg .meantext{fill:var(--mean)}
@media (max-width:600px){body{margin-top:20px;padding:0 14px}th,td{padding-left:5px;font-size:12px}
 thead th{font-size:10px;line-height:1.3}.wide{display:none}.narrow{display:block}}
</style></head><body><h1>$title</h1>
<p class="settings">$settings</p>
<div class="table"><table><thead><tr><th scope="col">method</th><th scope="col">tokens</th>
<th scope="col">forward passes</th><th scope="col">mean accepted (MAT)</th>
<th scope="col">tokens/s</th><th scope="col">speed vs ar</th><th scope="col">tokens identical to ar</th></tr>
</thead><tbody>
$rows
</tbody></table></div>
<section><h2>Prompt</h2><div class="text prompt">$prompt</div></section>
$runs
<p class="key">Each colour is a pass: its last token is the model's own, those before it were drafts. Solid line:
drafted from the text so far; dotted: in another way, from a prediction of the model's or from its earlier replies. A
red edge: the text offered another token there, which was not the model's; where the tree of the pass had room for it,
that draft was rejected. Point at a pass to read it.</p>
</body></html>
""")
