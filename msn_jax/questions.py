"""Questions of benchmarks: JSON lines with question_id, category and turns, as Spec-Bench and MT-Bench have them."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path

from msn_jax.errors import InputError


def read_questions(path: str | Path) -> list[dict]:
    """The question_id, category and turns of every row. Raises InputError with the line of one that is no question."""
    questions = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = list(file)
    except (OSError, UnicodeError) as e:
        raise InputError(f"{path}: cannot be read ({e})") from None
    for number, line in enumerate(lines, 1):
        try:
            question = json.loads(line)
            assert question["turns"] and all(isinstance(turn, str) for turn in question["turns"])
            questions.append({key: question[key] for key in ("question_id", "category", "turns")})
        except (ValueError, KeyError, TypeError, AssertionError):
            raise InputError(f"{path} line {number}: not JSON with question_id, category, turns") from None
    return questions


def spread(questions: list[dict], limit: int | None) -> list[dict]:
    """The first `limit` questions when categories take turns."""
    by_category = defaultdict(list)
    for question in questions:
        by_category[question["category"]].append(question)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_category.values()))
    return [q for q in turns if q is not None][:limit]
