"""Answers of benchmarks: where two part, whether one loops, and what those of a method come to."""

from __future__ import annotations

LOOPS = 0.2  # an answer that repeats a larger share of its 4-grams is a loop


def repeated_4grams(tokens: list[int]) -> float:
    """Share of 4-grams that occurred before in the same answer."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def first_difference(expected: list[int], got: list[int]) -> int | None:
    """The place where two answers part, None where they are the same."""
    if expected == got:
        return None
    return next((i for i, (a, b) in enumerate(zip(expected, got)) if a != b), min(len(expected), len(got)))


def answer_row(question: dict, turn: int, method: str, tokens: list[int], forwards: int, **more) -> dict:
    """A method's answer to a turn of a question, as `figures` counts it; more: seconds, outcome, what else is kept."""
    asked = {"question_id": question["question_id"], "category": question["category"], "turn": turn}
    counted = {"tokens": len(tokens), "forwards": forwards, "rep4_frac": repeated_4grams(tokens)}
    return {**asked, "method": method, **counted, **more}


def figures(rows: list[dict], ar: list[dict]) -> dict:
    """Speed, tokens a pass and identity of a method's answers, beside those of `ar` to the same questions."""
    rate = lambda rows: sum(r["tokens"] for r in rows) / sum(r["seconds"] for r in rows)
    mat = lambda rows: sum(r["tokens"] for r in rows) / max(1, sum(r["forwards"] for r in rows))
    outcomes = [r["outcome"] for r in rows]
    return {
        "tokens_per_s": round(rate(rows), 2),
        "ratio_to_ar": round(rate(rows) / rate(ar), 3),
        "mat": round(mat(rows), 3),
        "questions": len({r["question_id"] for r in rows}),
        "outputs": len(rows),
        "identical": outcomes.count("identical"),
        "near_ties": outcomes.count("near_tie"),
        "different": outcomes.count("different"),
        "rep4_frac": round(sum(r["rep4_frac"] for r in rows) / len(rows), 3),
        "mat_no_loops": round(mat([r for r in rows if r["rep4_frac"] < LOOPS]), 3),
    }
