"""Runs that cannot go well: outputs that are somebody's files, weights that are not numbers, a Ctrl-C."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_train import lines

import train
from msn_jax import InputError
from msn_jax.io import run_dir
from msn_jax.io.checkpoints import Checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture
def base(config, tmp_path):
    """The export of a run of one step."""
    path = config(train={"steps": 1, "out": str(tmp_path / "first")})
    train.main(["--config", path, "--export", str(tmp_path / "base")])
    return tmp_path / "base"


def digests(folder):
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in Path(folder).rglob("*") if f.is_file()}


def on_base(config, base, **sections):
    return config(model={"scratch": None, "ckpt": str(base)}, **sections)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_train_out_that_holds_other_files_is_refused(config, base, tmp_path, rank):
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.json").write_text("{}")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text("lr: 1\n")  # of some other program
    (tmp_path / "foreign" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    why = {"used": "other files are in it", "foreign": "other files are in it", "file": "a file"}
    for where in ("base", "base/../base", "link", *why):
        path = on_base(config, base, train={"steps": 1, "out": str(tmp_path / where)}, lora={"rank": rank})
        before = digests(tmp_path)
        with pytest.raises(InputError, match=f"train.out .*{why.get(where, 'is also model.ckpt')}"):
            train.main(["--config", path])
        assert digests(tmp_path) == before


def test_a_first_start_that_was_cut_off_is_taken_up(config, tmp_path, monkeypatch):
    writes = run_dir.replace_file

    def cut_off(path, content):
        writes(path, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_dir, "replace_file", cut_off)
        train.main(["--config", config(train={"steps": 1})])
    (tmp_path / "run" / "config.json.tmp").write_text("{")
    train.main(["--config", config(train={"steps": 1})])
    assert len(lines(tmp_path / "run")) == 1


@pytest.mark.parametrize("where", ["run", ".", "base"])
def test_an_export_over_what_it_is_made_of_is_refused(config, base, tmp_path, where):
    folder = tmp_path / "new"
    if where != "base":
        path = config("new.yaml", train={"steps": 1, "out": str(folder / "run")})
        target = folder / where
    else:
        path, target = on_base(config, base, train={"steps": 1}), base
    before = digests(tmp_path)
    with pytest.raises(InputError, match="--export .*(train.out|model.ckpt) is there"):
        train.main(["--config", path, "--export", str(target)])
    assert digests(tmp_path) == before


def test_two_processes_do_not_share_a_run(config, tmp_path):
    with run_dir.held(tmp_path / "run"), pytest.raises(InputError, match="another process is training there"):
        train.main(["--config", config(train={"steps": 1})])
    train.main(["--config", config(train={"steps": 1})])
    assert len(lines(tmp_path / "run")) == 1


def spoilt(base, name="model.norm.weight"):
    """A checkpoint with one number that is none."""
    tensors = load_file(base / "model.safetensors")
    tensors[name] = np.array(tensors[name])
    tensors[name].flat[0] = np.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_no_numbers_stop_the_run(config, base, tmp_path):
    spoilt(base)
    flags = ["--config", on_base(config, base, train={"steps": 2}), "--export", str(tmp_path / "x"), "--plot"]
    for _ in range(2):  # the same command again
        with pytest.raises(InputError, match="step 1: loss is nan; no checkpoint was written before it") as e:
            train.main(flags)
        assert "\n" not in str(e.value)
        assert not (tmp_path / "x").exists() and Checkpoints(tmp_path / "run", 1).steps() == []
        assert (tmp_path / "run" / "plot.png").exists() and lines(tmp_path / "run")[0]["loss"] is None


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_the_good_checkpoints_outlive_a_loss_that_is_not_finite(config, tmp_path, monkeypatch, what):
    really = train.train_step.jit_train_step

    class Spoiling:
        """The compiled step, whose report is spoilt from step 6 on."""

        def __init__(self, *args):
            self.step_of = really(*args)

        def lower(self, *args):
            self.step_of = self.step_of.lower(*args).compile()
            return self

        def compile(self):
            return self

        def __call__(self, state, *args):
            spoils = int(state.step) >= 5
            state, report = self.step_of(state, *args)
            if spoils:
                nan = np.float32("nan")
                spoilt = {"loss": {"by_depth": report["by_depth"].at[:, 1].set(nan)}, "grad_norm": {"grad_norm": nan}}
                report = report | spoilt[what]
            return state, report

    path = config(train={"steps": 12, "save_every": 2, "keep": 2})
    with monkeypatch.context() as patch, pytest.raises(InputError, match=f"step 6: {what} is nan; .* is step 4 of"):
        patch.setattr(train.train_step, "jit_train_step", Spoiling)
        train.main(["--config", path])
    assert Checkpoints(tmp_path / "run", 1).steps() == [2, 4]
    train.main(["--config", path])
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 13))


def test_a_run_of_an_earlier_version_that_ended_in_no_number(config, tmp_path):
    path = config(train={"steps": 2})
    train.main(["--config", path])
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace(f'"loss": {lines(tmp_path / "run")[-1]["loss"]}', '"loss": null'))
    with pytest.raises(InputError, match="the loss of its last step is not finite"):
        train.main(["--config", path, "--export", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
