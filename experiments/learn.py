"""Train many arms on one accelerator in minutes: own replies, rows that stay on the device, many steps a dispatch.

    python -m experiments.learn --ckpt CKPT --prompts A.jsonl --tuning B.jsonl --questions Q.jsonl --out OUT \
      --arms plain,inline,inline-marked,beside,beside-marked,draft-r28,draft-r48-int8 --seconds 300

Arms: draft-rRANK[-int8][-l1|-overlap][-nLENGTH] (draft-only adapters), medusa-HEADS and eagle[-VOCABULARY] learn the
model's own replies to --prompts; plain, inline[-marked] and beside[-marked][-model] are LoRA runs of rank 16 on
--tuning, as the arms of evidence.yaml.
ARM@STEPSxROWS trains that long; draft arms without it share what is left of --seconds. Arms with steps come first.
Each arm's adapter and figures are in --out as soon as it is done: OUT/ARM-seedS/, OUT/learn.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import jax
import numpy as np

from experiments.arm_training import Arm, Programs, Trainer, parse_arm
from experiments.one_batch import measure, shown, with_trained
from experiments.packed import conversations, encoded, own_examples, pack, prompts_of
from msn_jax import DecodeConfig, InputError, init, load
from msn_jax.adapters import init_trained
from msn_jax.config import DataSource
from msn_jax.decode.sources import drafters
from msn_jax.errors import first_line
from msn_jax.io.adapters import load_adapter, loaded_fingerprint
from msn_jax.io.loading import LM
from msn_jax.params import stack_layers
from msn_jax.questions import read_questions, spread
from msn_jax.records import keep_rows, run_record
from msn_jax.rows import read_rows
from msn_jax.terminal import run_command


def plan(arm: Arm, args: argparse.Namespace) -> dict[str, str]:
    """What an arm is measured with, by dtype."""
    if arm.heads.kind:
        return {args.dtype: {"medusa": args.medusa_methods, "eagle": args.eagle_methods}[arm.heads.kind]}
    if not arm.lora.draft_only:
        return {args.dtype: args.marked_methods if arm.noise.mark else args.methods}
    methods = {args.dtype: args.draft_methods}
    return methods | ({"float32": args.float32_methods} if args.float32_methods else {})


def smaller(lm: LM) -> LM:
    """A random model of the same vocabulary for rehearsals."""
    cfg = dataclasses.replace(lm.cfg, embed=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=64)
    return dataclasses.replace(lm, cfg=cfg, params=init(jax.random.key(0), cfg))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", required=True)
    p.add_argument("--base", help="how adapters name their base; left out: as --ckpt")
    p.add_argument("--adapter", help="a draft-only adapter to measure beside the arms")
    p.add_argument("--prompts", type=Path, nargs="*", default=[], help="rows whose prompts the model answers itself")
    p.add_argument("--tuning", type=Path, nargs="*", default=[], help="rows whose replies are learnt")
    p.add_argument("--questions", required=True, help="JSONL with question_id, category, turns; first turns are asked")
    p.add_argument("--limit", type=int, help="use this many questions, spread over the categories")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--arms", default="")
    p.add_argument("--seeds", default="0", help="draft arms have the first alone")
    p.add_argument("--seconds", type=float, default=300, help="of everything; draft arms share what is left")
    p.add_argument("--answer_seconds", type=float, default=40, help="of these for the model's own replies")
    p.add_argument("--temperatures", default="0,0.8,0.8,1", help="of those replies, one round over all prompts each")
    p.add_argument("--answer_batch", type=int, default=256)
    p.add_argument("--replies", type=Path, help="--out of an earlier run: its replies are learnt, none are made")
    p.add_argument("--most_rows", type=int, default=8192, help="packed rows of own replies at most")
    p.add_argument("--tokens", type=int, default=384, help="a packed row")
    p.add_argument("--rows", type=int, default=32, help="a step of draft arms")
    p.add_argument("--dispatch", type=int, default=20, help="steps of one program")
    p.add_argument("--max_new_tokens", type=int, default=128)
    p.add_argument("--methods", default="jacobi:small13,tr-jacobi:small13")
    p.add_argument("--marked_methods", default="jacobi:draft13,tr-jacobi:draft13mix")
    p.add_argument("--draft_methods", default="jacobi:draft13,tr-jacobi:draft13mix")
    p.add_argument("--medusa_methods", default="medusa:medusa16")
    p.add_argument("--eagle_methods", default="eagle:eagle8,eagle:eagle16")
    p.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    p.add_argument("--activations", choices=("float32", "bfloat16"), help="of training; else each arm has its own")
    p.add_argument("--remat", default="none", choices=("full", "dots", "none"))
    p.add_argument("--float32_methods", default="", help="of draft arms, in float32 as well")
    p.add_argument("--figure_seconds", type=float, default=10, help="kept for the figures of draft arms")
    p.add_argument("--small", action="store_true", help="a random tiny model, to rehearse with")
    args = p.parse_args()
    begin, writing = time.perf_counter(), Lock()
    arms = [parse_arm(text, args.rows) for text in args.arms.split(",") if text]
    arms.sort(key=lambda arm: arm.steps is None)
    questions = spread(read_questions(args.questions), args.limit)
    lm = load(args.ckpt)
    lm = smaller(lm) if args.small else lm
    args.cfg, args.base = lm.cfg, args.base or args.ckpt
    args.trained_on = loaded_fingerprint(lm.params)
    fast = dataclasses.replace(lm, params=jax.tree.map(lambda x: x.astype(args.dtype), lm.params))
    frozen = stack_layers(fast.params)

    def keep(record: dict, text: str) -> None:
        with writing:
            keep_rows(args.out / "learn.jsonl", [record])
            print(f"{time.perf_counter() - begin:6.1f} s  {text}", flush=True)

    settings = {name: str(value) for name, value in vars(args).items() if name not in ("cfg", "trained_on")}
    start = f"loaded; {len(questions)} questions, {jax.devices()[0].device_kind}"
    keep(run_record() | {"jax": jax.__version__, "settings": settings}, start)

    # Compiling takes longest by far. It goes on in the background from the first second, each program once: those of
    # one shape wait for each other. Training waits for its own program alone.
    compiling, measuring, in_turn = ThreadPoolExecutor(16), ThreadPoolExecutor(16), defaultdict(Lock)

    def measured(model: LM, name: str, methods: str, **record) -> None:
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (model.params.embed, drafters(model)))
        with writing:
            turn = in_turn[str(shapes)]
        with turn:
            speed = measure(model, questions, methods, args.max_new_tokens)
        keep({"arm": name, "dtype": str(model.dtype)} | record | speed, f"{name} {model.dtype}: {shown(speed)}")

    waiting = [measuring.submit(measured, fast, "untouched", args.methods)]
    if args.adapter:
        given = load_adapter(args.adapter, lm.cfg)
        waiting.append(measuring.submit(measured, with_trained(lm, given, args.dtype), "adapter", args.draft_methods))
    shape_of = lambda arm: (arm.lora.draft_only and arm.lora.rank, arm.noise.mark, arm.noise.length, arm.heads)
    for arm in (arm for arm in {shape_of(arm): arm for arm in arms}.values() if arm.drafts or arm.noise.mark):
        new = init_trained(jax.random.key(0), lm.cfg, arm.lora, arm.noise, heads=arm.heads)
        for dtype, methods in plan(arm, args).items():
            model = with_trained(lm, new, dtype)
            waiting.append(measuring.submit(measured, model, f"new {arm.name}", methods))

    data, placed, programs = {}, {}, {}
    drafting = any(arm.drafts for arm in arms)

    def held_in_batches(held: dict, rows: int) -> dict:
        short = -len(held["tokens"]) % rows
        return {name: np.pad(x, ((0, short), (0, 0))).reshape(-1, rows, args.tokens) for name, x in held.items()}

    def own_rows() -> tuple[dict, dict, int]:
        """Rows of one shape whatever was answered, so that programs compile before: those past the count are empty."""
        whole, held = pack(data["own"], args.tokens), pack(data["held"], args.tokens)
        count = min(len(whole["tokens"]), args.most_rows)
        filled = lambda x, n: np.pad(x[:n], ((0, max(0, n - len(x))), (0, 0)))
        whole = {name: filled(x, args.most_rows) for name, x in whole.items()}
        return whole, {name: filled(x, args.answer_batch) for name, x in held.items()}, count

    def tuning_rows() -> tuple[dict, dict, int]:
        whole = pack(data["tuning"], args.tokens)
        most = min(96, len(whole["tokens"]) // 4)
        held, whole = ({name: x[part] for name, x in whole.items()} for part in (slice(most), slice(most, None)))
        return whole, held, len(whole["tokens"])

    def place(kind: str) -> None:
        """Put the rows on the device, for each number of rows a step."""
        whole, held, count = own_rows() if kind == "own" else tuning_rows()
        if not count or not held["tokens"].any():
            name = "prompts" if kind == "own" else "tuning"
            raise InputError(f"--{name}: too few rows to learn from and to hold out")
        whole = jax.device_put(whole)
        for arm in (arm for arm in arms if arm.drafts == (kind == "own")):
            if (kind, arm.rows) not in placed:
                placed[kind, arm.rows] = whole, jax.device_put(held_in_batches(held, arm.rows)), count
        keep({kind: len(data[kind])}, f"{kind}: {len(data[kind])} examples in {count} packed rows")

    def compile_arms(kind: str) -> None:
        for arm in (arm for arm in arms if arm.drafts == (kind == "own")):
            if arm.program not in programs:
                if kind == "own":
                    empty = pack([], args.tokens)
                    shaped = lambda x, *n: jax.ShapeDtypeStruct((*n, args.tokens), x.dtype)
                    batches = -(-args.answer_batch // arm.rows)
                    whole = {name: shaped(x, args.most_rows) for name, x in empty.items()}
                    held = {name: shaped(x, batches, arm.rows) for name, x in empty.items()}
                else:
                    whole, held, _ = placed[kind, arm.rows]
                programs[arm.program] = compiling.submit(Programs, arm, args, frozen, whole, held)

    def earlier_replies() -> None:
        for name in ("held", "own"):
            talks = [row["messages"] for row in read_rows(DataSource(path=str(args.replies / f"{name}.jsonl")))]
            data[name] = list(encoded(lm, talks, args.tokens))

    def new_replies() -> None:
        prompts = prompts_of(lm, conversations(args.prompts), args.tokens - args.max_new_tokens)
        config = DecodeConfig(method="ar", max_new_tokens=args.max_new_tokens, batch_size=args.answer_batch)
        heats = [float(t) for t in args.temperatures.split(",")]
        # Held-out prompts are answered once, greedily, and by none of the other rounds.
        split = args.answer_batch
        parts = ("held", prompts[:split], 1, [0.0]), ("own", prompts[split:], args.answer_seconds, heats)
        for name, asked, seconds, temperatures in parts:
            answered = list(own_examples(fast, asked, config, seconds, temperatures))
            data[name] = [example for _, example in answered]
            keep_rows(args.out / f"{name}.jsonl", [{"messages": talk} for talk, _ in answered])

    def answer() -> None:
        (earlier_replies if args.replies else new_replies)()
        place("own")

    if drafting:
        compile_arms("own")
    answering = measuring.submit(answer) if drafting else None
    if any(not arm.drafts for arm in arms):
        data["tuning"] = list(encoded(lm, conversations(args.tuning), args.tokens))
        place("tuning")
        compile_arms("tuning")

    def one_arm(trainer: Trainer, seed: int, seconds: float) -> None:
        arm, name = trainer.arm, f"{trainer.arm.name.replace('@', '-')}-seed{seed}"
        trained, figures = trainer.train(seed, seconds, args.out / name)
        if arm.drafts:  # as it is stored, too
            figures["held_out_unrounded"] = trainer.held_out(trained)
            trained = load_adapter(args.out / name, lm.cfg)
        figures["held_out"] = trainer.held_out(trained)
        record = {"arm": arm.name, "seed": seed, "noise": dataclasses.asdict(arm.noise)}
        text = f"{name}: {figures['steps']} steps of {figures['step_s']:.4f} s, held out {figures['held_out']}"
        keep(record | {"lora": dataclasses.asdict(arm.lora)} | figures, text)
        for dtype, methods in plan(arm, args).items():
            model = with_trained(lm, trained, dtype)
            waiting.append(measuring.submit(measured, model, arm.name, methods, seed=seed))

    failed, scored = [], False
    for number, arm in enumerate(arms):
        if arm.drafts:
            answering.result()
        rows = placed["own" if arm.drafts else "tuning", arm.rows]
        trainer = Trainer(arm, programs[arm.program].result(), *rows)
        if args.adapter and not scored and trainer.same_shape(given):
            found, scored = trainer.held_out(given), True
            keep({"arm": "adapter", "held_out": found}, f"adapter: {found}")
        for seed in map(int, args.seeds.split(",") if arm.steps else args.seeds.split(",")[:1]):
            left = begin + args.seconds - time.perf_counter()
            try:
                one_arm(trainer, seed, max((left - args.figure_seconds) / (len(arms) - number), 1))
            except jax.errors.JaxRuntimeError as e:  # too little memory, say: the other arms go on
                failed.append(f"{arm.name}, seed {seed}: {first_line(e)}")
    for future in waiting:
        try:
            future.result()
        except jax.errors.JaxRuntimeError as e:
            failed.append(f"a measurement: {first_line(e)}")
    keep({"failed": failed}, "done")
    if failed:
        raise InputError(f"{len(failed)} failed: {'; '.join(failed)}")


if __name__ == "__main__":
    run_command(main)
