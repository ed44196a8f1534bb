"""Runs of train.py in processes of their own: killed and resumed, stopped, spread over devices and processes."""

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
from test_train import ROOT, lines

from msn_jax import ModelConfig, train_step
from msn_jax.io import run_dir
from msn_jax.io.checkpoints import Checkpoints
from msn_jax.sharding import make_mesh

pytestmark = pytest.mark.slow


def final_state(folder):
    """(step, state on the host) of the newest checkpoint, the optimiser's part too."""
    run = run_dir.read_config(folder)
    shapes = train_step.state_shapes(ModelConfig(**run.model.scratch), run, make_mesh(devices=jax.devices()[:1]))
    state, _, step = Checkpoints(folder, keep=run.train.keep).restore(shapes)
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


@pytest.mark.parametrize("number, said", [(signal.SIGTERM, ""), (signal.SIGINT, "Ctrl-C again")])
def test_a_signal_saves_and_ends_well(config, tmp_path, number, said):
    path = config(train={"steps": 5000, "save_every": 5000})
    with start(["--config", path]) as process:
        wait_for_step(process, tmp_path / "run", 3)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and said in output, output
    saved = int(re.search(r"stopped after step (\d+)", output)[1])
    assert Checkpoints(tmp_path / "run", keep=1).steps() == [saved] and len(lines(tmp_path / "run")) == saved


def test_two_processes_train_as_one(config, tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    settings = {"steps": 4, "save_every": 4, "eval_every": 2}
    common = {"data": {"held_out": 8}, "mesh": {"fsdp": 2}}
    alone = config("alone.yaml", train=settings | {"out": str(tmp_path / "alone")}, **common)
    pair = config("pair.yaml", train=settings | {"out": str(tmp_path / "pair")}, **common)
    processes = [
        start(["--config", alone], XLA_FLAGS=f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2")
    ]
    for i in range(2):
        where = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)}
        processes.append(start(["--config", pair], **where))
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

# SmolLM2 has 9 heads and 3 kv heads: neither divides over 4 devices. Two layers of it compile soon enough.
prompt = [[{"role": "user", "content": "List the first ten prime numbers."}]]
lm, mesh = load("smollm2-135m-instruct"), make_mesh(tensor=4)
lm = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, layers=2),
                         params=lm.params.replace(layers=lm.params.layers[:2]))
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
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {os.environ['XLA_FLAGS']}"}
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "one step is the same" in done.stdout and "the same tokens" in done.stdout
