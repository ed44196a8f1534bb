"""What the library is called with: prompts and settings of the wrong kind are refused by name, before any work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import msn_jax
from msn_jax import DecodeConfig, InputError, generate, load, make_mesh, stream
from msn_jax.decode.engine import Engine
from msn_jax.decode.prompts import read_prompts
from msn_jax.io import loading

ROOT = Path(__file__).parent.parent
SAID = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "prompts, settings, named",
    [
        (SAID, {}, "prompts is one conversation; accepted: a list of prompts"),
        (SAID[0], {}, "prompts is the dict .*; accepted: a list of prompts"),
        ("text", {}, "prompts is the str 'text'; accepted: a list of prompts"),
        (None, {}, "prompts is None; accepted: a list of prompts"),
        ([3, 4, 5], {}, "prompt 1: a prompt is the int 3; accepted: a text, a list of messages"),
        (["ab", None], {}, "prompt 2: a prompt is None"),
        (["ab", b"ab"], {}, "prompt 2: a prompt is the bytes"),
        ([[3.7, 4.0]], {}, "prompt 1: a prompt has the float 3.7 where a token id belongs"),
        ([np.array([3.0])], {}, "prompt 1: a prompt has the float64 np.float64.3.0. where a token id belongs"),
        ([np.array([[3, 4]])], {}, "prompt 1: a prompt has the ndarray .* where a token id belongs"),
        ([["a", "b"]], {}, "prompt 1: a prompt has the str 'a' where a token id belongs"),
        ([[True]], {}, "the token id True; accepted: 0 to 96"),
        ([[97]], {}, "the token id 97; accepted: 0 to 96"),
        ([[-1]], {}, "the token id -1"),
        ([[]], {}, "prompt 1: the prompt is empty"),
        ([""], {}, "prompt 1: the prompt is empty"),
        ([[*SAID, 3]], {}, "prompt 1: a message is 3; accepted: .role, content."),
        ([[{"content": "a"}]], {}, "a message is .'content': 'a'.; accepted: .role, content."),
        ([[{"role": "user"}]], {}, "the content of a message is None; accepted: a text"),
        ([[{"role": "user", "content": ["a"]}]], {}, "the content of a message is .'a'.; accepted: a text"),
        (["ab"], {"max_tokens": 3}, "max_tokens is no setting; accepted: method, tree, max_new_tokens"),
        (["ab"], {"max_new_tokens": 2.5}, "max_new_tokens = 2.5"),
        (["ab"], {"temperature": "0.5"}, "temperature = '0.5'"),
        (["ab"], {"seed": None}, "seed = None"),
        (["ab"], {"top_k": 2.5, "temperature": 1.0}, "top_k = 2.5"),
        (["ab"], {"seed": 1.5, "temperature": 1.0}, "seed = 1.5"),
    ],
)
def test_a_call_that_cannot_be_honoured_is_refused(tiny_lm, prompts, settings, named, monkeypatch):
    monkeypatch.setattr(Engine, "step", lambda *_: pytest.fail("some work was done"))
    with pytest.raises(InputError, match=named) as e:
        generate(tiny_lm, prompts, **settings)
    assert "\n" not in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize("ids", [[5, 6], (5, 6), np.array([5, 6]), jnp.array([5, 6]), [np.int32(5), jnp.int32(6)]])
def test_ids_of_every_kind_are_the_same_prompt(tiny_lm, ids):
    (result,) = generate(tiny_lm, iter([ids]), max_new_tokens=3, method="ar")
    assert result.prompt_tokens == 2 and result.tokens == generate(tiny_lm, [[5, 6]], max_new_tokens=3)[0].tokens


def test_the_keywords_are_the_settings():
    defaults = dict(generate.__kwdefaults__)
    assert DecodeConfig(**defaults | {"stop": list(defaults["stop"])}) == DecodeConfig()
    assert defaults.keys() == set(DecodeConfig.__dataclass_fields__)
    assert stream.__kwdefaults__.keys() == defaults.keys() - {"batch_size"}


@pytest.mark.slow
def test_a_stream_is_the_answer_in_pieces(tiny_lm):
    settings = {"max_new_tokens": 20, "temperature": 0.8, "seed": 3}
    (whole,) = generate(tiny_lm, ["abqc"], **settings)
    answer = stream(tiny_lm, "abqc", **settings)
    pieces = list(answer)
    assert len(pieces) > 1 and "".join(pieces) == answer.text == whole.text
    assert answer.result.tokens == whole.tokens and answer.result.accepted == whole.accepted
    with pytest.raises(StopIteration):
        next(answer)
    with pytest.raises(InputError, match="batch_size is no setting|max_tokens is no setting"):
        stream(tiny_lm, "abqc", max_tokens=3)
    with pytest.raises(InputError, match="the model's context is"):
        stream(tiny_lm, "abqc", max_new_tokens=10**6)


def test_tools_of_a_row_reach_the_template(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "add"}]}\n')
    assert read_prompts(str(path), "auto")[0].tools == [{"name": "add"}]
    for tools in ('"x"', "3", "[3]"):
        path.write_text('{"messages": [{"role": "user", "content": "a"}], "tools": ' + tools + "}\n")
        with pytest.raises(InputError, match="line 1: `tools`"):
            read_prompts(str(path), "auto")


def test_a_model_shows_itself_in_a_line(tiny_lm, tiny_ckpt):
    assert repr(tiny_lm) == f"LM({str(tiny_ckpt)!r}: {sum(p.size for p in jax.tree.leaves(tiny_lm.params)):,} " + (
        "parameters, float32 on cpu)"
    )


def test_weights_that_are_no_numbers_are_refused(tiny_ckpt, tmp_path):

    shutil.copytree(tiny_ckpt, tmp_path / "nan")
    tensors = {name: np.array(value) for name, value in load_file(tiny_ckpt / "model.safetensors").items()}
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="nan: the weights final_norm.* hold NaN or infinity"):
        load(tmp_path / "nan")


def test_a_mesh_of_another_kind_is_refused(tiny_ckpt):
    for mesh in (jax.make_mesh((1,), ("x",)), jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))):
        with pytest.raises(InputError, match=r"a mesh with the axes .*; accepted: one of msn_jax.make_mesh"):
            load(tiny_ckpt, mesh=mesh)
    with pytest.raises(InputError, match="mesh 1 x 1 x 64 needs 64 devices; there are 1"):
        make_mesh(tensor=64)
    with pytest.raises(InputError, match="dtype foo is not supported; accepted: float32, bfloat16"):
        load(tiny_ckpt, dtype="foo")


ON_A_MESH = """
import sys, msn_jax
from msn_jax.decode import loop
seen, run = [], loop.run
loop.run = lambda params, state, *a, **k: seen.append(state.cache.k[0].sharding) or run(params, state, *a, **k)
lm = msn_jax.load(sys.argv[1], mesh=msn_jax.make_mesh(tensor=2))
spread = msn_jax.generate(lm, ["abqc"], max_new_tokens=12)[0].tokens
assert "".join(msn_jax.stream(lm, "abqc", max_new_tokens=12))
assert all(len(s.device_set) == 2 and not s.is_fully_replicated for s in seen), seen
assert spread == msn_jax.generate(msn_jax.load(sys.argv[1]), ["abqc"], max_new_tokens=12)[0].tokens
print("spread")
"""


@pytest.mark.slow
def test_a_mesh_is_remembered(tiny_ckpt):
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {os.environ['XLA_FLAGS']}"}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, str(tiny_ckpt)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.stdout == "spread\n", done.stderr[-3000:]


@pytest.mark.slow
def test_the_import_and_the_library_print_nothing(tiny_ckpt):
    code = "import msn_jax, sys; msn_jax.generate(msn_jax.load(sys.argv[1]), ['ab'], max_new_tokens=2)"
    done = subprocess.run([sys.executable, "-c", code, str(tiny_ckpt)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert msn_jax.stream is stream


def test_the_alias_says_which_weights_it_stands_for(monkeypatch, capsys):
    monkeypatch.setattr("msn_jax.io.loading.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("msn_jax.io.loading.download", lambda *_: Path("hub"))
    assert loading.resolve("smollm2-135m-instruct") == Path("hub")
    assert "these are the hub's weights, not its 4-bit ones" in capsys.readouterr().err
