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
from pathlib import Path

import jax

from benchmarks.spec_bench import parse_method
from experiments.arm_training import Arm, Trainer, parse_arm
from experiments.measuring import Kept, Measuring, plan
from experiments.one_batch import with_trained
from experiments.prepared import Prepared
from msn_jax import DecodeConfig, InputError, init, load
from msn_jax.adapters import declare_trained
from msn_jax.decode.tree import MEDUSA
from msn_jax.decode.tree_sets import tree_set
from msn_jax.errors import first_line
from msn_jax.io.adapters import load_adapter, loaded_fingerprint
from msn_jax.io.loading import LM
from msn_jax.questions import read_questions, spread
from msn_jax.records import run_record
from msn_jax.terminal import run_command

LEAST_S = 5  # two dispatches tell whether an arm fits; none is begun with less


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


def train_arm(trainer: Trainer, seed: int, seconds: float, kept: Kept, measuring: Measuring) -> bool:
    """Train an arm, keep its figures, have it measured. False: there was no time for it."""
    arm, folder = trainer.arm, measuring.args.out / folder_of(trainer.arm, seed)
    if (found := trainer.train(seed, seconds, folder)) is None:
        return False
    trained, figures = found
    if arm.drafts or arm.lora.store:  # as it is stored, too
        figures["held_out_unrounded"] = trainer.held_out(trained)
        trained = load_adapter(folder, measuring.lm.cfg)
    figures["held_out"] = trainer.held_out(trained)
    parts = {part: dataclasses.asdict(getattr(arm, part)) for part in ("noise", "lora", "heads")}
    text = f"{folder.name}: {figures['steps']} steps of {figures['step_s']:.4f} s, held out {figures['held_out']}"
    kept.add({"arm": arm.name, "seed": seed} | parts | figures, text)
    measuring.arm(arm, seed, trained)
    return True


def options() -> argparse.ArgumentParser:
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
    return p


def main() -> None:
    args = options().parse_args()
    args.base = args.base or args.ckpt
    settings = {name: str(value) for name, value in vars(args).items()}
    kept = Kept(args.out)
    asked = [parse_arm(text, args.rows) for text in args.arms.split(",") if text]
    asked.sort(key=lambda arm: arm.steps is None)
    questions = spread(read_questions(args.questions), args.limit)
    lm = load(args.ckpt)
    lm = smaller(lm) if args.small else lm
    args.cfg, args.trained_on = lm.cfg, loaded_fingerprint(lm.params)
    for arm in asked:
        check_arm(arm, args)
    fast = dataclasses.replace(lm, params=jax.tree.map(lambda x: x.astype(args.dtype), lm.params))

    seeds = [int(seed) for seed in args.seeds.split(",")]
    jobs = [(arm, seed) for seed in seeds for arm in asked if seed == seeds[0] or (arm.steps and not arm.drafts)]
    jobs.sort(key=lambda job: job[0].steps is None)
    over = [(arm, seed) for arm, seed in jobs if (arm.name, seed) in kept.trained]
    jobs = [] if args.rows_only else [job for job in jobs if job not in over]
    arms = list({arm.name: arm for arm, _ in jobs}.values())
    start = f"loaded; {len(questions)} questions, {jax.devices()[0].device_kind}"
    kept.add(run_record() | {"jax": jax.__version__, "settings": settings}, start)

    measuring = Measuring(lm, questions, args, kept)
    given = load_adapter(args.adapter, lm.cfg) if args.adapter else None
    if not args.rows_only:
        measuring.soon(fast, "untouched", args.methods)
        if given is not None:
            measuring.soon(with_trained(lm, given, args.dtype), "adapter", args.draft_methods)
        measuring.compile(arms)
        for arm, seed in over:  # by an earlier call, which may have ended before its measurement
            measuring.arm(arm, seed, load_adapter(args.out / folder_of(arm, seed), lm.cfg))

    prepared = Prepared(lm, fast, arms, args, kept)
    failed, left_out, scored = [], [], False
    left = lambda: kept.begin + args.seconds - args.figure_seconds - time.perf_counter()
    for number, (arm, seed) in enumerate(jobs):
        late = arm.steps and left() < LEAST_S
        trainer = None if late else prepared.trainer(arm, max(left(), 1) if arm.steps else None)
        if trainer is None:
            left_out.append(f"{arm.name}, seed {seed}")
            continue
        if given is not None and not scored and trainer.same_shape(given):
            found, scored = trainer.held_out(given), True
            kept.add({"arm": "adapter", "held_out": found}, f"adapter: {found}")
        seconds = max(left() if arm.steps else left() / (len(jobs) - number), 1)
        try:
            if not train_arm(trainer, seed, seconds, kept, measuring):
                left_out.append(f"{arm.name}, seed {seed}")
        except jax.errors.JaxRuntimeError as e:  # too little memory, say: the other arms go on
            failed.append(f"{arm.name}, seed {seed}: {first_line(e)}")
    prepared.close()
    failed += measuring.failures()
    kept.add({"failed": failed, "left_out": left_out}, f"done; no time for: {'; '.join(left_out) or 'nothing'}")
    if failed:
        raise InputError(f"{len(failed)} failed: {'; '.join(failed)}")


def folder_of(arm: Arm, seed: int) -> str:
    return f"{arm.name.replace('@', '-')}-seed{seed}"


if __name__ == "__main__":
    run_command(main)
