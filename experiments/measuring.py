"""What `experiments.learn` keeps, and its measurements, which go on beside the training."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import jax

from experiments.arm_training import Arm
from experiments.one_batch import measure, shown, with_trained
from msn_jax.adapters import init_trained
from msn_jax.decode.sources import drafters
from msn_jax.errors import first_line
from msn_jax.io.loading import LM
from msn_jax.records import keep_rows, kept_rows


class Kept:
    """learn.jsonl: what earlier calls left there, and what this one adds."""

    def __init__(self, folder: Path):
        self.file, self.begin, self.writing = folder / "learn.jsonl", time.perf_counter(), Lock()
        earlier = kept_rows(self.file)
        self.trained = {(row["arm"], row["seed"]) for row in earlier if "steps" in row}
        self.measured = {(row["arm"], row.get("seed"), row["dtype"]) for row in earlier if "answers" in row}

    def add(self, record: dict, text: str) -> None:
        with self.writing:
            keep_rows(self.file, [record])
            print(f"{time.perf_counter() - self.begin:6.1f} s  {text}", flush=True)


def plan(arm: Arm, args: argparse.Namespace) -> dict[str, str]:
    """What an arm is measured with, by dtype."""
    if arm.heads.kind:
        return {args.dtype: {"medusa": args.medusa_methods, "eagle": args.eagle_methods}[arm.heads.kind]}
    if arm.lora.draft_layers:
        return {args.dtype: args.layers_methods}
    if not arm.lora.draft_only:
        return {args.dtype: args.marked_methods if arm.noise.mark else args.methods}
    methods = {args.dtype: args.draft_methods}
    return methods | ({"float32": args.float32_methods} if args.float32_methods else {})


class Measuring:
    """Tokens a pass, measured in the background while others train."""

    def __init__(self, lm: LM, questions: list[dict], args: argparse.Namespace, kept: Kept):
        self.lm, self.questions, self.args, self.kept = lm, questions, args, kept
        self.pool, self.waiting = ThreadPoolExecutor(8), []
        self.in_turn, self.choosing = defaultdict(Lock), Lock()

    def soon(self, model: LM, name: str, methods: str, **record) -> None:
        """Measure a model, where no earlier call did."""
        if (name, record.get("seed"), str(model.dtype)) not in self.kept.measured:
            self.waiting.append(self.pool.submit(self._measure, model, name, methods, **record))

    def arm(self, arm: Arm, seed: int, trained) -> None:
        for dtype, methods in plan(arm, self.args).items():
            self.soon(with_trained(self.lm, trained, dtype), arm.name, methods, seed=seed)

    def compile(self, arms: list[Arm]) -> None:
        """Compile what arms are measured with that draft at noise or with heads, each shape once: as they begin."""
        shape_of = lambda arm: (arm.drafts and arm.lora.rank, arm.noise.mark, arm.noise.length, arm.heads)
        for arm in {shape_of(arm): arm for arm in arms if arm.drafts or arm.noise.mark}.values():
            new = init_trained(jax.random.key(0), self.lm.cfg, arm.lora, arm.noise, heads=arm.heads)
            for dtype, methods in plan(arm, self.args).items():
                self.soon(with_trained(self.lm, new, dtype), f"new {arm.name}", methods)

    def failures(self) -> list[str]:
        """Wait for all that was asked; a line for each that failed."""
        found = []
        for future in self.waiting:
            try:
                future.result()
            except jax.errors.JaxRuntimeError as e:
                found.append(f"a measurement: {first_line(e)}")
        return found

    def _measure(self, model: LM, name: str, methods: str, **record) -> None:
        # Each program is compiled once: those of one shape wait for each other.
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (model.params.embed, drafters(model)))
        with self.choosing:
            turn = self.in_turn[str(shapes)]
        with turn:
            speed = measure(model, self.questions, methods, self.args.max_new_tokens)
        text = f"{name} {model.dtype}: {shown(speed)}"
        self.kept.add({"arm": name, "dtype": str(model.dtype)} | record | speed, text)
