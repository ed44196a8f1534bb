"""Speed and losslessness of the decoding methods on Spec-Bench questions.

    python benchmarks/spec_bench.py --ckpt smollm2-135m-instruct --questions FILE.jsonl --methods ar,tr-jacobi

A method is METHOD[:TREE][@BATCH], such as tr-jacobi:msn69@4; the first is `ar`, and what the others are compared
with. Methods take turns, question by question. Later turns of a question go on from the answer of
`ar`. With --results FILE every answer is kept there, and a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import defaultdict
from pathlib import Path

import jax
from tqdm import tqdm

from msn_jax import DecodeConfig, InputError, kernels, load
from msn_jax.answers import answer_row, figures, first_difference
from msn_jax.decode.generate import generate_batches, is_near_tie
from msn_jax.decode.prompts import encode
from msn_jax.decode.tree_sets import tree_set
from msn_jax.io.loading import DTYPES
from msn_jax.questions import read_questions, spread
from msn_jax.records import keep_rows, kept_rows, print_record
from msn_jax.terminal import run_command

# XLA:CPU takes several memory maps for each program, and Linux gives a process 65,530. Past them LLVM ends it.
MOST_MAPS = 40_000


def split_method(text: str) -> tuple[str, str, str]:
    """Method, tree and batch size of METHOD[:TREE][@BATCH]; "" for what is not there."""
    name, _, batch = text.partition("@")
    method, _, tree = name.partition(":")
    return method, tree, batch


def parse_method(text: str, base: DecodeConfig) -> DecodeConfig:
    method, tree, batch = split_method(text)
    if batch and not batch.isdecimal():
        raise InputError(f"--methods {text}: the batch size {batch!r} is no number")
    return dataclasses.replace(base, method=method, tree=tree or None, batch_size=int(batch or 1))


def compare(lm, prompt: list[int], expected: list[int], got: list[int], config: DecodeConfig, request: int) -> str:
    """identical, near_tie or different; comparison ends at the first difference.

    Where the kernels run no bit depends on the width of a pass, and nothing excuses a difference.
    """
    at = first_difference(expected, got)
    if at is None:
        return "identical"
    if lm.backend == "cpu" and kernels.instruction_set():
        return "different"
    return "near_tie" if is_near_tie(lm, prompt + expected[:at], config, request) else "different"


def print_table(title: str, methods: dict) -> None:
    print(f"\n{title}")
    head = f"{'method':<22} {'tokens/s':>8} {'to ar':>6} {'MAT':>5} {'no loops':>8} {'rep4':>5}"
    print(f"{head} {'same':>5} {'ties':>4} {'diff':>4}")
    for name, f in methods.items():
        print(
            f"{name:<22} {f['tokens_per_s']:>8.1f} {f['ratio_to_ar']:>6.2f} {f['mat']:>5.2f} {f['mat_no_loops']:>8.2f}"
            f" {f['rep4_frac']:>5.2f} {f['identical']:>5} {f['near_ties']:>4} {f['different']:>4}"
        )


def read_done(path: Path | None, run: dict) -> list[list[dict]]:
    """Answered groups of an earlier, cut-off run with the same settings; begins the file where there is none."""
    if path is None:
        return []
    try:
        lines = kept_rows(path)
    except ValueError:
        lines = [None]
    if not lines and not (path.exists() and path.stat().st_size):
        keep_rows(path, [run])
    elif lines[:1] != [run]:
        raise InputError(f"--results {path}: holds another run; name another file")
    return lines[1:]


def forget_programs(lm, maps: Path = Path("/proc/self/maps")) -> None:
    """Let compiled programs go where many are held: each method has its own for each size of the cache."""
    if maps.exists() and len(maps.read_text().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        lm.ran.clear()  # or they would be compiled again in what is timed


def answer_group(lm, group: list[dict], arms: dict[str, DecodeConfig]) -> list[dict]:
    """All turns of a few questions by every method, in turn."""
    forget_programs(lm)
    rows = []
    history = {q["question_id"]: [] for q in group}
    for turn in range(max(len(q["turns"]) for q in group)):
        asked = [q for q in group if turn < len(q["turns"])]
        for q in asked:
            history[q["question_id"]].append({"role": "user", "content": q["turns"][turn]})
        prompts = [encode(lm, history[q["question_id"]]) for q in asked]
        expected = None
        for name, config in arms.items():
            results = [r for batch in generate_batches(lm, prompts, config) for r in batch]
            expected = expected or results
            for i, (q, plain, result) in enumerate(zip(asked, expected, results, strict=True)):
                more = dict(
                    prompt_tokens=len(prompts[i]),
                    accepted=result.accepted,
                    seconds=result.seconds,
                    prefill_seconds=result.prefill_seconds,
                    outcome=compare(lm, prompts[i], plain.tokens, result.tokens, config, i),
                )
                rows.append(answer_row(q, turn, name, result.tokens, result.forwards, **more))
        for q, plain in zip(asked, expected, strict=True):
            history[q["question_id"]].append({"role": "assistant", "content": plain.text})
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", required=True)
    p.add_argument(
        "--adapter", nargs="+", action="extend", metavar="DIR", help="of an adapter, or several, see decode.py"
    )
    p.add_argument("--questions", required=True, help="JSONL with question_id, category, turns")
    p.add_argument(
        "--methods",
        default="ar,lookup,jacobi,tr-jacobi",
        metavar="METHOD[:TREE][@BATCH],...",
        help="what to compare, `ar` first; such as ar,tr-jacobi:msn69@4",
    )
    p.add_argument("--max_new_tokens", type=int, default=128)
    p.add_argument("--limit", type=int, help="use this many questions, spread over the categories")
    p.add_argument("--dtype", default="float32", choices=DTYPES)
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--top_k", type=int, default=0)
    p.add_argument("--top_p", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--results", type=Path, help="keep answers here and resume from them")
    args = p.parse_args()

    base = DecodeConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    arms = {text: parse_method(text, base) for text in args.methods.split(",")}
    if split_method(next(iter(arms)))[:2] != ("ar", ""):
        raise InputError("--methods must begin with ar: the others are compared with it")
    for config in arms.values():
        tree_set(config.method, config.tree)
    questions = spread(read_questions(args.questions), args.limit)
    if not questions or (args.limit is not None and args.limit < 1):
        raise InputError(f"--questions {args.questions}: no questions, or --limit below 1")
    run = {name: value for name, value in vars(args).items() if name != "results"}
    done = read_done(args.results, run)

    lm = load(args.ckpt, adapter=args.adapter, dtype=args.dtype)
    # Groups as large as the largest batch, of questions with as many turns, so that batches are full; always the
    # same ones, and one line of the results each: a group is answered whole or again.
    size = max(config.batch_size for config in arms.values())
    by_turns = defaultdict(list)
    for question in questions:
        by_turns[len(question["turns"]) if size > 1 else 0].append(question)
    groups = [qs[i : i + size] for qs in by_turns.values() for i in range(0, len(qs), size)]
    for group in tqdm(groups[len(done) :], total=len(groups), initial=len(done), unit="group", mininterval=5):
        done.append(answer_group(lm, group, arms))
        if args.results:
            keep_rows(args.results, [done[-1]])
    rows = [row for group in done for row in group]
    plain = next(iter(arms))

    def table(rows):
        ar = [r for r in rows if r["method"] == plain]
        return {name: figures([r for r in rows if r["method"] == name], ar) for name in arms}

    categories = {
        c: table([r for r in rows if r["category"] == c]) for c in dict.fromkeys(q["category"] for q in questions)
    }
    for category, methods in categories.items():
        print_table(category, methods)
    overall = table(rows)
    print_table("overall", overall)
    print_record(dtype=args.dtype, seed=args.seed, methods=overall, categories=categories)


if __name__ == "__main__":
    run_command(main)
