"""train.py as a user runs it: what a run writes, what it goes on with, bad input."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import SCRATCH
from jax.sharding import AbstractMesh, AxisType

import train
from msn_jax import InputError, generate, load, train_step
from msn_jax.config import LoraConfig, MeshConfig, NoiseConfig
from msn_jax.io import run_dir
from msn_jax.objectives import objective_of
from msn_jax.sharding import MESH_AXES, check_batch, mesh_sizes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_directory_decodes_and_exports(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative train.out, as in the shipped configs
    path = config(data={"held_out": 5}, train={"eval_every": 6, "out": "run"})
    train.main(["--config", path, "--plot", "--export", str(tmp_path / "hf")])
    assert "loss" in capsys.readouterr().out
    assert (tmp_path / "run" / "plot.png").stat().st_size > 10_000
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    last = lines(tmp_path / "run")[-1]
    assert last["loss"] < lines(tmp_path / "run")[0]["loss"]
    assert {"eval_loss", "eval_top1_depth3", "top10_depth1", "grad_norm", "learning_rate", "loss_noisy"} <= last.keys()
    chat = [[{"role": "user", "content": "Count from 3 by 2."}]]
    ours, exported = load("run"), load(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, ours.params, exported.params)
    assert ours.cfg == exported.cfg and ours.stop_ids == exported.stop_ids
    a, b = (generate(lm, chat, max_new_tokens=10)[0] for lm in (ours, exported))
    assert a.tokens == b.tokens and a.text == b.text
    # Complete, it trains no more, but still exports.
    train.main(["--config", path, "--export", str(tmp_path / "again")])
    assert len(lines(tmp_path / "run")) == 12 and (tmp_path / "again" / "model.safetensors").exists()


def test_adapters_of_a_run_are_saved_small_and_merge(config, tmp_path, monkeypatch, capsys):
    train.main(["--config", config(train={"steps": 2}), "--export", str(tmp_path / "base")])
    lora = config(
        "lora.yaml",
        model={"scratch": None, "ckpt": "base"},
        lora={"rank": 2, "targets": ["qkv", "down"]},
        train={"out": str(tmp_path / "lora")},
    )
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)  # where the base has a short name; the run is read from elsewhere
        train.main(["--config", lora, "--export", str(tmp_path / "merged")])
        train.main(["--config", lora])  # the same run still
    capsys.readouterr()
    assert (tmp_path / "lora" / "adapter" / "adapter.safetensors").stat().st_size < 20_000
    run, merged = load(tmp_path / "lora"), load(tmp_path / "merged")
    applied = load(tmp_path / "base", adapter=tmp_path / "lora" / "adapter")
    # No warning; a command line that ran before may have asked for these lines.
    assert all(line.startswith("loading ") for line in capsys.readouterr().err.splitlines())
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(close, run.params, merged.params)
    jax.tree.map(close, run.params, applied.params)
    base = load(tmp_path / "base")
    assert np.abs(np.asarray(run.params.layers[0].qkv - base.params.layers[0].qkv)).max() > 1e-4
    assert (run.params.layers[0].o == base.params.layers[0].o).all()
    wider = {"scratch": SCRATCH | {"embed": 64}}
    other = config("other.yaml", model=wider, train={"out": str(tmp_path / "other"), "steps": 1})
    train.main(["--config", other])
    with pytest.raises(InputError, match=r"qkv.a has the shape .* asks for"):
        load(tmp_path / "other", adapter=tmp_path / "lora" / "adapter")
    with pytest.raises(InputError, match="adapter_config.json is missing"):
        load(tmp_path / "base", adapter=tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(
        InputError, match=r"lora: its base cannot be loaded: ckpt .*/base: no .*, or the base with the adapter"
    ):
        load(tmp_path / "lora")
    (tmp_path / "moved").rename(tmp_path / "base")
    draft_only = config(
        "draft.yaml",
        model={"scratch": None, "ckpt": str(tmp_path / "base")},
        data={"held_out": 5},
        noise={"anchors": 9},
        lora={"rank": 2, "draft_only": True},
        train={"out": str(tmp_path / "draft"), "eval_every": 6},
    )
    train.main(["--config", draft_only])
    first, *_, last = lines(tmp_path / "draft")
    assert last["loss"] < first["loss"] and {"eval_loss", "eval_top1_depth3", "top10_depth1"} <= last.keys()
    run, applied = load(tmp_path / "draft"), load(tmp_path / "base", adapter=tmp_path / "draft" / "adapter")
    jax.tree.map(np.testing.assert_array_equal, run.params, base.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), run.drafter, applied.drafter)
    chat = [[{"role": "user", "content": "Count from 3 by 2."}]]
    plain, drafted = (generate(lm, chat, max_new_tokens=20)[0] for lm in (base, applied))
    assert plain.tokens == drafted.tokens
    with pytest.raises(InputError, match="noise tokens in a row; accepted by this adapter: up to 1"):
        short = dataclasses.replace(run, drafter=run.drafter.replace(noise_embed=np.zeros((1, 32))))
        generate(short, chat, max_new_tokens=4, tree="draft16")
    with pytest.raises(InputError, match="--export: a draft-only adapter changes no weights"):
        train.main(["--config", draft_only, "--export", str(tmp_path / "none")])


@pytest.mark.parametrize(
    ("sections", "flags", "message"),
    [
        ({}, ["--train.stepz", "3"], "train.stepz"),
        ({"train": {"stepz": 3}}, [], "option 'stepz'; --help lists all settings"),
        ({}, ["--train.steps", "many"], '"train.steps": Expected int. Got value: many;'),
        ({}, ["--noise.kind", "blue"], "noise.kind = blue is not possible; accepted: ahead, random, none"),
        ({"data": {"sources": []}}, [], "data.sources"),
        ({"data": {"sources": [{"path": "missing.jsonl"}]}}, [], "missing.jsonl"),
        ({}, ["--noise.length", "60"], "the longest response has"),
        ({}, ["--train.batch_size", "3", "--train.accumulate", "2"], "train.accumulate"),
        ({}, ["--mesh.fsdp", "3"], "mesh of data 1, fsdp 3, tensor 1: does not lay out 1 devices"),
        ({}, ["--data.max_tokens", "256"], "the model's context is 128"),
        ({"model": {"scratch": SCRATCH | {"depth": 3}}}, [], "depth is no field"),
        ({"model": {"scratch": {"embed": 3}}}, [], "model.scratch: the field vocab_size is missing"),
        ({"model": {"scratch": SCRATCH | {"rope_scaling": {"kind": "x", "factor": 2.0}}}}, [], "rope_scaling.kind = x"),
        ({"model": {"scratch": SCRATCH | {"vocab_size": 100}}}, [], "vocab_size = 100"),
        ({"model": {"ckpt": "nowhere/at/all", "scratch": None}}, [], "nowhere/at/all"),
        ({"model": {"ckpt": "x"}}, [], "one of model.ckpt and model.scratch"),
        (
            {"model": {"ckpt": "smollm2-135m-instruct", "scratch": None, "shape": "1b"}},
            [],
            "the shape 1b of model.shape",
        ),
        ({}, ["--train.out", "gs://bucket/run", "--plot"], "--plot"),
        ({}, ["--mesh.distributed", "true"], "--mesh.distributed false"),
        ({"lora": {"rank": 4}}, [], "adapters need weights"),
        ({"lora": {"draft_only": True}}, [], "lora.draft_only = True is not possible; accepted: true with lora.rank"),
        ({"lora": {"targets": ["q_proj"]}}, [], "lora.targets"),
        ({"train": {"eval_every": 2}}, [], "data.held_out = 0"),
        ({"data": {"held_out": 100}}, [], "held_out = 100"),
        ({}, ["--topology", "v5e:2x4"], "--plan"),
        ({}, ["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(config, tmp_path, sections, flags, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = config(**sections)
    with pytest.raises(InputError, match=re.escape(message)) as e:
        train.main(["--config", path, *flags])
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def test_batches_and_axes_must_come_out_even():
    mesh = AbstractMesh((2, 2, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    check_batch(16, 2, mesh)
    with pytest.raises(InputError, match=r"batch_size = 12: .* accepted: a multiple of 8 \(data 2 x fsdp 2 x .* 2\)"):
        check_batch(12, 2, mesh)
    assert mesh_sizes(MeshConfig(data=2, fsdp=-1, tensor=2), 16) == (2, 4, 2)
    assert mesh_sizes(MeshConfig(data=1, fsdp=1, tensor=-1), 8) == (1, 1, 8)
    for config in (MeshConfig(data=3), MeshConfig(fsdp=4), MeshConfig(data=2, fsdp=2)):
        with pytest.raises(InputError, match="does not lay out 8 devices"):
            mesh_sizes(config, 8)


def test_a_run_is_not_taken_up_with_another_config(config, tmp_path):
    train.main(["--config", config(train={"steps": 2})])
    before = lines(tmp_path / "run")
    with pytest.raises(InputError, match="begun with train.learning_rate = 0.01, not 0.02"):
        train.main(["--config", config(train={"steps": 2}), "--train.learning_rate", "0.02"])
    train.main(["--config", config(train={"steps": 2}), "--train.keep", "5"])
    assert lines(tmp_path / "run") == before


def test_flops_of_a_step(config):
    run, _ = train.parse_args(["--config", config()])  # 4 rows of 64 tokens, noise of length 3
    lora = lambda **settings: dataclasses.replace(run, lora=LoraConfig(rank=2, **settings))
    hung = 4 * run.noise.anchors * 3
    beside = dataclasses.replace(run, noise=NoiseConfig(length=3, layout="beside"))
    flops = lambda run, frozen, trained: objective_of(run).flops(run, frozen, trained)
    assert flops(run, 0, 100) == 600 * 256
    assert flops(lora(), 100, 10) == (400 + 60) * 256
    assert flops(lora(draft_only=True), 100, 10) == 200 * 256 + (400 + 60) * hung
    assert flops(beside, 0, 100) == 600 * (256 + hung)


def test_a_run_that_made_nothing_yet_takes_another_config(config, tmp_path, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train_step, "jit_train_step", no_memory)
        train.main(["--config", config(train={"steps": 1})])
    train.main(["--config", config(train={"steps": 1, "batch_size": 8})])
    assert run_dir.read_config(tmp_path / "run").train.batch_size == 8 and len(lines(tmp_path / "run")) == 1


def test_a_run_is_not_taken_up_with_other_data(config, tmp_path):
    path, rows = config(train={"steps": 1}), tmp_path / "rows.jsonl"
    reply = json.dumps({"instruction": "Is this all?", "response": "Not quite.<|endoftext|>This is."})
    rows.write_text(rows.read_text() + reply + "\n")
    train.main(["--config", path])
    train.main(["--config", path])  # cut in the same place, by the tokenizer as it was kept
    rows.write_text(rows.read_text() + json.dumps({"instruction": "More?", "response": "No, this was all."}) + "\n")
    with pytest.raises(InputError, match="the data is not what the run was begun with"):
        train.main(["--config", str(tmp_path / "config.yaml")])
    with pytest.raises(InputError, match="is a run directory; accepted: what its --export wrote"):
        other = config(model={"scratch": None, "ckpt": str(tmp_path / "run")}, train={"out": str(tmp_path / "more")})
        train.main(["--config", other])


def test_resolved_config_is_the_run(config, tmp_path):
    train.main(["--config", config(train={"steps": 1}), "--noise.density", "0.25"])
    run = run_dir.read_config(tmp_path / "run")
    assert run.noise.density == 0.25 and run.train.steps == 1 and run.data.max_tokens == 64
    assert dataclasses.asdict(run)["model"]["scratch"] == SCRATCH


def test_plan_without_a_slice_is_an_estimate(config, capsys):
    train.main(["--config", config(), "--plan", "--mesh.fsdp", "2"])
    output = capsys.readouterr().out
    assert "estimate" in output and "fsdp 2" in output and "256 tokens a step" in output
    row = json.loads(output.splitlines()[-1])
    assert row["estimate"] and row["parameters"] == 300 * 32 + 32 + 2 * (2 * 32 + 8 * 32 * 8 + 32 * 32 + 3 * 32 * 48)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_are_valid(path):
    run, _ = train.parse_args(["--config", str(path)])
    assert run.train.steps > 0
