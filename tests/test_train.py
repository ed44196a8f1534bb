"""train.py as a user runs it: killed, resumed, spread over devices and processes, fed with bad input."""

import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import AbstractMesh, AxisType

import train
from msn_jax import InputError, ModelConfig, generate, load, train_step
from msn_jax.config import LoraConfig, MeshConfig
from msn_jax.io import run_dir
from msn_jax.sharding import MESH_AXES, check_batch, make_mesh, mesh_sizes

ROOT = Path(__file__).parent.parent
SCRATCH = {
    "vocab_size": 300,
    "embed": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "mlp": 48,
    "max_position": 128,
    "tie_embeddings": True,
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Encoded rows go to a cache of this run of the tests."""
    folder = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture
def config(tmp_path):
    """A function that writes a config file; its arguments are keys of sections, as train={"steps": 3}."""
    rng = random.Random(0)
    rows = []
    for _ in range(60):
        start, by = rng.randrange(20), rng.randrange(1, 5)
        reply = " ".join(str(start + by * i) for i in range(12))
        rows.append(json.dumps({"instruction": f"Count from {start} by {by}.", "response": reply}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")

    def write(name="config.yaml", **sections):
        base = {
            "model": {"scratch": SCRATCH},
            "data": {"sources": [{"path": str(tmp_path / "rows.jsonl")}], "max_tokens": 64, "packing_bins": 8},
            "noise": {"length": 3},
            "train": {"out": str(tmp_path / "run"), "steps": 12, "batch_size": 4, "learning_rate": 0.01},
        }
        for section, values in sections.items():
            base[section] = base.get(section, {}) | values
        (tmp_path / name).write_text(yaml.safe_dump(base))
        return str(tmp_path / name)

    return write


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def final_state(folder):
    """(step, state on the host) of the newest checkpoint, the optimiser's part too."""
    run = run_dir.read_config(folder)
    shapes = train_step.state_shapes(ModelConfig(**run.model.scratch), run, make_mesh(devices=jax.devices()[:1]))
    state, _, step = run_dir.Checkpoints(folder, keep=run.train.keep).restore(shapes)
    return step, jax.device_get(state)


def start(args, **env):
    return subprocess.Popen(
        [sys.executable, "train.py", *args],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process, folder, step):
    """Until the run has written the metrics of `step`."""
    path, end = Path(folder) / "metrics.jsonl", time.time() + 120
    while process.poll() is None and time.time() < end:
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run ended before step {step}: {process.stdout.read()}")


def test_killed_twice_a_run_ends_bit_for_bit_as_if_it_never_was(config, tmp_path):
    settings = {"steps": 40, "save_every": 5}
    whole = config("whole.yaml", train=settings | {"out": str(tmp_path / "whole")})
    killed = config("killed.yaml", train=settings | {"out": str(tmp_path / "killed")})
    for at in (random.randrange(6, 14), random.randrange(20, 32)):
        with start(["--config", killed]) as process:
            wait_for_step(process, tmp_path / "killed", at)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    for path in (whole, killed):
        with start(["--config", path]) as process:
            output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    assert "resumed from step" in output
    a, b = final_state(tmp_path / "whole"), final_state(tmp_path / "killed")
    assert a[0] == b[0] == 40
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])
    timed = lambda line: {name: value for name, value in line.items() if name != "tokens_per_s"}
    assert [timed(x) for x in lines(tmp_path / "whole")] == [timed(x) for x in lines(tmp_path / "killed")]
    assert [x["step"] for x in lines(tmp_path / "killed")] == list(range(1, 41))


def test_sigterm_saves_and_ends_well(config, tmp_path):
    path = config(train={"steps": 5000, "save_every": 5000})
    with start(["--config", path]) as process:
        wait_for_step(process, tmp_path / "run", 3)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    saved = int(re.search(r"stopped after step (\d+)", output)[1])
    assert run_dir.Checkpoints(tmp_path / "run", keep=1).steps() == [saved] and len(lines(tmp_path / "run")) == saved


def test_two_processes_train_as_one(config, tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    settings = {"steps": 4, "save_every": 4, "eval_every": 2}
    common = {"data": {"held_out": 8}, "mesh": {"fsdp": 2}}
    alone = config("alone.yaml", train=settings | {"out": str(tmp_path / "alone")}, **common)
    pair = config("pair.yaml", train=settings | {"out": str(tmp_path / "pair")}, **common)
    quick = "--xla_backend_optimization_level=0"
    processes = [start(["--config", alone], XLA_FLAGS=f"{quick} --xla_force_host_platform_device_count=2")]
    for i in range(2):
        where = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)}
        processes.append(start(["--config", pair], XLA_FLAGS=quick, **where))
    for process in processes:
        with process:
            output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    one, both = lines(tmp_path / "alone"), lines(tmp_path / "pair")
    assert [line["step"] for line in both] == [1, 2, 3, 4]
    for x, y in zip(one, both, strict=True):
        for name in x.keys() - {"tokens_per_s"}:
            assert x[name] == pytest.approx(y[name], abs=1e-5, rel=1e-5), name
    a, b = final_state(tmp_path / "alone"), final_state(tmp_path / "pair")
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4)
    jax.tree.map(close, a[1].params, b[1].params)


EIGHT_DEVICES = """
import dataclasses, sys
import jax, numpy as np
from msn_jax import ModelConfig, NoiseConfig, generate, init, load, train_step
from msn_jax.config import DataConfig, DataSource, LoraConfig, ModelStart, RunConfig, TrainConfig
from msn_jax.io import hf
from msn_jax.params import stack_layers
from msn_jax.sharding import make_mesh

assert jax.device_count() == 8
cfg = ModelConfig(vocab_size=64, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, max_position=160)
rng = np.random.default_rng(0)
batch = {
    "tokens": rng.integers(0, 64, (8, 24), np.int32),
    "segment_ids": np.repeat([[1, 2]], 12, axis=1) * np.ones((8, 1), np.int32),
    "positions": np.tile(np.arange(12, dtype=np.int32), (8, 2)),
    "response": np.tile(np.arange(12) >= 4, (8, 2)),
}
moment = lambda state: next(s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
                            if hasattr(s, "mu"))
# Every switch that a family has: LayerNorm, biases everywhere, a plain MLP, q and k norms, a window.
other = dataclasses.replace(cfg, norm="layer", activation="gelu_tanh", qkv_bias=True, o_bias=True, mlp_bias=True,
                            qk_norm=True, sliding_window=5)
for cfg, lora in ((other, LoraConfig()), (cfg, LoraConfig(rank=2))):
    results = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        run = RunConfig(model=ModelStart(ckpt="unused"), data=DataConfig(sources=[DataSource(path="unused")]),
                        train=TrainConfig(out="unused", steps=10, batch_size=8, accumulate=2, head_chunk=10),
                        noise=NoiseConfig(length=3), lora=lora)
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            shapes = train_step.state_shapes(cfg, run, mesh)
            params = stack_layers(init(jax.random.key(1), cfg))
            state = train_step.init_state(cfg, run, mesh, None if lora.rank else params)
            split = {len(a.addressable_shards) and a.addressable_shards[0].data.size < a.size
                     for a in jax.tree.leaves(state.params) if a.ndim > 2 and a.size > 64}
            assert split == ({True} if sizes == (2, 2, 2) and not lora.rank else split)
            placed = jax.device_put(batch, jax.tree.map(lambda s: s.sharding, train_step.batch_shapes(8, 24, mesh)))
            step = jax.jit(train_step.make_train_step(cfg, run),
                           out_shardings=(jax.tree.map(lambda s: s.sharding, shapes), None))
            after, report = step(state, params if lora.rank else None, placed)
            results.append(jax.device_get((moment(after), report)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), *results)
    assert results[0][1]["by_depth"][1:, 0].sum() == 16 * 3
print("one step is the same")

# SmolLM2 has 9 heads and 3 kv heads: neither divides over 4 devices. Some layers of it compile soon enough.
prompt = [[{"role": "user", "content": "List the first ten prime numbers."}]]
lm, mesh = load("smollm2-135m-instruct"), make_mesh(tensor=4)
lm = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, layers=6),
                         params=lm.params.replace(layers=lm.params.layers[:6]))
with jax.set_mesh(mesh):
    spread = dataclasses.replace(lm, params=hf.place_params(lm.cfg, jax.device_get(lm.params), lm.dtype, mesh))
    gate_up = spread.params.layers[0].gate_up
    assert gate_up.addressable_shards[0].data.size * 4 == gate_up.size
    on_four = generate(spread, prompt, tree="chain4", max_new_tokens=12)[0].tokens
alone = generate(lm, prompt, tree="chain4", max_new_tokens=12)[0].tokens
assert on_four == alone, (on_four, alone)
print("the same tokens")
"""


def test_on_eight_devices_a_step_and_a_decode_are_those_of_one():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"}
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "one step is the same" in done.stdout and "the same tokens" in done.stdout


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


def test_adapters_of_a_run_are_saved_small_and_merge(config, tmp_path):
    train.main(["--config", config(train={"steps": 2}), "--export", str(tmp_path / "base")])
    lora = config(
        "lora.yaml",
        model={"scratch": None, "ckpt": str(tmp_path / "base")},
        lora={"rank": 2, "targets": ["qkv", "down"]},
        train={"out": str(tmp_path / "lora")},
    )
    train.main(["--config", lora, "--export", str(tmp_path / "merged")])
    assert (tmp_path / "lora" / "adapter" / "adapter.safetensors").stat().st_size < 20_000
    run, merged = load(tmp_path / "lora"), load(tmp_path / "merged")
    applied = load(tmp_path / "base", adapter=tmp_path / "lora" / "adapter")
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
        ({"train": {"stepz": 3}}, [], "stepz"),
        ({}, ["--train.steps", "many"], "train.steps"),
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
    assert train.step_flops(run, 100, 100) == 600 * 256
    assert train.step_flops(lora(), 100, 10) == (400 + 60) * 256
    assert train.step_flops(lora(draft_only=True), 100, 10) == 200 * 256 + (400 + 60) * 4 * run.noise.anchors * 3


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
