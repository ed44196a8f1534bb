"""Whether the output is right here: float32 against answers of `ar` that are kept from a CPU, bfloat16 against `ar`.

python -m benchmarks.stages.check      # on a CPU: writes golden_ar.json anew
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.stages.loops import Loop, first_gaps
from benchmarks.stages.stage import Stage, compile_all
from msn_jax import flash, load
from msn_jax.answers import first_difference
from msn_jax.decode.prompts import encode
from msn_jax.decode.verify import NEAR_TIE
from msn_jax.errors import first_line
from msn_jax.linear import linear
from msn_jax.model import causal_attention

GOLDEN = Path(__file__).parent / "golden_ar.json"
NEW_TOKENS, SLOTS, CHUNK = 64, 256, 64
# METHOD[:TREE], with the adapter (+) or without. Each is a program to compile, some 8 s on a GPU.
ARMS = {
    "float32": ("ar", "tr-jacobi", "+tr-jacobi", "lookup", "jacobi", "recycling"),
    "bfloat16": ("ar", "+tr-jacobi", "tr-jacobi"),  # the stage `decode` has more
}


def golden_prompts() -> list:
    """Twelve conversations, written for this file."""
    return [[{"role": "user", "content": text}] for text in json.loads(GOLDEN.read_text())["prompts"]]


def fingerprint(lm) -> list[float]:
    """Numbers that tell one set of float32 weights from another."""
    rows = np.asarray(lm.params.embed[:4].astype(jnp.float32))
    return [round(float(x), 3) for x in np.abs(rows).sum(axis=1)]


def golden_answers(lm, prompts: list[list[int]]) -> list[list[int]] | None:
    """The kept answers, where they are of these weights and these prompts."""
    golden = json.loads(GOLDEN.read_text())
    same = golden["prompt_tokens"] == prompts and golden["weights"] == fingerprint(lm)
    return golden["tokens"] if same else None


def float32_error() -> float:
    """Largest error of a float32 product of the model against NumPy in float64, to the largest value."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((16, 1024)), rng.standard_normal((1024, 1024))
    got = jax.jit(linear)(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
    exact = x.astype(np.float32).astype(np.float64) @ w.astype(np.float32).astype(np.float64).T
    return float(np.abs(np.asarray(got, np.float64) - exact).max() / np.abs(exact).max())


def flash_errors() -> dict:
    """Largest differences of cuDNN's attention to XLA's form in bfloat16, packed rows, to the largest value."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 512, 3, 3, 64), (2, 3, 512, 64), (2, 3, 512, 64)
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    segments = jnp.repeat(jnp.array([[1, 2, 3, 0], [1, 1, 2, 2]]), 128, axis=1)

    def sums(attend):
        loss = lambda q, k, v: (attend(q, k, v, segments).astype(jnp.float32) ** 2).sum()
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    try:
        pairs = zip(sums(causal_attention), sums(flash.attention), strict=True)
        pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
        return {"largest_error": max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)}
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as e:
        return {"error": first_line(e)}


def compared(lm, prompts, expected, got) -> dict:
    """How answers stand to those expected; of each that parts, where, and how close the two best scores were there."""
    places = [first_difference(e, g) for e, g in zip(expected, got, strict=True)]
    parted = [i for i, at in enumerate(places) if at is not None]
    gaps = first_gaps(lm, [prompts[i] + expected[i][: places[i]] for i in parted])
    return {
        "outputs": len(expected),
        "identical": len(expected) - len(parted),
        "near_ties": sum(gap < NEAR_TIE for gap in gaps),
        "different": sum(gap >= NEAR_TIE for gap in gaps),
        "first_differences": [
            {"prompt": i, "token": places[i], "gap": round(gap, 5)} for i, gap in zip(parted, gaps, strict=True)
        ],
    }


def run(stage: Stage, args) -> None:
    if stage.row(what="float32 product") is None:
        stage.keep({"what": "float32 product"}, largest_error=float32_error())
    new_tokens = 16 if stage.small else NEW_TOKENS
    if jax.default_backend() == "gpu" and stage.row(what="cudnn attention") is None:
        stage.keep({"what": "cudnn attention"}, **flash_errors())
    for dtype in ARMS:
        arms = ARMS[dtype][: 3 if stage.small else None]
        keys = [{"dtype": dtype, "method": arm} for arm in arms if args.adapter or not arm.startswith("+")]
        todo = stage.todo(keys)
        if not todo:
            continue
        if stage.left_s < 0:
            stage.leave_out([{"dtype": dtype}], "no time left")
            continue
        with_adapter = load(args.ckpt, adapter=args.adapter, dtype=dtype)
        plain = dataclasses.replace(with_adapter, drafter=None)
        everything = encode_all(plain)
        prompts = everything[: 4 if stage.small else None]
        names = {"ar"} | {what["method"] for what in todo}
        loops = {
            name: Loop(
                with_adapter if name[0] == "+" else plain, name.lstrip("+"), len(prompts), SLOTS, CHUNK, new_tokens
            )
            for name in names
        }
        for name, program in compile_all({name: loop.lower for name, loop in loops.items()}).items():
            loops[name].program = program
        answers = {}
        for name, loop in loops.items():
            if isinstance(loop.program, Exception):
                stage.keep({"dtype": dtype, "method": name}, error=first_line(loop.program))
            else:
                answers[name] = [row["tokens"] for row in loop.answers(prompts)[0]]
        golden = None
        if dtype == "float32" and (golden := golden_answers(plain, everything)) is not None:
            golden = [tokens[:new_tokens] for tokens in golden[: len(prompts)]]
        for what in todo:
            if what["method"] in answers:
                against = "ar on a CPU, float32" if golden else "ar here"
                figures = compared(plain, prompts, golden or answers["ar"], answers[what["method"]])
                stage.keep(what, against=against, **figures)


def encode_all(lm) -> list[list[int]]:
    return [encode(lm, prompt) for prompt in golden_prompts()]


def main() -> None:
    lm = load("smollm2-135m-instruct")
    prompts = encode_all(lm)
    loop = Loop(lm, "ar", len(prompts), SLOTS, CHUNK, NEW_TOKENS)
    loop.program = loop.lower().compile()
    rows, _, _ = loop.answers(prompts)
    golden = json.loads(GOLDEN.read_text())
    golden |= {"weights": fingerprint(lm), "prompt_tokens": prompts, "tokens": [row["tokens"] for row in rows]}
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    GOLDEN.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
