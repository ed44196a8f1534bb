"""What arms of `experiments.learn` train on and with: packed rows on the device, compiled programs."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from experiments.arm_training import Arm, Programs, Trainer
from experiments.measuring import Kept
from experiments.packed import conversations, encoded, own_examples, pack, prompts_of, read_packed, write_packed
from msn_jax import DecodeConfig, InputError
from msn_jax.config import DataSource
from msn_jax.io.loading import LM
from msn_jax.params import stack_layers
from msn_jax.records import keep_rows
from msn_jax.rows import read_rows


def earlier_replies(args: argparse.Namespace, lm: LM) -> dict[str, list]:
    """The examples of --replies to learn from, "own", and to hold out, "held"."""
    rows = {name: read_rows(DataSource(path=str(args.replies / f"{name}.jsonl"))) for name in ("held", "own")}
    talks = {name: [row["messages"] for row in found] for name, found in rows.items()}
    return {name: list(encoded(lm, found, args.tokens)) for name, found in talks.items()}


def new_replies(args: argparse.Namespace, lm: LM, fast: LM) -> dict[str, list]:
    """The same of replies to --prompts, which are kept in --out. fast: the model in the dtype that answers."""
    prompts = prompts_of(lm, conversations(args.prompts), args.tokens - args.max_new_tokens)
    config = DecodeConfig(method="ar", max_new_tokens=args.max_new_tokens, batch_size=args.answer_batch)
    heats = [float(t) for t in args.temperatures.split(",")]
    # Held-out prompts are answered once, greedily, and by none of the other rounds.
    split, found = args.answer_batch, {}
    parts = ("held", prompts[:split], 1, [0.0]), ("own", prompts[split:], args.answer_seconds, heats)
    for name, asked, seconds, temperatures in parts:
        answered = list(own_examples(fast, asked, config, seconds, temperatures))
        found[name] = [example for _, example in answered]
        keep_rows(args.out / f"{name}.jsonl", [{"messages": talk} for talk, _ in answered])
    return found


def made_rows(kind: str, args: argparse.Namespace, lm: LM, fast: LM) -> tuple[dict, dict, int]:
    """Packed rows to learn from, those that are held out, and how many examples they hold. kind: own or tuning."""
    if kind == "own":
        found = earlier_replies(args, lm) if args.replies else new_replies(args, lm, fast)
        return pack(found["own"], args.tokens), pack(found["held"], args.tokens), len(found["own"])
    examples = list(encoded(lm, conversations(args.tuning), args.tokens))
    whole = pack(examples, args.tokens)
    most = min(96, len(whole["tokens"]) // 4)
    held, whole = ({name: x[part] for name, x in whole.items()} for part in (slice(most), slice(most, None)))
    return whole, held, len(examples)


def kind_of(arm: Arm) -> str:
    """What an arm learns: the model's own replies, or those of --tuning."""
    return "own" if arm.drafts else "tuning"


def in_batches(held: dict, rows: int) -> dict:
    """Arrays [N, T] as [N / rows, rows, T], filled up with empty ones."""
    short = -len(held["tokens"]) % rows
    return {name: np.pad(x, ((0, short), (0, 0))).reshape(-1, rows, x.shape[1]) for name, x in held.items()}


class Prepared:
    """The rows on the device and the compiled programs of arms, made in the background from the first second. Compiling
    takes longest by far. Training waits for its own program alone, so few are compiled at a time, in order."""

    def __init__(self, lm: LM, fast: LM, arms: list[Arm], args: argparse.Namespace, kept: Kept):
        self.lm, self.fast, self.arms, self.args, self.kept = lm, fast, arms, args, kept
        self.frozen, self.placed, self.programs = stack_layers(fast.params), {}, {}
        self.compiling, reading = ThreadPoolExecutor(4), ThreadPoolExecutor(2)
        kinds = {kind_of(arm) for arm in arms}
        if args.rows_only:
            given = ("own", args.prompts or args.replies), ("tuning", args.tuning)
            kinds = {kind for kind, files in given if files}
        self.ready = {kind: reading.submit(self._prepare, kind) for kind in sorted(kinds)}

    def trainer(self, arm: Arm, seconds: float | None) -> Trainer | None:
        """Wait for an arm's rows and program. None: it was still being compiled after so many seconds."""
        self.ready[kind_of(arm)].result()
        try:
            program = self.programs[arm.program].result(seconds)
        except TimeoutError:
            return None
        return Trainer(arm, program, *self.placed[kind_of(arm), arm.rows])

    def close(self) -> None:
        """Wait for the rows; arms that are left out are compiled no more."""
        for future in self.ready.values():
            future.result()
        self.compiling.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, kind: str) -> None:
        arms = [arm for arm in self.arms if kind_of(arm) == kind]
        if kind == "own":  # of a shape that is known before the rows are
            shaped = lambda x, *n: jax.ShapeDtypeStruct((*n, self.args.tokens), x.dtype)
            empty, batches = pack([], self.args.tokens), lambda arm: -(-self.args.answer_batch // arm.rows)
            whole = {name: shaped(x, self.args.most_rows) for name, x in empty.items()}
            for arm in arms:
                self._compile(arm, whole, {name: shaped(x, batches(arm), arm.rows) for name, x in empty.items()})
        whole, held, count = self._rows(kind)
        if not arms:
            return
        whole = jax.device_put(whole)
        for arm in arms:
            if (kind, arm.rows) not in self.placed:
                self.placed[kind, arm.rows] = whole, jax.device_put(in_batches(held, arm.rows)), count
            self._compile(arm, *self.placed[kind, arm.rows][:2])

    def _rows(self, kind: str) -> tuple[dict, dict, int]:
        """Rows to learn from and to hold out, and how many of the first hold something."""
        args, file = self.args, self.args.out / f"rows-{kind}.npz"
        if file.exists():
            whole, held, examples = read_packed(file, args.tokens)
        else:
            whole, held, examples = made_rows(kind, args, self.lm, self.fast)
            if not len(whole["tokens"]) or not len(held["tokens"]):
                name = "prompts" if kind == "own" else "tuning"
                raise InputError(f"--{name}: too few rows to learn from and to hold out")
            write_packed(file, whole, held, examples)
        count = len(whole["tokens"])
        if kind == "own":
            # Of one shape whatever was answered, so that programs compile before: those past the count are empty.
            count = min(count, args.most_rows)
            filled = lambda x, n: np.pad(x[:n], ((0, max(0, n - len(x))), (0, 0)))
            whole = {name: filled(x, args.most_rows) for name, x in whole.items()}
            held = {name: filled(x, args.answer_batch) for name, x in held.items()}
        self.kept.add({kind: examples}, f"{kind}: {examples} examples in {count} packed rows")
        return whole, held, count

    def _compile(self, arm: Arm, whole: dict, held: dict) -> None:
        if arm.program not in self.programs:
            self.programs[arm.program] = self.compiling.submit(Programs, arm, self.args, self.frozen, whole, held)
