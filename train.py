"""Fine-tune a LLaMA-family model with noise, so that decode.py takes several tokens of it a forward pass.

python train.py --config configs/tiny.yaml
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import shlex
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if "--plan" in sys.argv:
    # The TPU compiler needs no TPU, but must not look for one.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")

import jax
import jax.numpy as jnp
import jsonargparse
import numpy as np
import yaml
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from msn_jax import data, train_step
from msn_jax.adapters import Marked, merge
from msn_jax.commands import decode_command
from msn_jax.config import SECTIONS, LoraConfig, RunConfig
from msn_jax.eagle import with_vocabulary
from msn_jax.errors import InputError, named
from msn_jax.io import export, hf, run_dir
from msn_jax.io.adapters import save_adapter, stored_fingerprint
from msn_jax.io.checkpoints import Checkpoints, kept
from msn_jax.io.files import local_files
from msn_jax.io.loading import open_checkpoint
from msn_jax.io.metrics import read_metrics
from msn_jax.io.tokenizer import end_ids, from_folder
from msn_jax.model_config import ModelConfig
from msn_jax.objectives import objective_of
from msn_jax.objectives.scores import metrics_of
from msn_jax.params import DraftAdapter, declare
from msn_jax.plot import check_plot, plot_metrics
from msn_jax.rows import read_rows
from msn_jax.settings import describe
from msn_jax.shapes import SHAPES
from msn_jax.sharding import check_batch, make_mesh, mesh_sizes, start_processes
from msn_jax.terminal import CACHE_HELP, run_command
from msn_jax.train_log import NotFinite, Stop, TrainLog, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A run may be taken up again with other values of these; all others decide what it computes.
FREE_TO_CHANGE = {"train": {"out", "save_every", "keep", "eval_every", "eval_batches"}, "mesh": None, "lora": {"store"}}


def parse_args(argv: list[str] | None) -> tuple[RunConfig, jsonargparse.Namespace]:
    """(config, flags). Raises InputError for an unknown key, a wrong type, or a value that is not possible."""
    p = jsonargparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=CACHE_HELP, exit_on_error=False)
    p.add_argument("--config", action="config", help="YAML file, see configs/")
    p.add_argument("--plan", action="store_true", help="print devices, parameters, batch and memory; train nothing")
    p.add_argument("--topology", type=str | None, help="TPU slice for --plan, in place of mesh.topology")
    p.add_argument("--export", type=str | None, help="when trained, write a Hugging Face directory")
    p.add_argument("--plot", action="store_true", help="when trained, write plot.png beside metrics.jsonl")
    for name, kind in SECTIONS.items():
        p.add_class_arguments(kind, name)
        p.groups[name].title = name + ": " + kind.__doc__.splitlines()[0].rstrip(".")
    about = {f"{name}.{field.name}": describe(field) for name, kind in SECTIONS.items() for field in fields(kind)}
    for action in p._actions:  # jsonargparse reads docstrings alone
        action.help = about.get(action.dest, action.help)
    try:
        flags = p.parse_args(argv)
        made = p.instantiate(flags)
    except jsonargparse.ArgumentError as e:
        words = re.sub(r"a <class '(\w+)'>", r"\1", " ".join(str(e).split()))
        raise InputError(f"{words}; --help lists all settings, configs/ shows how a file states them") from None
    if flags.topology and not flags.plan:
        raise InputError("--topology does nothing without --plan")
    return RunConfig(**{name: made[name] for name in SECTIONS}).with_absolute_base(), flags


def start_model(run: RunConfig) -> tuple[ModelConfig, object, tuple[int, ...], object]:
    """(model config, tokenizer, stop ids, source of the weights or None for random ones)."""
    if run.model.ckpt is not None:
        if run_dir.is_run(run.model.ckpt):
            raise InputError(f"model.ckpt {run.model.ckpt} is a run directory; accepted: what its --export wrote")
        with named(ckpt="model.ckpt"):
            opened = open_checkpoint(run.model.ckpt)
        if run.model.shape and declare(SHAPES[run.model.shape]) != declare(opened.cfg):
            raise InputError(f"model.ckpt {run.model.ckpt} does not have the shape {run.model.shape} of model.shape")
        return opened.cfg, opened.tokenizer, opened.stop_ids, opened.source
    if run.frozen:
        setting = "heads.kind: heads" if run.heads.kind else "lora.rank: adapters"
        raise InputError(f"{setting} need weights to work on; accepted: model.ckpt in place of model.scratch")
    cfg = ModelConfig.from_fields("model.scratch", run.model.scratch)
    if run_dir.has_begun(run.train.out):
        tokenizer, _ = from_folder(local_files(run.train.out))
    else:
        rows = itertools.chain.from_iterable(map(read_rows, run.data.sources))
        tokenizer = data.train_tokenizer(rows, cfg.vocab_size)
    return cfg, tokenizer, tuple(sorted(end_ids(tokenizer))), None


def describe_corpus(corpus: data.Corpus) -> None:
    """What there is to train on, and which rows are not used and why."""
    for name, counts in corpus.counts.items():
        reasons = ", ".join(f"{why}: {count}" for why, count in corpus.skipped[name].items())
        skipped = f"; skipped {reasons}" if reasons else ""
        say(f"{name}: {counts['train']:,} examples to train on, {counts['held_out']} held out{skipped}")
    say(f"{corpus.tokens:,} tokens, {corpus.response_tokens / corpus.tokens:.0%} of them in replies")


def global_batch(batch: dict[str, np.ndarray], shapes: dict) -> dict[str, jax.Array]:
    """A whole batch, which every process has, over all devices: each process puts down what its devices hold."""
    return {
        name: jax.make_array_from_process_local_data(shape.sharding, batch[name], shape.shape)
        for name, shape in shapes.items()
    }


def check_same_run(run: RunConfig) -> None:
    """Raises InputError where the run directory was begun with another config."""
    folder = run.train.out
    old, new = dataclasses.asdict(run_dir.read_config(folder)), dataclasses.asdict(run)
    for section, free in FREE_TO_CHANGE.items():
        for name in list(new[section]) if free is None else free:
            for values in (old[section], new[section]):
                values.pop(name)
    for section in new:
        for name, value in new[section].items():
            if old[section][name] != value:
                raise InputError(
                    f"{folder} was begun with {section}.{name} = {old[section][name]}, not {value}; "
                    "accepted: the same config, or another train.out"
                )


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run works with, all but its state."""

    run: RunConfig
    mesh: Mesh
    cfg: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    source: hf.TensorSource | None  # of the weights to start from; None: random ones
    corpus: data.Corpus
    held_out: list[dict[str, np.ndarray]]  # batches to evaluate on


def prepare(run: RunConfig) -> Setting:
    """Read everything and check that it fits together, before any weight is loaded."""
    devices = jax.devices()
    mesh = make_mesh(*mesh_sizes(run.mesh, len(devices)), devices)
    check_batch(run.train.batch_size, run.train.accumulate, mesh)
    if run_dir.has_begun(run.train.out):
        check_same_run(run)
    else:
        run_dir.check_out(run.train.out, run.model.ckpt)
    cfg, tokenizer, stop_ids, source = start_model(run)
    if run.data.max_tokens > cfg.max_position:
        raise InputError(f"data.max_tokens = {run.data.max_tokens}: the model's context is {cfg.max_position}")
    corpus = data.load_examples(run.data, tokenizer, stop_ids, cfg.vocab_size)
    describe_corpus(corpus)
    longest = data.longest_response(corpus)
    if run.noise.kind != "none" and longest < run.noise.length + 1:
        raise InputError(
            f"noise.length = {run.noise.length}: the longest response has {longest} tokens; "
            f"accepted: up to {longest - 1}"
        )
    held_out = []
    if run.train.eval_every:
        held_out = data.held_out_batches(corpus, run.data, run.train.batch_size, run.train.eval_batches)
    return Setting(run, mesh, cfg, tokenizer, stop_ids, source, corpus, held_out)


def train(setting: Setting) -> train_step.TrainState:
    """Train to the last step, from wherever the run directory stands."""
    run, cfg, mesh = setting.run, setting.cfg, setting.mesh
    rows, out = run.train.batch_size, run.train.out
    batches = data.batches(setting.corpus, run.data, rows, run.train.seed)
    batch_shapes = train_step.batch_shapes(rows, run.data.max_tokens, mesh)
    if jax.process_index() == 0 and not run_dir.has_begun(out):
        text = yaml.safe_dump(dataclasses.asdict(run), sort_keys=False)
        run_dir.write_run_files(out, text, export.hf_config(cfg, setting.stop_ids), setting.tokenizer)
    checkpoints = Checkpoints(out, keep=run.train.keep)

    load = partial(hf.load_params, cfg, setting.source, mesh=mesh, stacked=True)
    digest = setting.corpus.digest
    restored = checkpoints.restore(train_step.state_shapes(cfg, run, mesh))
    if restored:
        state, data_state, start = restored
        if data_state["corpus"] != digest:
            raise InputError(f"{out}: the data is not what the run was begun with; accepted: the same rows")
        batches.set_state(data_state["batches"])
        say(f"resumed from step {start} of {out}")
        if start == run.train.steps:
            return state
    else:
        state = train_step.init_state(cfg, run, mesh, load() if setting.source and not run.frozen else None)
        if run.heads.kind == "eagle":
            replies = [of.tokens[of.response] for of in setting.corpus.train.values()]
            state = state.replace(params=with_vocabulary(state.params, replies, cfg.vocab_size))
        start = 0
    frozen = load(dtype=jnp.dtype(run.train.dtype)) if run.frozen else None
    trained = sum(p.size for p in jax.tree.leaves(state.params))
    kept = sum(p.size for p in jax.tree.leaves(frozen))
    flops = objective_of(run).flops(run, kept, trained)
    layout = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
    say(f"{kept or trained:,} parameters, {trained:,} trained; mesh {layout} of {mesh.devices.flat[0].device_kind}")
    began = time.perf_counter()
    step_of = train_step.jit_train_step(cfg, run, mesh).lower(state, frozen, batch_shapes).compile()
    evaluate = jax.jit(train_step.make_eval_step(cfg, run))
    say(f"{rows} x {run.data.max_tokens} tokens a step, compiled in {time.perf_counter() - began:.0f} s")

    log = TrainLog(run, mesh, flops, start)
    ending = 0  # the step that the run was asked to end after
    with contextlib.closing(checkpoints), contextlib.closing(log), contextlib.closing(batches), Stop() as stop:
        waiting = None
        for step in range(start + 1, run.train.steps + 1):
            state, report = step_of(state, frozen, global_batch(next(batches), batch_shapes))
            if waiting:
                log.write(*waiting)  # of the step before, so that the device need not wait for the host
            evaluated = {}
            last = step == run.train.steps
            if run.train.eval_every and (step % run.train.eval_every == 0 or last):
                jax.block_until_ready(state)
                began = time.perf_counter()
                on_mesh = (global_batch(batch, batch_shapes) for batch in setting.held_out)
                scores = [evaluate(state.params, frozen, batch, np.int32(i)) for i, batch in enumerate(on_mesh)]
                evaluated = eval_metrics(jax.device_get(scores))
                say(f"step {step}: held-out loss {evaluated['eval_loss']:.3f}")
                log.pause(time.perf_counter() - began)
            waiting = (step, report, evaluated)
            if stop.asked(step) and not last:
                ending = step
            if last or ending or step % run.train.save_every == 0:
                log.write(*waiting)  # raises where the step spoilt the weights: they must not be saved
                log.flush()  # before the checkpoint: it is complete up to this step
                data_state = {"batches": batches.get_state(), "corpus": digest}
                checkpoints.save(step, state, data_state, evaluated.get("eval_loss"))
                waiting = None
            if ending:
                break
    if ending:
        say(f"stopped after step {ending}; the same command goes on from there")
        sys.exit(0)
    return state


def eval_metrics(scores: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """The loss on clean text and the accuracy by noise depth of held-out batches."""
    clean, noisy = (metrics_of(sum(pair[i] for pair in scores)) for i in (0, 1))
    depths = {f"eval_{name}": value for name, value in noisy.items() if "depth" in name}
    # A draft-only run has no clean positions.
    top1 = {"eval_top1": clean["top1_clean"]} if "top1_clean" in clean else {}
    return {"eval_loss": clean["loss"]} | top1 | depths


def finish(setting: Setting, state: train_step.TrainState, flags) -> None:
    """What is written when a run is complete: a LoRA run's adapter, the export, the plot."""
    run = setting.run
    marks = None
    if isinstance(state.params, Marked):
        marks = DraftAdapter(None, state.params.noise_embed)
    if run.frozen or marks:
        beside = state.params if run.frozen else marks
        beside = jax.tree.map(lambda a: multihost_utils.process_allgather(a, tiled=True), beside)
        if jax.process_index() == 0:
            base = stored_fingerprint(setting.cfg, setting.source) if setting.source else None
            save_adapter(f"{run.train.out}/adapter", beside, run.lora, run.model.ckpt, base)
    if jax.process_index() > 0:
        return
    lines = read_metrics(run.train.out)
    if lines[-1]["loss"] is None:  # of a run by an earlier version, which went on after such a step
        raise InputError(f"{run.train.out}: the loss of its last step is not finite; nothing of it can be used")
    say(f"loss {lines[0]['loss']:.3f} at step {lines[0]['step']}, {lines[-1]['loss']:.3f} at step {lines[-1]['step']}")
    if flags.export:
        params = state.params.weights if marks else state.params
        if run.lora.rank:  # into the weights as they were stored, not as they were computed with
            params = merge(hf.load_params(setting.cfg, setting.source, stacked=True), jax.device_get(params))
        with named(directory="--export"):
            export.export_hf(flags.export, setting.cfg, params, setting.tokenizer, setting.stop_ids)
        say(f"wrote {flags.export}")
        if marks:  # which no Hugging Face directory has a place for
            save_adapter(f"{flags.export}/marks", marks, LoraConfig(), flags.export)
            say(f"wrote {flags.export}/marks, embeddings of its noise: decode with --adapter {flags.export}/marks")
    if flags.plot:
        plot(run)
    say(f"wrote {run.train.out}; decode with: {decode_command()} --ckpt {shlex.quote(run.train.out)} --prompt TEXT")


def check_export(run: RunConfig, directory: str) -> None:
    """Raise InputError where the export cannot be written when the run is done, or would replace what it reads."""
    with named(directory="--export"):
        path = export.check_export_dir(directory).resolve()
    for name, other in (("train.out", run.train.out), ("model.ckpt", run.model.ckpt)):
        place = Path(other or "").resolve()
        if other and (path == place or path in place.parents):
            raise InputError(f"--export {directory}: {name} is there; accepted: another directory")


def plot(run: RunConfig) -> None:
    plot_metrics(read_metrics(run.train.out), f"{run.train.out}/plot.png")
    say(f"wrote {run.train.out}/plot.png")


def main(argv: list[str] | None = None) -> None:
    run, flags = parse_args(argv)
    if flags.plan:
        from msn_jax.plan import plan_train

        return plan_train(run, flags.topology or run.mesh.topology)
    if flags.plot:
        check_plot(f"{run.train.out}/plot.png")
    start_processes(run.mesh)
    if flags.export:
        if run.lora.draft_only or run.lora.draft_layers or run.heads.kind:
            what = "heads change" if run.heads.kind else "a draft-only adapter changes"
            raise InputError(
                f"--export: {what} no weights; accepted without lora.draft_only, lora.draft_layers and heads.kind"
            )
        if jax.process_count() > 1:
            raise InputError("--export is for one process; train, then export where the run directory can be read")
        check_export(run, flags.export)
    setting = prepare(run)
    with run_dir.held(run.train.out), jax.set_mesh(setting.mesh):
        try:
            state = train(setting)
        except NotFinite as e:
            if flags.plot and jax.process_index() == 0:
                plot(run)  # what led to it
            raise InputError(f"{e}; {kept(run.train.out)}") from e
        finish(setting, state, flags)


if __name__ == "__main__":
    run_command(main)
