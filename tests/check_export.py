"""Compare an exported directory in torch transformers with ours: the same logits, the same tokenizer.

    python tests/check_export.py --ckpt DIR --torch_python TORCH_VENV/bin/python
    python tests/check_export.py --torch_python TORCH_VENV/bin/python      # tiny models of each family, exported first

TORCH_VENV holds torch and transformers; this package never needs them. Not run by CI. Exits with 1 where float32
logits differ by more than 2e-5 of the largest (1e-4 where that is 5), or where token ids differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TEXTS = ["The quick brown fox jumps over 13 lazy dogs.", "def f(x):\n    return x + 1  # naïve", "t5 t7 t11 t60 t2"]
LIMIT = 2e-5  # of the largest logit: SmolLM2's are 35, and passes over it differ by 3e-4


def torch_side(ckpt: str, ours: str) -> None:
    """Print {"logits": largest difference, "ids": whether the tokenizers agree} for the npz that our side wrote."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(ckpt, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(ckpt)
    with np.load(ours) as data, torch.no_grad():
        theirs = model(torch.tensor(data["tokens"]).long()).logits.numpy()
        difference = float(np.abs(theirs - data["logits"]).max())
        ids = [tokenizer(text)["input_ids"] for text in TEXTS] == json.loads(str(data["ids"]))
    stops = model.generation_config.eos_token_id
    print(json.dumps({"logits": difference, "scale": float(np.abs(theirs).max()), "ids": ids, "stops": stops}))


def compare(ckpt: Path, torch_python: str) -> bool:
    """Run both sides on one exported directory and print what they differ by. True where they agree."""
    import jax.numpy as jnp

    from msn_jax import forward, load, unembed

    lm = load(ckpt)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, lm.cfg.vocab_size, (4, min(96, lm.cfg.max_position)), dtype=np.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits = unembed(lm.params, lm.cfg, forward(lm.params, lm.cfg, jnp.asarray(tokens), positions)[0])
    ids = json.dumps([lm.tokenizer(text)["input_ids"] for text in TEXTS])
    with tempfile.TemporaryDirectory() as scratch:
        np.savez(f"{scratch}/ours.npz", tokens=tokens, logits=np.asarray(logits, np.float32), ids=ids)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [torch_python, __file__, "--torch_side", f"{scratch}/ours.npz", "--ckpt", str(ckpt)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"check_export.py: error: {torch_python} cannot load {ckpt}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{ckpt.name}: logits differ by at most {found['logits']:.2e} (their size: {found['scale']:.1f})")
    print(f"{ckpt.name}: token ids {'agree' if found['ids'] else 'differ'}; torch stops at {found['stops']}")
    stops = found["stops"] if isinstance(found["stops"], list) else [found["stops"]]
    return found["logits"] <= LIMIT * found["scale"] and found["ids"] and set(stops) <= set(lm.stop_ids)


def export_tiny(folder: Path) -> list[Path]:
    """Random models: tied, in shards; llama3 rope and a head_dim of its own; linear rope; the other families."""
    import jax
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from msn_jax import ModelConfig, init
    from msn_jax.io.export import export_hf
    from msn_jax.model_config import FAMILIES, RopeScaling

    # Bytes alone: transformers splits a Qwen2's text as Qwen2 does, whatever its tokenizer.json says.
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(spell.alphabet()))}, []))
    letters.pre_tokenizer, letters.decoder = spell, decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<|endoftext|>")
    shape = dict(vocab_size=257, embed=32, layers=3, heads=4, kv_heads=2, mlp=48, max_position=160)
    llama3 = RopeScaling(kind="llama3", factor=8.0, original_max_position=32)
    cfgs = {
        "tied": ModelConfig(**shape, head_dim=8, tie_embeddings=True),
        "llama3": ModelConfig(**shape, head_dim=16, rope_theta=100.0, rope_scaling=llama3, norm_eps=1e-6),
        "linear": ModelConfig(**shape, head_dim=8, rope_scaling=RopeScaling(kind="linear", factor=4.0)),
        "biases": ModelConfig(**shape, head_dim=8, qkv_bias=True, o_bias=True, mlp_bias=True),
    }
    for family in FAMILIES.keys() - {"llama"}:
        cfgs[family] = ModelConfig(**shape, head_dim=8, sliding_window=8, **FAMILIES[family])
    for name, cfg in cfgs.items():
        key, noise = jax.random.split(jax.random.key(0))
        params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(noise, a.shape), init(key, cfg))  # noqa: B023
        export_hf(folder / name, cfg, params, tokenizer, {1, 5}, max_shard_bytes=20_000 if name == "tied" else 10**9)
    return [folder / name for name in cfgs]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", type=Path, help="an exported directory; without it, tiny random models are exported")
    p.add_argument("--torch_python", default=sys.executable, help="the Python of the venv that has torch")
    p.add_argument("--torch_side", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.torch_side:
        return torch_side(str(args.ckpt), args.torch_side)
    with tempfile.TemporaryDirectory() as scratch:
        ckpts = [args.ckpt] if args.ckpt else export_tiny(Path(scratch))
        sys.exit(0 if all([compare(ckpt, args.torch_python) for ckpt in ckpts]) else 1)


if __name__ == "__main__":
    main()
