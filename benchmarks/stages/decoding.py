"""Speed and losslessness of the methods on this device: one answer at a time, all answers by every method."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax

from benchmarks.stages.check import golden_prompts
from benchmarks.stages.loops import Loop, first_gaps
from benchmarks.stages.stage import Stage, compile_all
from msn_jax import load
from msn_jax.answers import answer_row, first_difference
from msn_jax.decode.prompts import encode
from msn_jax.decode.verify import NEAR_TIE
from msn_jax.errors import first_line
from msn_jax.questions import read_questions, spread

DTYPE = "bfloat16"
# METHOD[:TREE], with the adapter (+) or without, in order of worth.
ARMS = (
    "ar",
    "tr-jacobi:mix64",
    "+tr-jacobi:wide64",
    "tr-jacobi:msn69",
    "lookup:chain16",
    "+tr-jacobi:draft21",
    "+tr-jacobi:ahead",
    "jacobi:msn69",
)
WARM_TOKENS = 8


def ask(question: dict, lm, loops: dict[str, Loop]) -> list[dict]:
    """Answers of every loop to every turn of a question; later turns go on from the answer of `ar`."""
    rows, history = [], []
    for turn, text in enumerate(question["turns"]):
        history.append({"role": "user", "content": text})
        prompt = encode(lm, history)
        if not all(loop.fits(prompt) for loop in loops.values()):
            break
        expected = None
        for name, loop in loops.items():
            (answer,), seconds, prefill_seconds = loop.answers([prompt])
            expected = expected or answer["tokens"]
            place = first_difference(expected, answer["tokens"])
            parted = None if place is None else prompt + expected[:place]
            more = dict(seconds=seconds, prefill_seconds=prefill_seconds, parted_after=parted)
            rows.append(answer_row(question, turn, name, answer["tokens"], answer["forwards"], **more))
        history.append({"role": "assistant", "content": lm.tokenizer.decode(expected, skip_special_tokens=True)})
    return rows


def judge(lm, rows: list[dict]) -> None:
    """Give each row its outcome: identical, near_tie or different."""
    for row in rows:
        row["outcome"], text = "identical", row.pop("parted_after")
        if text is not None:
            (gap,) = first_gaps(lm, [text])
            row["outcome"], row["gap"] = ("near_tie" if gap < NEAR_TIE else "different"), round(gap, 4)


def questions_of(stage: Stage, path: str | None) -> list[dict]:
    if path:
        return spread(read_questions(path), 3 if stage.small else 26)
    texts = [prompt[0]["content"] for prompt in golden_prompts()]
    questions = [{"question_id": i, "category": "own", "turns": [text]} for i, text in enumerate(texts)]
    return questions[: 3 if stage.small else None]


def compiled_loops(stage: Stage, args, sizes: tuple[int, int, int]) -> tuple[object, dict[str, Loop]]:
    """The model without its adapter, and each arm's loop, compiled and run once."""
    slots, chunk, new_tokens = sizes
    with_adapter = load(args.ckpt, adapter=args.adapter, dtype=DTYPE)
    plain = dataclasses.replace(with_adapter, drafter=None)
    arms = [arm for arm in (ARMS[:4] if stage.small else ARMS) if args.adapter or arm[0] != "+"]
    arms += [f"tr-jacobi:{name}" for name in args.trees.split(",") if name]
    start, loops, errors = time.monotonic(), {}, {}
    for arm in arms:
        loops[arm] = Loop(with_adapter if arm[0] == "+" else plain, arm.lstrip("+"), 1, slots, chunk, new_tokens)
    for name, program in compile_all({name: loop.lower for name, loop in loops.items()}).items():
        if isinstance(program, Exception):
            errors[name] = first_line(program)
            del loops[name]
            continue
        loops[name].program = program
        # The first run sets up what later ones find.
        loops[name].call(loops[name].state([[1] * WARM_TOKENS], max_new_tokens=WARM_TOKENS), WARM_TOKENS)
    next(iter(loops.values())).answers([[1] * (chunk + 1)])  # prefill is the same program for all
    what = {"what": "programs"}
    if stage.row(**what) is None:
        nodes = {name: max(tree.size for tree in loop.trees.trees) for name, loop in loops.items()}
        compile_s = round(time.monotonic() - start, 1)
        stage.keep(what, nodes=nodes, errors=errors, compile_s=compile_s, max_new_tokens=new_tokens, slots=slots)
    return plain, loops


def run(stage: Stage, args) -> None:
    """One row for each question: methods take turns on it."""
    sizes = (256, 64, 16) if stage.small else (2048, 512, 128)
    name = Path(args.questions or "golden_ar.json").name
    questions = {question["question_id"]: question for question in questions_of(stage, args.questions)}
    keys = [{"questions": name, "dtype": DTYPE, "batch": 1, "question_id": id_} for id_ in questions]
    todo = stage.todo(keys)
    if not todo:
        return
    plain, loops = compiled_loops(stage, args, sizes)
    for number, what in enumerate(todo):
        if stage.left_s < 0:
            stage.leave_out([{"questions": len(todo) - number}], "no time left")
            break
        rows = ask(questions[what["question_id"]], plain, loops)
        judge(plain, rows)
        stage.keep(what, answers=rows)
    if stage.row(what="compiled loop") is None:
        trace(stage, loops)


def trace(stage: Stage, loops: dict[str, Loop]) -> None:
    """Keep what shows that the loop stays on the device: its compiled text, and a profile of some passes."""
    loop = next(reversed(loops.values()))
    text = loop.program.as_text()
    (stage.folder / "loop.hlo.txt").write_text(text)
    facts = {name: text.count(name) for name in ("while(", "conditional(", "outfeed", "infeed", "send(", "recv(")}
    with jax.profiler.trace(str(stage.folder / "trace")):
        loop.call(loop.state([[1] * WARM_TOKENS], max_new_tokens=WARM_TOKENS), WARM_TOKENS)
    stage.keep({"what": "compiled loop"}, method=next(reversed(loops)), counts=facts)
