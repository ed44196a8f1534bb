"""Speed and losslessness of the methods on this device: one answer at a time, all answers by every method."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import jax

from benchmarks.spec_bench import repeated_4grams
from benchmarks.stages.check import golden_prompts
from benchmarks.stages.loops import Loop, first_difference, first_gaps
from benchmarks.stages.stage import Stage, compile_all
from benchmarks.stages.wide import WIDE
from msn_jax import load
from msn_jax.decode import TREE_SETS
from msn_jax.decode.prompts import encode
from msn_jax.decode.verify import NEAR_TIE
from msn_jax.questions import read_questions, spread

DTYPE = "bfloat16"
# METHOD[:TREE], with the adapter (+) or without, in order of worth. Trees that are not in TREE_SETS are those of
# wide.py.
ARMS = (
    "ar",
    "tr-jacobi:msn69",
    "+tr-jacobi:draft21",
    "tr-jacobi:mix64",
    "+tr-jacobi:wide64",
    "+tr-jacobi:wide112",
    "lookup:chain16",
    "+jacobi:draft16",
    "recycling:recycle80",
    "+tr-jacobi:draft13mix",
    "+tr-jacobi:draft",
    "jacobi:msn69",
)
WARM_TOKENS = 8


def ask(questions: list[dict], lm, loops: dict[str, Loop], stage: Stage, new_tokens: int) -> list[dict]:
    """Answers of every loop to every turn; later turns go on from the answer of `ar`."""
    rows = []
    for question in questions:
        if stage.left_s < 0:
            break
        history = []
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
                rows.append(
                    {
                        "question_id": question["question_id"],
                        "category": question["category"],
                        "turn": turn,
                        "method": name,
                        "tokens": len(answer["tokens"]),
                        "forwards": answer["forwards"],
                        "seconds": seconds,
                        "prefill_seconds": prefill_seconds,
                        "rep4_frac": repeated_4grams(answer["tokens"]),
                        "parted_after": None if place is None else prompt + expected[:place],
                    }
                )
            history.append({"role": "assistant", "content": lm.tokenizer.decode(expected, skip_special_tokens=True)})
    return rows


def judge(lm, rows: list[dict]) -> None:
    """Give each row its outcome: identical, near_tie or different."""
    parted = [row for row in rows if row["parted_after"] is not None]
    gaps = []
    for at in range(0, len(parted), 16):
        gaps += first_gaps(lm, [row["parted_after"] for row in parted[at : at + 16]])
    for row in rows:
        row["outcome"] = "identical"
    for row, gap in zip(parted, gaps, strict=True):
        row["outcome"], row["gap"] = ("near_tie" if gap < NEAR_TIE else "different"), round(gap, 4)
    for row in rows:
        del row["parted_after"]


def run(stage: Stage, args) -> None:
    """One row of the file holds all answers: methods are compared within one run."""
    new_tokens, slots, chunk = (16, 256, 64) if stage.small else (128, 2048, 512)
    if args.questions:
        questions = spread(read_questions(args.questions), 3 if stage.small else 26)
    else:
        texts = [prompt[0]["content"] for prompt in golden_prompts()]
        questions = [{"question_id": i, "category": "own", "turns": [text]} for i, text in enumerate(texts)]
        questions = questions[: 3 if stage.small else None]
    what = {"dtype": DTYPE, "batch": 1, "questions": Path(args.questions or "golden_ar.json").name}
    if not stage.todo([what]):
        return
    with_adapter = load(args.ckpt, adapter=args.adapter, dtype=DTYPE)
    plain = dataclasses.replace(with_adapter, drafter=None)
    arms = [arm for arm in ((*ARMS[:3], ARMS[4]) if stage.small else ARMS) if args.adapter or arm[0] != "+"]
    arms += [f"tr-jacobi:{name}" for name in args.trees.split(",") if name]
    loops = {}
    for arm in arms:
        lm = with_adapter if arm[0] == "+" else plain
        if arm.partition(":")[2] in ("", *TREE_SETS, *WIDE):
            loops[arm] = Loop(lm, arm.lstrip("+"), 1, slots, chunk, new_tokens)
    start = time.monotonic()
    errors = {}
    for name, program in compile_all({name: loop.lower for name, loop in loops.items()}).items():
        if isinstance(program, Exception):
            errors[name] = str(program).split("\n")[0][:300]
            del loops[name]
        else:
            loops[name].program = program
            # The first run sets up what later ones find.
            warm = loops[name].state([[1] * WARM_TOKENS], max_new_tokens=WARM_TOKENS)
            loops[name].call(warm, WARM_TOKENS)
    some = next(iter(loops.values()))
    some.answers([[1] * (chunk + 1)])  # prefill is the same program for all
    compile_s = round(time.monotonic() - start, 1)
    rows = ask(questions, plain, loops, stage, new_tokens)
    asked = len({row["question_id"] for row in rows})
    judge(plain, rows)
    sizes = {name: max(tree.size for tree in loop.trees.trees) for name, loop in loops.items()}
    stage.keep(
        what, asked=asked, max_new_tokens=new_tokens, slots=slots, compile_s=compile_s, errors=errors, nodes=sizes,
        answers=rows,
    )  # fmt: skip
    if asked < len(questions):
        stage.leave_out([what | {"questions": len(questions) - asked}], "no time left")
    trace(stage, loops, plain)


def trace(stage: Stage, loops: dict[str, Loop], lm) -> None:
    """Keep what shows that the loop stays on the device: its compiled text, and a profile of some passes."""
    loop = next(reversed(loops.values()))
    text = loop.program.as_text()
    (stage.folder / "loop.hlo.txt").write_text(text)
    facts = {name: text.count(name) for name in ("while(", "conditional(", "outfeed", "infeed", "send(", "recv(")}
    with jax.profiler.trace(str(stage.folder / "trace")):
        loop.call(loop.state([[1] * WARM_TOKENS], max_new_tokens=WARM_TOKENS), WARM_TOKENS)
    stage.keep({"what": "compiled loop", "method": next(reversed(loops))}, counts=json.dumps(facts))
