"""Arms of `experiments.learn` by name, and training one in compiled dispatches of many steps."""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msn_jax import InputError, train_step
from msn_jax.adapters import init_trained
from msn_jax.config import (
    DataConfig,
    DataSource,
    HeadsConfig,
    LoraConfig,
    ModelStart,
    NoiseConfig,
    RunConfig,
    TrainConfig,
)
from msn_jax.eagle import with_vocabulary
from msn_jax.io.adapters import save_adapter
from msn_jax.objectives.scores import metrics_of

LAYOUTS = {
    "plain": NoiseConfig(kind="none", length=4),
    "inline": NoiseConfig(length=4, density=0.4),
    "beside": NoiseConfig(length=4, layout="beside", anchors=48),
}
SIZE = re.compile(r"([^@]+)(?:@([1-9]\d*)(?:x([1-9]\d*))?)?")
DRAFT = re.compile(r"draft-r(\d+)(-int8)?(-l1|-overlap)?(?:-n(\d))?")
LAYERS = re.compile(r"layers-(\d+)(?:-r(\d+))?(-int8)?(-l1|-overlap)?")
MEDUSA = re.compile(r"medusa-(\d+)")
EAGLE = re.compile(r"eagle(?:-(\d+))?")
TUNED = re.compile(
    r"(plain|inline|beside)(-marked)?(-model)?(-l1|-overlap)?(?:-w(\d+(?:\.\d+)?))?(?:-a(\d+))?(?:-n(\d+))?(?:-r(\d+))?"
    r"(-f16|-int8)?"
)
ACCEPTED = (
    "draft-rRANK[-int8][-l1|-overlap][-nLENGTH], layers-COUNT[-rRANK][-int8][-l1|-overlap], medusa-HEADS, "
    "eagle[-VOCABULARY], plain, inline[-marked] or beside[-marked][-model[-l1|-overlap]][-wWEIGHT][-aANCHORS] with "
    "[-nLENGTH][-rRANK][-f16|-int8], in this order, then [@STEPS[xROWS]]"
)
DECAY = float(np.exp(-1 / 4))  # of DSpark's loss by depth


@dataclasses.dataclass(frozen=True)
class Arm:
    name: str
    noise: NoiseConfig
    lora: LoraConfig
    learning_rate: float
    steps: int | None  # None: as many as there is time for
    rows: int
    heads: HeadsConfig = HeadsConfig()

    @property
    def drafts(self) -> bool:
        """Whether it learns to draft the replies of a model that stays: its own replies are learnt."""
        return self.lora.draft_only or self.lora.draft_layers > 0 or self.heads.kind is not None

    @property
    def program(self) -> str:
        """Arms with the same one share their compiled programs."""
        lora = dataclasses.replace(self.lora, store=None)
        return repr((self.noise, lora, self.heads, self.learning_rate, self.rows))

    def run(self, args: argparse.Namespace) -> RunConfig:
        """Its settings; the steps are given while it runs."""
        train = TrainConfig(
            out="unused",
            steps=10**6,
            batch_size=self.rows,
            learning_rate=self.learning_rate,
            warmup_steps=10,
            dtype=args.dtype,
            # As the arms of evidence.yaml, and as what a draft-only adapter meets on an accelerator.
            activation_dtype=args.activations or (None if self.drafts else "float32"),
            remat=args.remat,
            head_chunk=192,
        )
        source = DataConfig(sources=[DataSource(path="packed")], max_tokens=args.tokens)
        parts = {"noise": self.noise, "train": train, "lora": self.lora, "heads": self.heads}
        return RunConfig(model=ModelStart(ckpt=args.ckpt), data=source, **parts)


def parse_arm(text: str, rows: int) -> Arm:
    """An arm by its name, see learn.py. Raises InputError, one line, for a name that is none."""
    found = SIZE.fullmatch(text)
    name, steps, wide = found.groups() if found else ("", None, None)
    try:
        return _arm(text, name, int(steps) if steps else None, int(wide) if wide else None, rows)
    except InputError as e:
        raise InputError(f"--arms {text}: {e}") from None


def _arm(text: str, name: str, steps: int | None, wide: int | None, rows: int) -> Arm:
    drafts = partial(Arm, text, steps=steps, rows=wide or rows)
    clean = NoiseConfig(kind="none", decay=0.8)
    if found := DRAFT.fullmatch(name):
        rank, int8, loss, length = found.groups()
        noise = NoiseConfig(length=int(length or 3), anchors=128)
        if loss:
            noise = dataclasses.replace(noise, loss=loss[1:], decay=DECAY)
        lora = LoraConfig(rank=int(rank), alpha=float(rank), draft_only=True, store="int8" if int8 else "float16")
        return drafts(noise, lora, 1e-3)
    if found := LAYERS.fullmatch(name):
        count, rank, int8, loss = found.groups()
        rank = int(rank or 128)
        lora = LoraConfig(rank=rank, alpha=float(rank), draft_layers=int(count), store="int8" if int8 else "float16")
        if not lora.draft_layers:
            raise InputError("accepted: layers-1 or more")
        return drafts(NoiseConfig(kind="none", loss=loss[1:] if loss else "kl"), lora, 1e-3)
    if found := MEDUSA.fullmatch(name):
        return drafts(clean, LoraConfig(), 2e-3, heads=HeadsConfig(kind="medusa", count=int(found[1])))
    if found := EAGLE.fullmatch(name):
        heads = HeadsConfig(kind="eagle", count=5, vocabulary=int(found[1] or 8192))
        return drafts(clean, LoraConfig(), 1e-3, heads=heads)
    found = TUNED.fullmatch(name)
    layout, marked, model, loss, weight, anchors, length, rank, store = found.groups() if found else (None,) * 9
    beside_alone = layout != "beside" and (model or weight or anchors)
    if layout is None or beside_alone or (loss and not model) or (marked and layout == "plain"):
        raise InputError(f"accepted: {ACCEPTED}")
    given = {"weight": weight and float(weight), "anchors": anchors and int(anchors), "length": length and int(length)}
    given |= {"mark": bool(marked), "target": model and "model", "loss": loss and loss[1:]}
    noise = dataclasses.replace(LAYOUTS[layout], **{name: value for name, value in given.items() if value is not None})
    stored = {None: None, "-f16": "float16", "-int8": "int8"}[store]
    lora = LoraConfig(rank=int(rank or 16), alpha=float(rank or 16), store=stored)
    return Arm(text, noise, lora, 5e-4, steps or 120, wide or 8)


def cosine(step, train: TrainConfig, total):
    """train.learning_rate after a warm-up, and down to a tenth at `total` steps, which may be traced."""
    done = (step + 1).astype(jnp.float32)
    part = jnp.clip((done - train.warmup_steps) / jnp.maximum(total - train.warmup_steps, 1), 0, 1)
    share = jnp.where(done < train.warmup_steps, done / train.warmup_steps, 0.55 + 0.45 * jnp.cos(jnp.pi * part))
    return train.learning_rate * share


class Programs:
    """The compiled programs of arms that differ in steps and seed alone."""

    def __init__(self, arm: Arm, args: argparse.Namespace, frozen, rows: dict, held: dict):
        """rows and held: arrays, or their shapes alone."""
        self.args, self.frozen, self.run = args, frozen, arm.run(args)
        cfg = args.cfg

        def many(state, frozen, rows, index, key, total):
            schedule = partial(cosine, train=self.run.train, total=total)
            step = train_step.make_train_step(cfg, self.run, key=key, schedule=schedule)

            def one(state, picked):
                state, report = step(state, frozen, jax.tree.map(lambda x: x[picked], rows))
                return state, (report["by_depth"], report["grad_norm"])

            return jax.lax.scan(one, state, index)

        def score(params, frozen, held):
            evaluate = train_step.make_eval_step(cfg, self.run)
            count = len(held["tokens"])
            return jax.lax.map(lambda part: evaluate(params, frozen, *part), (held, jnp.arange(count)))

        def fresh(key):
            params = init_trained(key, cfg, arm.lora, arm.noise, heads=arm.heads)
            opt_state = train_step.make_optimizer(self.run.train).init(params)
            return train_step.TrainState(step=jnp.int32(0), params=params, opt_state=opt_state)

        key, index = jax.random.key(0), jnp.zeros((args.dispatch, arm.rows), jnp.int32)
        self.state = jax.eval_shape(fresh, key)
        programs = (
            jax.jit(many, donate_argnums=0).lower(self.state, frozen, rows, index, key, 1.0),
            jax.jit(score).lower(self.state.params, frozen, held),
            jax.jit(fresh).lower(key),
        )
        with ThreadPoolExecutor(len(programs)) as pool:
            self.many, self.score, self.fresh = pool.map(lambda program: program.compile(), programs)


class Trainer:
    """Training and scoring an arm on rows that are on the device, of which the first `count` hold something."""

    def __init__(self, arm: Arm, programs: Programs, rows: dict, held: dict, count: int):
        self.arm, self.programs, self.rows, self.held, self.count = arm, programs, rows, held, count
        self.args, self.frozen, self.state = programs.args, programs.frozen, programs.state

    def same_shape(self, trained: Any) -> bool:
        """Whether something that was trained elsewhere can be scored here."""
        shapes = lambda tree: (jax.tree.structure(tree), [x.shape for x in jax.tree.leaves(tree)])
        return shapes(trained) == shapes(self.state.params)

    def held_out(self, params) -> dict[str, float]:
        """Clean loss (of draft-only arms the divergence), and accuracy by depth."""
        clean, noisy = (
            metrics_of(np.asarray(sums).sum(axis=0)) for sums in self.programs.score(params, self.frozen, self.held)
        )
        return {"loss": clean["loss"]} | {name: value for name, value in noisy.items() if "depth" in name}

    def train(self, seed: int, seconds: float, out: Path) -> tuple[Any, dict] | None:
        """Train from the start of a seed, for the arm's steps or the time. Returns (what was trained, figures), or None
        where two dispatches show that the arm's steps would take longer."""
        key, total = jax.random.key(seed), self.arm.steps
        state = self.programs.fresh(key)
        if self.arm.heads.kind == "eagle":
            seen = {name: np.asarray(self.rows[name][: self.count]) for name in ("tokens", "response")}
            replies = [seen["tokens"][seen["response"]]]
            state = state.replace(params=with_vocabulary(state.params, replies, self.args.cfg.vocab_size))
        rng, count, dispatch = np.random.default_rng(seed), self.count, self.args.dispatch
        order, losses = np.zeros(0, np.int64), []
        begin = saved = time.perf_counter()
        while total is None or dispatch * len(losses) < total:
            while len(order) < dispatch * self.arm.rows:
                order = np.concatenate([order, rng.permutation(count)])
            index, order = np.split(order, [dispatch * self.arm.rows])
            index = jnp.asarray(index.reshape(dispatch, -1), jnp.int32)
            # The first two dispatches tell what a step takes; until then the schedule goes by a guess.
            state, (sums, _) = self.programs.many(state, self.frozen, self.rows, index, key, float(total or 1000))
            jax.block_until_ready(losses[-1:])  # one dispatch ahead of the device
            losses.append(sums)
            if len(losses) == 2:
                jax.block_until_ready(sums)
                fitting = dispatch * max(2, int(2 * seconds / (time.perf_counter() - begin)))
                total = total or fitting
                if total > fitting:
                    return None
            if self.arm.steps is None and time.perf_counter() - begin > 1.1 * seconds:
                break
            if time.perf_counter() - saved > 60:  # a run that is cut off leaves this much
                save_adapter(out, state.params, self.arm.lora, self.args.base, self.args.trained_on)
                saved = time.perf_counter()
        jax.block_until_ready(state)
        used, done = time.perf_counter() - begin, dispatch * len(losses)
        save_adapter(out, state.params, self.arm.lora, self.args.base, self.args.trained_on)
        curve = np.concatenate([np.asarray(sums) for sums in losses])
        curve = [metrics_of(part.sum(axis=0))["loss"] for part in np.array_split(curve, min(40, len(curve)))]
        tokens = done * self.arm.rows * self.args.tokens
        return state.params, {"steps": done, "step_s": used / done, "tokens_per_s": tokens / used, "losses": curve}
