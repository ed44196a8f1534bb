"""One step of noisy fine-tuning: the loss, the optimiser, and the compiled step with its state donated."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh

from msn_jax.config import LINEAR_MAPS, NoiseConfig, RunConfig, TrainConfig
from msn_jax.draft_loss import draft_loss_sums, draw_anchors
from msn_jax.lora import declare_adapter, init_adapter
from msn_jax.model import forward, unembed
from msn_jax.model_config import ModelConfig
from msn_jax.noise import fill_noise, noise_depth, segment_length
from msn_jax.params import ArraySpec, DraftAdapter, Layer, Params, declare, init, shaped, stack_layers
from msn_jax.sharding import constrain

# Columns of the sums that a step returns, by depth (row 0: clean positions, row j: noise of depth j).
COUNT, LOSS, TOP1, TOP10 = range(4)


# Peak of matrix products in bfloat16, FLOP/s a device (data sheets; H100 and A100 without sparsity).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}


@struct.dataclass
class TrainState:
    """All that a step changes."""

    step: Array  # int32[]: steps taken
    params: Any  # float32: stacked Params, or with LoRA the adapter
    opt_state: optax.OptState


def learning_rate(train: TrainConfig) -> optax.Schedule:
    """By steps taken before: a linear warm-up that starts above 0, then a cosine down to the final share."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if train.warmup_steps else train.learning_rate,
        train.learning_rate,
        train.warmup_steps,
        train.steps,
        train.learning_rate * train.final_learning_rate,
    )
    return lambda step: schedule(step + 1)


def make_optimizer(train: TrainConfig) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm; weight decay for the linear maps alone."""
    # By name: stacked, a bias can have as many axes as a matrix. Of an adapter the name leads to its two factors.
    named = lambda path: any(getattr(key, "name", None) in LINEAR_MAPS for key in path)
    is_linear = partial(jax.tree_util.tree_map_with_path, lambda path, _: named(path))
    decay = partial(optax.adamw, weight_decay=train.weight_decay, mask=is_linear)
    return optax.chain(optax.clip_by_global_norm(train.clip_norm), decay(learning_rate(train), b1=0.9, b2=train.beta2))


def declare_trainable(cfg: ModelConfig, run: RunConfig) -> Params | Layer | DraftAdapter:
    """What is trained, with an ArraySpec for every tensor."""
    return declare_adapter(cfg, run.lora, run.noise.length) if run.lora.rank else declare(cfg, stacked=True)


def state_shapes(cfg: ModelConfig, run: RunConfig, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs placed on the mesh: each optimiser array lies like the weight it belongs to."""
    params = shaped(declare_trainable(cfg, run), mesh, jnp.float32)
    everywhere = lambda a: shaped(ArraySpec(a.shape, (None,) * a.ndim), mesh, a.dtype)
    optimizer = make_optimizer(run.train)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, param: param,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=everywhere,
    )
    return TrainState(step=shaped(ArraySpec((), ()), mesh, jnp.int32), params=params, opt_state=opt_state)


def batch_shapes(rows: int, tokens: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of data.py as ShapeDtypeStructs placed on the mesh."""
    spec = ArraySpec((rows, tokens), ("batch", None))
    kinds = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32, "response": bool}
    return {name: shaped(spec, mesh, dtype) for name, dtype in kinds.items()}


def init_state(cfg: ModelConfig, run: RunConfig, mesh: Mesh, params: Params | None = None) -> TrainState:
    """The state before the first step, made in place on the mesh.

    params: stacked float32 weights to start from (they become part of the state); None: random ones, or with LoRA
    a new adapter. Randomness is that of run.train.seed.
    """
    shapes = state_shapes(cfg, run, mesh)
    places = jax.tree.map(lambda s: s.sharding, shapes)
    key = jax.random.key(run.train.seed)
    if params is None:
        new = lambda: (
            init_adapter(key, cfg, run.lora, run.noise.length) if run.lora.rank else stack_layers(init(key, cfg))
        )
        params = jax.jit(new, out_shardings=places.params)()
    params = jax.device_put(params, places.params)
    opt_state = jax.jit(make_optimizer(run.train).init, out_shardings=places.opt_state)(params)
    return TrainState(step=jax.device_put(np.int32(0), places.step), params=params, opt_state=opt_state)


def token_scores(
    params: Params, cfg: ModelConfig, hidden: Array, labels: Array, counts: Array, chunk: int
) -> tuple[Array, Array]:
    """How well hidden rows [B, T, D] predict labels int32[B, T] where counts bool[B, T], without all logits at once.

    Returns (negative log likelihood float32[B, T], rank int32[B, T]: how many tokens score above the label), both 0
    where it does not count. Logits of `chunk` tokens a row exist at a time, in the backward pass too, which computes
    them again. The positions that count come first, so that chunks without any cost nothing: most of a batch is
    prompts.
    """
    B, T = labels.shape
    chunk = min(chunk, T)
    parts = -(-T // chunk)
    order = jnp.argsort(~counts, axis=1, stable=True)

    def split(x: Array) -> Array:
        x = jnp.take_along_axis(x, order if x.ndim == 2 else order[..., None], axis=1)
        x = jnp.pad(x, ((0, 0), (0, parts * chunk - T)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, parts, chunk, *x.shape[2:]), 1, 0)

    def score(hidden, labels, counts):
        logits = constrain(unembed(params, cfg, hidden), "batch", None, "vocab")
        label = jnp.take_along_axis(logits, labels[..., None], axis=-1)
        nll = jax.nn.logsumexp(logits, axis=-1) - label[..., 0]
        rank = jax.lax.stop_gradient((logits > label).sum(axis=-1, dtype=jnp.int32))
        return jnp.where(counts, nll, 0), jnp.where(counts, rank, 0)

    def nothing(hidden, labels, counts):
        return jnp.zeros(labels.shape), jnp.zeros_like(labels)

    # Computed again as a whole: with the condition outside, each chunk would keep a copy of the table for its branch.
    one = jax.checkpoint(lambda part: jax.lax.cond(part[2].any(), score, nothing, *part))
    scores = jax.lax.map(one, (split(hidden), split(labels), split(counts)))
    places = jnp.argsort(order, axis=1)
    return jax.tree.map(
        lambda x: jnp.take_along_axis(jnp.moveaxis(x, 0, 1).reshape(B, parts * chunk), places, axis=1), scores
    )


def next_labels(batch: dict[str, Array]) -> tuple[Array, Array]:
    """(label of each position int32[B, T], whether it counts bool[B, T]): the next token, where it is a reply's."""
    ahead = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
    counts = ahead(batch["response"]) & (ahead(batch["segment_ids"]) == batch["segment_ids"])
    return ahead(batch["tokens"]), counts & (batch["segment_ids"] > 0)


def loss_sums(
    params: Params,
    cfg: ModelConfig,
    batch: dict[str, Array],
    inputs: Array,
    depth: Array,
    *,
    noise_length: int,
    adapter: Layer | None = None,
    remat: str = "none",
    head_chunk: int = 512,
    dtype=None,
) -> tuple[Array, Array]:
    """Loss summed over the reply tokens of a batch that is fed as `inputs`, and what it is made of.

    batch: arrays [B, T] of data.py, whose tokens give the labels; inputs int32[B, T], with noise where depth
    int32[B, T] is above 0; dtype: see `forward`. Returns (float32[], float32[1 + noise_length, 4]: COUNT, LOSS, TOP1,
    TOP10 by depth).
    """
    hidden, _ = forward(
        params,
        cfg,
        inputs,
        batch["positions"],
        segments=batch["segment_ids"],
        adapter=adapter,
        remat=remat,
        dtype=dtype,
    )
    labels, counts = next_labels(batch)
    nll, rank = token_scores(params, cfg, hidden, labels, counts, head_chunk)
    columns = jnp.stack([jnp.ones_like(nll), nll, (rank < 1).astype(nll.dtype), (rank < 10).astype(nll.dtype)], axis=-1)
    by_depth = jax.nn.one_hot(depth, noise_length + 1, dtype=nll.dtype) * counts[..., None].astype(nll.dtype)
    sums = jnp.einsum("btd,btc->dc", by_depth, columns, precision=jax.lax.Precision.HIGHEST)
    return sums[:, LOSS].sum(), sums


def make_train_step(cfg: ModelConfig, run: RunConfig):
    """step(state, frozen, batch) -> (state, sums): one optimiser step, a pure function to be jitted by the caller.

    frozen: with LoRA the stacked weights that the adapter works on, else None. batch: arrays [B, T] of data.py.
    Noise is drawn from fold_in(seed, step), so a resumed run sees the same. sums: {"by_depth": see loss_sums,
    "grad_norm": float32[], "learning_rate": float32[]}.
    """
    train, optimizer = run.train, make_optimizer(run.train)
    noise = dataclasses.replace(run.noise, vocab_size=cfg.vocab_size)
    dtype = jnp.dtype(train.dtype)

    settings = {"remat": train.remat, "head_chunk": train.head_chunk, "dtype": train.activation_dtype}

    def loss(trained, frozen, batch, inputs, depth):
        weights = cast(frozen if run.lora.rank else trained, dtype)
        adapter = trained if run.lora.rank else None
        return loss_sums(weights, cfg, batch, inputs, depth, noise_length=noise.length, adapter=adapter, **settings)

    def draft_loss(trained, frozen, batch, counts, anchors):
        return draft_loss_sums(cast(frozen, dtype), cfg, batch, counts, anchors, trained, **settings)

    def step(state: TrainState, frozen: Params | None, batch: dict[str, Array]) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(train.seed), state.step)
        if run.lora.draft_only:
            _, counts = next_labels(batch)
            whole = (batch, counts, draw_anchors(key, counts, noise.anchors))
        else:
            whole = (batch, *noisy_inputs(key, batch, noise, state.step))
        gradient = jax.value_and_grad(draft_loss if run.lora.draft_only else loss, has_aux=True)

        def one_part(carry, part):
            (_, sums), grads = gradient(state.params, frozen, *part)
            return jax.tree.map(jnp.add, carry, (grads, sums)), None

        if train.accumulate == 1:
            (_, sums), grads = gradient(state.params, frozen, *whole)
        else:
            rows = train.batch_size // train.accumulate
            parts = jax.tree.map(lambda x: constrain(x.reshape(-1, rows, x.shape[1]), None, "batch", None), whole)
            zeros = jax.tree.map(jnp.zeros_like, (state.params, jnp.zeros((noise.length + 1, 4))))
            (grads, sums), _ = jax.lax.scan(one_part, zeros, parts)
        total = jnp.maximum(sums[:, COUNT].sum(), 1.0)
        grads = jax.tree.map(lambda g: g / total, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            rate = learning_rate(train)(state.step)
        report = {
            "by_depth": sums,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(rate, jnp.float32),
        }
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), report

    return step


def jit_train_step(cfg: ModelConfig, run: RunConfig, mesh: Mesh):
    """`make_train_step` compiled on first use, its state donated and kept where `state_shapes` puts it."""
    places = jax.tree.map(lambda s: s.sharding, state_shapes(cfg, run, mesh))
    return jax.jit(make_train_step(cfg, run), donate_argnums=0, out_shardings=(places, None))


def noisy_inputs(key: Array, batch: dict[str, Array], noise: NoiseConfig, step: Array | int) -> tuple[Array, Array]:
    """(inputs int32[B, T], depth int32[B, T]) of a batch at a step."""
    where, what = jax.random.split(key)
    length = segment_length(jnp.asarray(step), noise)
    depth = noise_depth(where, batch["response"], batch["segment_ids"], noise, length)
    return fill_noise(what, batch["tokens"], depth, batch["segment_ids"], noise), depth


def make_eval_step(cfg: ModelConfig, run: RunConfig):
    """evaluate(params, frozen, batch, index) -> (clean sums, noisy sums), see loss_sums.

    The same for runs of every noise kind: once with clean inputs, once with one `ahead` segment of noise.length an
    example, drawn from the batch's index alone. Of a draft-only adapter both are the sums of draft_loss_sums.
    """
    noise = NoiseConfig(kind="ahead", length=run.noise.length)
    dtype = jnp.dtype(run.train.dtype)
    settings = {"head_chunk": run.train.head_chunk, "dtype": run.train.activation_dtype}

    def evaluate_draft(params, frozen, batch, index):
        _, counts = next_labels(batch)
        anchors = draw_anchors(jax.random.fold_in(jax.random.key(0), index), counts, run.noise.anchors)
        score = partial(draft_loss_sums, cast(frozen, dtype), cfg, batch, counts, anchors)
        return (score(params, **settings)[1],) * 2

    def evaluate(params, frozen, batch, index):
        weights, adapter = (frozen, params) if run.lora.rank else (params, None)
        inputs, depth = noisy_inputs(jax.random.fold_in(jax.random.key(0), index), batch, noise, 0)
        score = partial(
            loss_sums,
            cast(weights, dtype),
            cfg,
            batch,
            noise_length=noise.length,
            adapter=adapter,
            **settings,
        )
        return score(batch["tokens"], jnp.zeros_like(depth))[1], score(inputs, depth)[1]

    return evaluate_draft if run.lora.draft_only else evaluate


def cast(params: Params, dtype) -> Params:
    """Weights in the dtype of computation: one copy, so that they travel between devices in that dtype."""
    return jax.tree.map(lambda w: w.astype(dtype), params)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of one device in its matrix units, None where it is not known for this dtype."""
    kind = device_kind.replace("-", " ") + " "
    names = [name for name in PEAK_FLOPS if kind.startswith(f"{name} ")]
    return PEAK_FLOPS[max(names, key=len)] if names and dtype == "bfloat16" else None


def metrics_of(by_depth: np.ndarray) -> dict[str, float]:
    """Means from the sums of `loss_sums`; a depth that did not occur is left out."""
    clean, noisy = by_depth[0], by_depth[1:].sum(axis=0)
    out = {"loss": float(by_depth[:, LOSS].sum() / max(by_depth[:, COUNT].sum(), 1))}
    rows = {"clean": clean, "noisy": noisy} | {f"depth{j}": row for j, row in enumerate(by_depth) if j}
    for name, row in rows.items():
        if row[COUNT]:
            if name in ("clean", "noisy"):
                out[f"loss_{name}"] = float(row[LOSS] / row[COUNT])
            out[f"top1_{name}"] = float(row[TOP1] / row[COUNT])
            out[f"top10_{name}"] = float(row[TOP10] / row[COUNT])
    return out | {"response_tokens": int(by_depth[:, COUNT].sum())}
