"""Shared fixtures. SmolLM2 is loaded once; the tiny models are the golden checkpoints."""

import dataclasses
import json
import os
import random
import resource
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and run little: without LLVM's optimisation they take 0.7 of the time, and with the older emitters
# of fusions, which jax 0.10 still has, 0.6 of that.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)
# What one worker, or a script that a test starts, has compiled, the others read. A bound on its size makes jax lock
# the folder, without which two processes could meet over half an entry.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED = tempfile.mkdtemp(prefix="msn_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**31)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from msn_jax import DecodeConfig, ModelConfig, forward, init, load, unembed
from msn_jax.decode import init_state, prefill, run
from msn_jax.io.loading import open_checkpoint

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDENS = Path(__file__).parent / "goldens"
# The model of a training run of seconds.
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


def pytest_unconfigure():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(scope="session")
def smollm2():
    return load("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm2_text():
    """Its tokenizer, its stop ids and its config, without the weights."""
    return open_checkpoint("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def shallow(smollm2):
    """SmolLM2's first three layers: its tokenizer and its widths for a tenth of the compiling."""
    cfg = dataclasses.replace(smollm2.cfg, layers=3)
    return dataclasses.replace(smollm2, cfg=cfg, params=smollm2.params.replace(layers=smollm2.params.layers[:3]))


@pytest.fixture(scope="session")
def tiny():
    """(cfg, params) of a random model whose greedy text is varied."""
    cfg = ModelConfig(
        vocab_size=61,
        embed=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp=48,
        max_position=160,
        tie_embeddings=True,
    )
    return cfg, jax.jit(init, static_argnums=1)(jax.random.key(1), cfg)


@pytest.fixture(scope="session")
def one_layer(tiny):
    """Its first layer, where compiling takes long and a second layer would show nothing more."""
    cfg, params = tiny
    return dataclasses.replace(cfg, layers=1), params.replace(layers=params.layers[:1])


@pytest.fixture(scope="session")
def batch():
    """A packed row for `tiny`: 10 tokens whose reply is 4 to 9, 8 tokens whose reply is 13 to 17, and padding."""
    segments = np.array([[1] * 10 + [2] * 8 + [0] * 2], np.int32)
    response = np.zeros((1, 20), bool)
    response[0, 4:10] = response[0, 13:18] = True
    return {
        "tokens": jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 20)), jnp.int32),
        "segment_ids": jnp.asarray(segments),
        "positions": jnp.asarray([[*range(10), *range(8), 0, 0]], jnp.int32),
        "response": jnp.asarray(response),
    }


@pytest.fixture(scope="session")
def plain_greedy(tiny):
    """Greedy decoding without a cache, a tree or a loop: the whole text again for each token."""
    cfg, params = tiny

    @jax.jit
    def best(tokens):
        positions = jnp.arange(tokens.shape[1])[None]
        return jnp.argmax(unembed(params, cfg, forward(params, cfg, tokens, positions)[0]), axis=-1)

    def decode(prompt, count):
        text = list(prompt)
        for _ in range(count):
            padded = jnp.asarray([text + [0] * (cfg.max_position - len(text))], jnp.int32)
            text.append(int(best(padded)[0, len(text) - 1]))
        return text[len(prompt) :]

    return decode


def decode_all(
    params, cfg, trees, prompts, stop_ids=(), chunk=16, slots=256, drafter=None, dtype=jnp.float32, **settings
):
    """Prefill and run to the end. Returns (state on the host, tokens of each row)."""
    state = init_state(cfg, trees, prompts, DecodeConfig(**settings), stop_ids, slots=slots, dtype=dtype)
    state = prefill(params, state, cfg=cfg, chunk=chunk)
    state, _ = run(params, state, 2**31 - 1, drafter, cfg=cfg, trees=trees)
    state = jax.device_get(state)
    ends = state.cache.length + 1
    return state, [np.asarray(state.tokens)[b, len(p) : ends[b]].tolist() for b, p in enumerate(prompts)]


@pytest.fixture
def full_disk():
    """No file may grow beyond 20 kB. What is compiled meanwhile is not kept: half an entry would fail other tests."""
    before, least = resource.getrlimit(resource.RLIMIT_FSIZE), jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


@pytest.fixture(scope="module")
def rows_cache(tmp_path_factory):
    """Encoded rows go to a cache of this run of the tests."""
    folder = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture
def config(tmp_path, rows_cache):
    """A function that writes a config file of a tiny run; its arguments are keys of sections, as train={"steps": 3}."""
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


@pytest.fixture(scope="session")
def tiny_ckpt(tmp_path_factory):
    """A golden checkpoint with a tokenizer of single characters, whose chat template prints roles and contents."""
    folder = tmp_path_factory.mktemp("ckpt") / "tiny"
    shutil.copytree(GOLDENS / "tiny_gqa_tied", folder)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(c): c - 30 for c in range(33, 126)} | {"\u0120": 96}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tiny_ckpt):
    return load(tiny_ckpt)
