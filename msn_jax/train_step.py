"""One step of noisy fine-tuning: the loss, the optimiser, and the compiled step with its state donated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh

from msn_jax.adapters import declare_trained, init_trained, parts_of
from msn_jax.config import LINEAR_MAPS, NoiseConfig, RunConfig, TrainConfig
from msn_jax.errors import InputError
from msn_jax.model_config import ModelConfig
from msn_jax.objectives import objective_of
from msn_jax.params import ArraySpec, Params, shaped
from msn_jax.shape_checks import check_shapes
from msn_jax.sharding import constrain

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
    params: Any  # float32: stacked Params, or what is trained beside them
    opt_state: optax.OptState


def learning_rate(train: TrainConfig) -> optax.Schedule:
    """A linear warm-up that starts above 0, then a cosine down to the final share; by the steps taken before."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if train.warmup_steps else train.learning_rate,
        train.learning_rate,
        train.warmup_steps,
        train.steps,
        train.learning_rate * train.final_learning_rate,
    )
    return lambda step: schedule(step + 1)


def make_optimizer(train: TrainConfig, schedule: optax.Schedule | None = None) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm; weight decay for the linear maps alone.

    schedule: of the learning rate, in place of the one of `train`.
    """
    schedule = schedule or learning_rate(train)
    # By name: stacked, a bias can have as many axes as a matrix. The name of an adapted map leads to its two factors.
    named = lambda path: any(getattr(key, "name", None) in LINEAR_MAPS for key in path)
    is_linear = partial(jax.tree_util.tree_map_with_path, lambda path, _: named(path))
    decay = partial(optax.adamw, weight_decay=train.weight_decay, mask=is_linear)
    return optax.chain(optax.clip_by_global_norm(train.clip_norm), decay(schedule, b1=0.9, b2=train.beta2))


def state_shapes(cfg: ModelConfig, run: RunConfig, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs placed on the mesh: each optimiser array lies like the weight it belongs to."""
    params = shaped(declare_trained(cfg, run.lora, run.noise, run.heads), mesh, jnp.float32)
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


def check_batch_arrays(batch: dict[str, Array]) -> None:
    """Raise InputError for an array of data.py's batches that is missing or of another shape."""
    kinds = {"tokens": "int", "segment_ids": "int", "positions": "int", "response": "bool"}
    if missing := kinds.keys() - batch.keys():
        raise InputError(f"batch: {', '.join(sorted(missing))} missing; accepted: {', '.join(kinds)}, each [B, T]")
    check_shapes(**{f"batch {name}": (batch[name], f"{kind}[B, T]") for name, kind in kinds.items()})


def init_state(cfg: ModelConfig, run: RunConfig, mesh: Mesh, params: Params | None = None) -> TrainState:
    """The state before the first step, made in place on the mesh.

    params: stacked float32 weights to start from (they become part of the state); None: random ones, or where the
    model is frozen what is new beside it. Randomness is that of run.train.seed.
    """
    shapes = state_shapes(cfg, run, mesh)
    places = jax.tree.map(lambda s: s.sharding, shapes)
    key = jax.random.key(run.train.seed)
    if params is None or run.noise.mark:
        new = partial(init_trained, cfg=cfg, lora=run.lora, noise=run.noise, heads=run.heads)
        params = jax.jit(new, out_shardings=places.params)(key, params=params)
    params = jax.device_put(params, places.params)
    opt_state = jax.jit(make_optimizer(run.train).init, out_shardings=places.opt_state)(params)
    return TrainState(step=jax.device_put(np.int32(0), places.step), params=params, opt_state=opt_state)


def make_train_step(
    cfg: ModelConfig, run: RunConfig, *, key: Array | None = None, schedule: optax.Schedule | None = None
) -> Callable[[TrainState, Params | None, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """step(state, frozen, batch) -> (state, report): one optimiser step, a pure function to be jitted by the caller.

    key, schedule: of the noise and of the learning rate, in place of those of run.train; both may be traced.
    frozen: the stacked weights that stay (run.frozen), else None. batch: arrays [B, T] of data.py.
    Noise is drawn from fold_in(seed, step), so a resumed run sees the same. report: {"by_depth": sums of scores.py,
    "grad_norm": float32[], "learning_rate": float32[]}.
    """
    train, objective = run.train, objective_of(run)
    key = jax.random.key(train.seed) if key is None else key
    schedule = schedule or learning_rate(train)
    optimizer = make_optimizer(train, schedule)
    noise, dtype, settings = loss_settings(cfg, run)

    def loss(trained, frozen, batch, drawn):
        parts = parts_of(trained, frozen)
        parts = parts._replace(weights=cast(parts.weights, dtype))
        return objective.loss_sums(parts, cfg, batch, *drawn, noise=noise, remat=train.remat, **settings)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(state: TrainState, frozen: Params | None, batch: dict[str, Array]) -> tuple[TrainState, dict]:
        check_batch_arrays(batch)
        whole = batch, objective.draw(jax.random.fold_in(key, state.step), batch, noise, state.step)

        def one_part(carry, part):
            (_, counted), grads = gradient(state.params, frozen, *part)
            return jax.tree.map(jnp.add, carry, (grads, counted)), None

        if train.accumulate == 1:
            (_, (divisor, sums)), grads = gradient(state.params, frozen, *whole)
        else:
            rows = train.batch_size // train.accumulate
            split = lambda x: constrain(x.reshape(-1, rows, *x.shape[1:]), None, "batch", *(None,) * (x.ndim - 1))
            zeros = jax.tree.map(jnp.zeros_like, (state.params, (jnp.zeros(()), jnp.zeros((run.depths + 1, 4)))))
            (grads, (divisor, sums)), _ = jax.lax.scan(one_part, zeros, jax.tree.map(split, whole))
        grads = jax.tree.map(lambda g: g / jnp.maximum(divisor, 1.0), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            rate = schedule(state.step)
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


def make_eval_step(cfg: ModelConfig, run: RunConfig):
    """evaluate(params, frozen, batch, index) -> (sums of clean text, sums of noise), see scores.py.

    Noise lies as the run's objective lays it, and is drawn from the batch's index alone.
    """
    objective = objective_of(run)
    noise, dtype, settings = loss_settings(cfg, run)

    def evaluate(params, frozen, batch, index):
        parts = parts_of(params, frozen)
        parts = parts._replace(weights=cast(parts.weights, dtype))
        key = jax.random.fold_in(jax.random.key(0), index)
        return objective.held_out(parts, cfg, batch, key, noise=noise, **settings)

    return evaluate


def loss_settings(cfg: ModelConfig, run: RunConfig) -> tuple[NoiseConfig, jnp.dtype, dict]:
    """(noise with the model's vocabulary, dtype of products, other settings of a loss) of a run."""
    noise = dataclasses.replace(run.noise, vocab_size=cfg.vocab_size)
    settings = {"head_chunk": run.train.head_chunk, "dtype": run.train.activation_dtype}
    if run.heads.kind == "eagle":
        settings["steps"] = run.heads.count
    return noise, jnp.dtype(run.train.dtype), settings


def cast(params: Params, dtype) -> Params:
    """Weights in the dtype of computation: one copy, so that they travel between devices in that dtype."""
    return jax.tree.map(lambda w: w.astype(dtype), params)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of one device in its matrix units, None where it is not known for this dtype."""
    kind = device_kind.replace("-", " ") + " "
    names = [name for name in PEAK_FLOPS if kind.startswith(f"{name} ")]
    return PEAK_FLOPS[max(names, key=len)] if names and dtype == "bfloat16" else None
