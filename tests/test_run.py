import dataclasses
import errno
import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDENS
from flax import struct
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from msn_jax import InputError, init, load
from msn_jax.io import files, hf, tokenizer
from msn_jax.io.checkpoints import Checkpoints, restore_params
from msn_jax.io.export import check_export_dir, export_hf, hf_config
from msn_jax.io.metrics import MetricsLog
from msn_jax.io.published_config import config_from_hf
from msn_jax.io.run_dir import is_run, write_run_files
from msn_jax.model_config import RopeScaling


@struct.dataclass
class State:
    step: jax.Array
    params: object
    opt_state: object


def stack(params):
    return params.replace(layers=jax.tree.map(lambda *a: jnp.asarray(np.stack(a)), *params.layers))


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def state(tiny):
    params = stack(tiny[1])
    return at(State(jnp.int32(7), params, optax.adamw(1e-3).init(params)), 0.5)


def abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


@jax.jit
def at(state, step):
    """The state of another step: every number of it differs."""
    return jax.tree.map(lambda a: a + jnp.asarray(step).astype(a.dtype), state)


def saved(run, state, steps=(1, 2), keep=5):
    checkpoints = Checkpoints(run, keep)
    for step in steps:
        checkpoints.save(step, at(state, step), {"row": step})
    checkpoints.wait()
    return checkpoints


def data_file(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_round_trip(tmp_path, state):
    data = {"epoch": 1, "order": [3, 1], "left": {"ids": [], "text": "ü", "none": None}}
    assert Checkpoints(tmp_path, 2).restore(abstract(state)) is None
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(7, state, data)
    checkpoints.close()
    got, got_data, step = Checkpoints(tmp_path, 2).restore(abstract(state))
    same(got, state)
    assert (got_data, step) == (data, 7)
    assert [a.sharding for a in jax.tree.leaves(got)] == [a.sharding for a in jax.tree.leaves(state)]


def test_params_alone_come_back_as_numpy(tmp_path, state):
    saved(tmp_path, state)
    got, step = restore_params(tmp_path, abstract(state).params)
    assert step == 2 and all(type(a) is np.ndarray for a in jax.tree.leaves(got))
    same(got, at(state, 2).params)


def test_a_save_is_finished_without_being_waited_for(tmp_path, state):
    Checkpoints(tmp_path, 2).save(1, state, {})
    checkpoints = Checkpoints(tmp_path, 2)
    for _ in range(200):
        if checkpoints.steps():
            break
        time.sleep(0.05)
    same(checkpoints.restore(abstract(state))[0], state)


def test_the_last_and_the_best_are_kept(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, 2)
    for step, metric in enumerate([float("nan"), 3.0, 1.0, 2.0, None, 1.5], start=1):
        checkpoints.save(step, state, {}, metric)
    checkpoints.wait()
    assert checkpoints.steps() == [3, 5, 6]
    again = Checkpoints(tmp_path, 1)
    again.save(7, state, {}, 0.5)  # the best of a run that was resumed
    again.wait()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["7"]


def test_a_step_is_written_once(tmp_path, state):
    checkpoints = saved(tmp_path, state)
    before = (tmp_path / "checkpoints/2/_CHECKPOINT_METADATA").stat()
    checkpoints.save(2, at(state, 2), {"row": 2})
    checkpoints.wait()
    assert (tmp_path / "checkpoints/2/_CHECKPOINT_METADATA").stat() == before


def test_donated_arrays_are_saved_as_they_were(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    state = step({"a": jnp.zeros((1 << 22,)), "b": jnp.zeros((3, 1 << 20))})
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = step(state)
    checkpoints.wait()
    got = Checkpoints(tmp_path, 2).restore(abstract(state))[0]
    assert all(bool((a == 1).all()) for a in jax.tree.leaves(got))


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def nothing_but_zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


DAMAGE = {
    "data cut short": lambda d: cut(data_file(d / "state")),
    "data gone": lambda d: data_file(d / "state").unlink(),
    "metadata gone": lambda d: (d / "state/_METADATA").unlink(),
    "metadata garbage": lambda d: nothing_but_zeros(d / "state/_METADATA"),
    "manifest garbage": lambda d: nothing_but_zeros(d / "state/manifest.ocdbt"),
    "data state garbage": lambda d: nothing_but_zeros(d / "data/data.json"),
    "list garbage": lambda d: nothing_but_zeros(d / "files.json"),
    "not committed": lambda d: (d / "commit_success.txt").unlink(),
    "empty": lambda d: [shutil.rmtree(d), d.mkdir()],
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_its_step_saved_again(tmp_path, state, damage, capfd):
    saved(tmp_path, state)
    DAMAGE[damage](tmp_path / "checkpoints/2")
    assert restore_params(tmp_path, abstract(state).params)[1] == 1
    assert (tmp_path / "checkpoints/2").exists()
    capfd.readouterr()
    checkpoints = Checkpoints(tmp_path, 5)
    got, data, step = checkpoints.restore(abstract(state))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and f"{tmp_path}/checkpoints/2: skipped" in lines[0] and "2.corrupt" in lines[0]
    same(got, at(state, 1))
    assert (data, step) == ({"row": 1}, 1)
    checkpoints.save(2, at(state, 2), {"row": 2})
    checkpoints.wait()
    same(Checkpoints(tmp_path, 5).restore(abstract(state))[0], at(state, 2))
    assert (tmp_path / "checkpoints/2.corrupt").is_dir()


def test_a_killed_save_is_deleted_and_its_step_saved_again(tmp_path, state, capfd):
    saved(tmp_path, state, steps=(1,))
    half = tmp_path / "checkpoints/2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints/1", half)
    assert restore_params(tmp_path, abstract(state).params)[1] == 1
    checkpoints = Checkpoints(tmp_path, 5)
    assert checkpoints.restore(abstract(state))[2] == 1
    assert not half.exists() and f"{half}: a half-written checkpoint" in capfd.readouterr().err
    checkpoints.save(2, at(state, 2), {})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


def test_without_a_usable_checkpoint(tmp_path, state):
    saved(tmp_path, state, steps=(1,))
    cut(data_file(tmp_path / "checkpoints/1/state"))
    with pytest.raises(InputError, match="no usable checkpoint"):
        restore_params(tmp_path, abstract(state).params)
    assert Checkpoints(tmp_path, 5).restore(abstract(state)) is None


def changed(tree, name, value):
    return tree.replace(params=tree.params.replace(**{name: value}))


def test_another_shape_is_refused_by_name(tmp_path, state):
    saved(tmp_path, state)
    spec = abstract(state)
    mu = spec.opt_state[0].mu.replace(embed=jax.ShapeDtypeStruct((61, 16), jnp.float32))
    wider = spec.replace(opt_state=(spec.opt_state[0]._replace(mu=mu), *spec.opt_state[1:]))
    cases = {
        r"opt_state.0.mu.embed is float32\[61, 32\] in .* asks for float32\[61, 16\]": wider,
        r"params.unembed is missing in .* asks for float32\[61, 32\]": changed(spec, "unembed", spec.params.embed),
        r"params.embed is float32\[61, 32\] in .* asks for no such tensor": changed(spec, "embed", None),
        r"step is int32\[\] in .* asks for float32\[\]": spec.replace(step=jax.ShapeDtypeStruct((), jnp.float32)),
    }
    for message, other in cases.items():
        with pytest.raises(InputError, match=message):
            Checkpoints(tmp_path, 5).restore(other)
    with pytest.raises(InputError, match=r"params.embed is \[61, 32\] in .* asks for \[61, 8\]"):
        restore_params(tmp_path, spec.params.replace(embed=jax.ShapeDtypeStruct((61, 8), jnp.float32)))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]  # nothing was called corrupt


@pytest.mark.parametrize("at_the_next", ["save", "wait", "close"])
def test_a_disk_that_fills_during_a_save(tmp_path, state, request, at_the_next, capfd, caplog):
    checkpoints = saved(tmp_path, state)
    request.getfixturevalue("full_disk")
    checkpoints.save(3, at(state, 3), {})
    with pytest.raises(InputError, match="checkpoints/3: the checkpoint could not be written .*File too large") as e:
        checkpoints.save(4, state, {}) if at_the_next == "save" else getattr(checkpoints, at_the_next)()
    assert "\n" not in str(e.value)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "checkpoints/3" in lines[0]  # that what was written of it is deleted
    assert not caplog.records  # nothing of orbax
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]
    got, _, step = Checkpoints(tmp_path, 5).restore(abstract(state))
    assert step == 2
    same(got, at(state, 2))


@pytest.mark.parametrize("error", [errno.ENOTEMPTY, errno.ENOENT, None])
def test_a_half_written_checkpoint_that_is_still_written_to(tmp_path, state, monkeypatch, error):
    half = tmp_path / "checkpoints/3.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    really, writes = shutil.rmtree, [error] * 3

    def rmtree(path):
        error = writes.pop() if writes else 0
        if error:
            raise OSError(error, os.strerror(error))
        really(path)
        if error is None:  # a file that is written only now
            half.mkdir()

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    Checkpoints(tmp_path, 5).restore(abstract(state))
    assert not half.exists() and not writes


def test_a_run_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for make in (lambda d: Checkpoints(d, 1), MetricsLog, lambda d: write_run_files(d, "", {}, tokenizer_of(3))):
        with pytest.raises(InputError, match="file.*cannot be written"):
            make(tmp_path / "file" / "run")


def tokenizer_of(size):
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t1", chat_template="{{ messages }}")


def test_run_files(tmp_path, tiny):
    run = tmp_path / "a" / "run"
    assert not is_run(run) and not is_run(GOLDENS / "tiny_mha")
    write_run_files(run, "train:\n  steps: 3\n", hf_config(tiny[0], [1]), tokenizer_of(61))
    assert is_run(run) and hf.read_config(run) == tiny[0] and hf.stop_ids(run) == {1}
    tok, stops = tokenizer.from_folder(run)
    assert (len(tok), stops, tok.chat_template) == (61, {1}, "{{ messages }}")
    assert not [name for name in os.listdir(run) if name.endswith(".tmp")]


def test_tokenizer_files_are_for_transformers_4_too(tmp_path, tiny):
    """With 4.57.6 AutoTokenizer refuses the class TokenizersBackend, and a list of extra_special_tokens; it reads these
    fields, and version 5 does too."""
    words = tokenizer_of(61)
    words.add_special_tokens({"additional_special_tokens": ["t2", "t3"]})
    export_hf(tmp_path / "out", tiny[0], tiny[1], words, {1})
    read, _ = tokenizer.from_folder(tmp_path / "out")  # which notes where it came from
    write_run_files(tmp_path / "run", "", hf_config(tiny[0], [1]), read)
    for folder in (tmp_path / "out", tmp_path / "run"):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert settings["additional_special_tokens"] == ["t2", "t3"]
        assert not settings.keys() & {"backend", "is_local", "local_files_only", "extra_special_tokens"}
        again = AutoTokenizer.from_pretrained(folder)
        assert again.decode([2, 4, 3], skip_special_tokens=True) == "t4" and again.chat_template == "{{ messages }}"


LLAMA3 = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=2.0, original_max_position=64)
SHAPES = {
    "untied llama3 head_dim": dict(head_dim=16, rope_scaling=LLAMA3, rope_theta=5e5, norm_eps=1e-6),
    "linear": dict(rope_scaling=RopeScaling(kind="linear", factor=4.0), kv_heads=4),
}


def exported(tmp_path, tiny, name, **kwargs):
    cfg = tiny[0] if name == "tied" else dataclasses.replace(tiny[0], tie_embeddings=False, **SHAPES[name])
    noisy = lambda a: a + 0.1 * jax.random.normal(jax.random.key(3), a.shape)
    params = jax.jit(lambda key: jax.tree.map(noisy, init(key, cfg)))(jax.random.key(2))
    form = stack(params) if kwargs.pop("stacked", False) else params
    export_hf(tmp_path / "out", cfg, form, tokenizer_of(61), {1, 5}, **kwargs)
    return cfg, params


@pytest.mark.parametrize("name", ["tied", *SHAPES])
@pytest.mark.parametrize("stacked", [True, False])
def test_an_export_loads_as_what_it_was(tmp_path, tiny, name, stacked):
    cfg, params = exported(tmp_path, tiny, name, stacked=stacked)
    lm = load(tmp_path / "out")
    assert (lm.cfg, lm.stop_ids) == (cfg, (1, 5))
    same(lm.params, params)
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].shape == (32,)
    assert os.listdir(tmp_path) == ["out"]


def test_a_sharded_export(tmp_path, tiny):
    cfg, params = exported(tmp_path, tiny, "tied", max_shard_bytes=20_000)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 2 and all(f.stat().st_size < 22_000 for f in files)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in jax.tree.leaves(params))
    assert {name: f.name for f in files for name in load_file(f)} == index["weight_map"]
    same(load(tmp_path / "out").params, params)


def test_a_bfloat16_export(tmp_path, tiny):
    cfg, params = exported(tmp_path, tiny, "tied", dtype="bfloat16")
    same(load(tmp_path / "out", dtype=jnp.bfloat16).params, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params))


def test_rope_is_written_for_old_and_new_transformers(tiny):
    for scaling in (None, LLAMA3, SHAPES["linear"]["rope_scaling"]):
        cfg = dataclasses.replace(tiny[0], rope_scaling=scaling, rope_theta=1e6)
        for other in ("rope_parameters", "rope_scaling"):
            written = hf_config(cfg)
            del written[other]
            assert config_from_hf(written) == cfg


def test_where_an_export_may_go(tmp_path, tiny):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    check_export_dir(tmp_path / "empty")
    check_export_dir(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    exported(tmp_path, tiny, "tied")
    cfg, params = exported(tmp_path, tiny, "linear")  # in place of the other
    same(load(tmp_path / "out").params, params)
    (tmp_path / "out" / "NOTES.md").write_text("mine")
    with pytest.raises(InputError, match="NOTES.md in it is not of an earlier export"):
        exported(tmp_path, tiny, "tied")
    (tmp_path / "out" / "NOTES.md").unlink()
    cases = {
        "gs://bucket/x": "not a local path",
        tmp_path / "file": "a file",
        tmp_path / "file" / "x": "cannot be written",
        "/proc/x": "cannot be written",
        GOLDENS / "tiny_mha": "a directory with other files in it",  # somebody else's checkpoint stays
    }
    for directory, why in cases.items():
        with pytest.raises(InputError, match=f"directory {directory}: .*{why}"):
            export_hf(directory, cfg, params, tokenizer_of(61), [1])


def test_two_exports_to_one_directory_do_not_meet(tmp_path, tiny):
    mine, left = tmp_path / f".out.{os.getppid()}.partial", tmp_path / ".out.4194305.partial"  # no such process
    mine.mkdir(), left.mkdir()
    cfg, params = exported(tmp_path, tiny, "tied")
    assert sorted(os.listdir(tmp_path)) == [mine.name, "out"]
    same(load(tmp_path / "out").params, params)


def test_a_copy_from_a_store_is_removed_at_the_end(tmp_path, monkeypatch):
    at_exit = []
    monkeypatch.setattr(files.atexit, "register", lambda f, *args, **more: at_exit.append(lambda: f(*args, **more)))
    monkeypatch.setattr(files, "is_remote", lambda path: True)
    (tmp_path / "config.json").write_text("{}")
    copy = files.local_files(tmp_path)
    assert copy != tmp_path and (copy / "config.json").read_text() == "{}"
    at_exit[0]()
    assert not copy.exists()


def test_an_export_to_a_full_disk_leaves_the_earlier_one(tmp_path, tiny, request):
    cfg, params = exported(tmp_path, tiny, "tied")
    request.getfixturevalue("full_disk")
    with pytest.raises(InputError, match="out: cannot be written .File too large"):
        exported(tmp_path, tiny, "linear")
    assert os.listdir(tmp_path) == ["out"]
    same(load(tmp_path / "out").params, params)
