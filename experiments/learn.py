"""Train many arms on one accelerator in minutes: own replies, rows that stay on the device, many steps a dispatch.

    python -m experiments.learn --ckpt CKPT --prompts A.jsonl --tuning B.jsonl --questions Q.jsonl --out OUT \
      --arms plain,inline,inline-marked,beside,beside-marked,draft-r28,draft-r48-int8 --seconds 300

These learn to draft the model's own replies to --prompts: draft-rRANK[-int8][-l1|-overlap][-nLENGTH] (draft-only
adapters), layers-COUNT[-rRANK][-int8][-l1|-overlap] (the first layers as a smaller model, LoRA of rank 128),
medusa-HEADS and eagle[-VOCABULARY].
These are LoRA runs of rank 16 on --tuning, as the arms of evidence.yaml: plain, inline[-marked] and
beside[-marked][-model[-l1|-overlap]][-wWEIGHT][-aANCHORS], each with [-nLENGTH][-rRANK][-f16|-int8] behind it (noise
tokens, rank, how the adapter is stored), in this order: beside-marked-model-w0.25-a96-n3-r8-f16.
ARM@STEPSxROWS trains that long; draft arms without it share what is left of --seconds. Arms with steps come first, the
first seed of all before the second of any. One that would outlast --seconds is left out.
Each arm's adapter and figures are in --out as soon as it is done: OUT/ARM-seedS/, OUT/learn.jsonl. The packed rows are
there too, OUT/rows-own.npz and OUT/rows-tuning.npz; --rows_only makes them alone. The same command again goes on with
the arms that are left, from the rows that are there.
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

from benchmarks.spec_bench import parse_method
from experiments.arm_training import Arm, Programs, Trainer, parse_arm
from experiments.one_batch import measure, shown, with_trained
from experiments.packed import conversations, encoded, own_examples, pack, prompts_of, read_packed, write_packed
from msn_jax import DecodeConfig, InputError, init, load
from msn_jax.adapters import declare_trained, init_trained
from msn_jax.config import DataSource
from msn_jax.decode.sources import drafters
from msn_jax.decode.tree import MEDUSA
from msn_jax.decode.tree_sets import tree_set
from msn_jax.errors import first_line
from msn_jax.io.adapters import load_adapter, loaded_fingerprint
from msn_jax.io.loading import LM
from msn_jax.params import stack_layers
from msn_jax.questions import read_questions, spread
from msn_jax.records import keep_rows, kept_rows, run_record
from msn_jax.rows import read_rows
from msn_jax.terminal import run_command

LEAST_S = 5  # two dispatches tell whether an arm fits; none is begun with less


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


def check_arm(arm: Arm, args: argparse.Namespace) -> None:
    """Raise InputError for an arm that does not fit the model, or whose trees ask for more than it learns."""
    try:
        declare_trained(args.cfg, arm.lora, arm.noise, arm.heads)
    except InputError as e:
        raise InputError(f"--arms {arm.name}: {e}") from None
    for method in (method for methods in plan(arm, args).values() for method in methods.split(",")):
        config = parse_method(method, DecodeConfig())
        trees = tree_set(config.method, config.tree)
        asked = max(int(tree.noise_depth.max()) for tree in trees.trees) if arm.noise.mark or arm.lora.draft_only else 0
        if asked > arm.noise.length:
            raise InputError(f"--arms {arm.name}: {method} has noise of depth {asked}; accepted: -n{asked} or more")
        if arm.heads.kind == "medusa" and (asked := trees.ask(MEDUSA)[0]) > arm.heads.count:
            raise InputError(f"--arms {arm.name}: {method} asks for {asked} heads; accepted: medusa-{asked} or more")


def smaller(lm: LM) -> LM:
    """A random model of the same vocabulary for rehearsals."""
    cfg = dataclasses.replace(lm.cfg, embed=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=64)
    return dataclasses.replace(lm, cfg=cfg, params=init(jax.random.key(0), cfg))


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
    p.add_argument("--seeds", default="0", help="arms that draft have the first alone")
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
    p.add_argument("--layers_methods", default="draft-model:model4,draft-model:model8")
    p.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    p.add_argument("--activations", choices=("float32", "bfloat16"), help="of training; else each arm has its own")
    p.add_argument("--remat", default="none", choices=("full", "dots", "none"))
    p.add_argument("--float32_methods", default="", help="of draft arms, in float32 as well")
    p.add_argument("--figure_seconds", type=float, default=10, help="kept for the figures of the last arms")
    p.add_argument("--rows_only", action="store_true", help="pack the rows, and end")
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
    for arm in arms:
        check_arm(arm, args)
    fast = dataclasses.replace(lm, params=jax.tree.map(lambda x: x.astype(args.dtype), lm.params))
    frozen = stack_layers(fast.params)

    earlier = kept_rows(args.out / "learn.jsonl")
    done = {(row["arm"], row["seed"]) for row in earlier if "steps" in row}
    speeds = {(row["arm"], row.get("seed"), row["dtype"]) for row in earlier if "answers" in row}
    seeds = [int(seed) for seed in args.seeds.split(",")]
    jobs = [(arm, seed) for seed in seeds for arm in arms if seed == seeds[0] or (arm.steps and not arm.drafts)]
    jobs.sort(key=lambda job: job[0].steps is None)
    over = [(arm, seed) for arm, seed in jobs if (arm.name, seed) in done]
    jobs = [] if args.rows_only else [(arm, seed) for arm, seed in jobs if (arm.name, seed) not in done]
    arms = list({arm.name: arm for arm, _ in jobs}.values())

    def keep(record: dict, text: str) -> None:
        with writing:
            keep_rows(args.out / "learn.jsonl", [record])
            print(f"{time.perf_counter() - begin:6.1f} s  {text}", flush=True)

    settings = {name: str(value) for name, value in vars(args).items() if name not in ("cfg", "trained_on")}
    start = f"loaded; {len(questions)} questions, {jax.devices()[0].device_kind}"
    keep(run_record() | {"jax": jax.__version__, "settings": settings}, start)

    # Compiling takes longest by far. It goes on in the background from the first second, each program once: those of
    # one shape wait for each other. Training waits for its own program alone, so few are compiled at a time, in order.
    compiling, measuring, reading = (ThreadPoolExecutor(count) for count in (4, 8, 2))
    in_turn = defaultdict(Lock)

    def measured(model: LM, name: str, methods: str, **record) -> None:
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (model.params.embed, drafters(model)))
        with writing:
            turn = in_turn[str(shapes)]
        with turn:
            speed = measure(model, questions, methods, args.max_new_tokens)
        keep({"arm": name, "dtype": str(model.dtype)} | record | speed, f"{name} {model.dtype}: {shown(speed)}")

    waiting = []

    def measure_soon(model: LM, name: str, methods: str, **record) -> None:
        if (name, record.get("seed"), str(model.dtype)) not in speeds:
            waiting.append(measuring.submit(measured, model, name, methods, **record))

    def measure_arm(arm: Arm, seed: int, trained) -> None:
        for dtype, methods in plan(arm, args).items():
            measure_soon(with_trained(lm, trained, dtype), arm.name, methods, seed=seed)

    given = load_adapter(args.adapter, lm.cfg) if args.adapter else None
    if not args.rows_only:
        measure_soon(fast, "untouched", args.methods)
        if given is not None:
            measure_soon(with_trained(lm, given, args.dtype), "adapter", args.draft_methods)
        shape_of = lambda arm: (arm.drafts and arm.lora.rank, arm.noise.mark, arm.noise.length, arm.heads)
        for arm in (arm for arm in {shape_of(arm): arm for arm in arms}.values() if arm.drafts or arm.noise.mark):
            new = init_trained(jax.random.key(0), lm.cfg, arm.lora, arm.noise, heads=arm.heads)
            for dtype, methods in plan(arm, args).items():
                measure_soon(with_trained(lm, new, dtype), f"new {arm.name}", methods)
        for arm, seed in over:  # by an earlier call, which may have ended before its measurement
            measure_arm(arm, seed, load_adapter(args.out / folder_of(arm, seed), lm.cfg))

    placed, programs = {}, {}

    def place(kind: str) -> None:
        """Put the rows on the device, for each number of rows a step."""
        file = args.out / f"rows-{kind}.npz"
        if file.exists():
            whole, held, examples = read_packed(file, args.tokens)
        else:
            whole, held, examples = made_rows(kind, args, lm, fast)
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
        keep({kind: examples}, f"{kind}: {examples} examples in {count} packed rows")
        if not args.rows_only:
            whole = jax.device_put(whole)
            for arm in (arm for arm in arms if arm.drafts == (kind == "own")):
                if (kind, arm.rows) not in placed:
                    placed[kind, arm.rows] = whole, jax.device_put(in_batches(held, arm.rows)), count

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

    def prepare(kind: str) -> None:
        if kind == "own" and not args.rows_only:
            compile_arms(kind)
        place(kind)
        if kind == "tuning" and not args.rows_only:
            compile_arms(kind)

    kinds = {"own" if arm.drafts else "tuning" for arm in arms}
    if args.rows_only:
        kinds = {kind for kind, files in (("own", args.prompts or args.replies), ("tuning", args.tuning)) if files}
    ready = {kind: reading.submit(prepare, kind) for kind in sorted(kinds)}

    def one_arm(trainer: Trainer, seed: int, seconds: float) -> bool:
        """Whether it was trained: there was time for it."""
        arm, name = trainer.arm, folder_of(trainer.arm, seed)
        if (found := trainer.train(seed, seconds, args.out / name)) is None:
            return False
        trained, figures = found
        if arm.drafts or arm.lora.store:  # as it is stored, too
            figures["held_out_unrounded"] = trainer.held_out(trained)
            trained = load_adapter(args.out / name, lm.cfg)
        figures["held_out"] = trainer.held_out(trained)
        parts = {part: dataclasses.asdict(getattr(arm, part)) for part in ("noise", "lora", "heads")}
        text = f"{name}: {figures['steps']} steps of {figures['step_s']:.4f} s, held out {figures['held_out']}"
        keep({"arm": arm.name, "seed": seed} | parts | figures, text)
        measure_arm(arm, seed, trained)
        return True

    failed, left_out, scored = [], [], False
    left = lambda: begin + args.seconds - args.figure_seconds - time.perf_counter()
    for number, (arm, seed) in enumerate(jobs):
        if arm.steps and left() < LEAST_S:
            left_out.append(f"{arm.name}, seed {seed}")
            continue
        kind = "own" if arm.drafts else "tuning"
        ready[kind].result()
        try:
            program = programs[arm.program].result(max(left(), 1) if arm.steps else None)
        except TimeoutError:  # it is still being compiled
            left_out.append(f"{arm.name}, seed {seed}")
            continue
        trainer = Trainer(arm, program, *placed[kind, arm.rows])
        if given is not None and not scored and trainer.same_shape(given):
            found, scored = trainer.held_out(given), True
            keep({"arm": "adapter", "held_out": found}, f"adapter: {found}")
        try:
            if not one_arm(trainer, seed, max(left() if arm.steps else left() / (len(jobs) - number), 1)):
                left_out.append(f"{arm.name}, seed {seed}")
        except jax.errors.JaxRuntimeError as e:  # too little memory, say: the other arms go on
            failed.append(f"{arm.name}, seed {seed}: {first_line(e)}")
    for future in ready.values():
        future.result()
    compiling.shutdown(wait=False, cancel_futures=True)  # of arms that are left out
    for future in waiting:
        try:
            future.result()
        except jax.errors.JaxRuntimeError as e:
            failed.append(f"a measurement: {first_line(e)}")
    keep({"failed": failed, "left_out": left_out}, f"done; no time for: {'; '.join(left_out) or 'nothing'}")
    if failed:
        raise InputError(f"{len(failed)} failed: {'; '.join(failed)}")


def folder_of(arm: Arm, seed: int) -> str:
    return f"{arm.name.replace('@', '-')}-seed{seed}"


def in_batches(held: dict, rows: int) -> dict:
    """Arrays [N, T] as [N / rows, rows, T], filled up with empty ones."""
    short = -len(held["tokens"]) % rows
    return {name: np.pad(x, ((0, short), (0, 0))).reshape(-1, rows, x.shape[1]) for name, x in held.items()}


if __name__ == "__main__":
    run_command(main)
