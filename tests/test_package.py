"""What a user meets first: the import, the public names, the help of every script."""

import dataclasses
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import msn_jax
from msn_jax import InputError, commands, plan, plot, records
from msn_jax.config import SECTIONS
from msn_jax.io import run_dir
from msn_jax.settings import describe

ROOT = Path(__file__).parent.parent
HEAVY = ("jax", "transformers", "datasets", "orbax", "optax", "grain", "torch")


def test_the_import_is_light():
    listing = "import sys, msn_jax; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "msn_jax" in loaded.stdout.split() and not set(HEAVY) & set(loaded.stdout.split())


def test_forward_needs_no_files():
    listing = "import sys; from msn_jax import forward, add_noise; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "jax" in loaded.stdout.split() and not {"transformers", "datasets", "orbax", "torch"} & set(
        loaded.stdout.split()
    )


def test_public_names():
    for name in msn_jax.__all__:
        module = getattr(msn_jax, name).__module__
        assert module == msn_jax._HOME[name], name
    assert set(msn_jax.__all__) == set(msn_jax._HOME)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = msn_jax.nothing


ROOMS = "msn_jax", "benchmarks", "evals", "experiments"
SCRIPTS = [path for room in ROOMS[1:] for path in sorted((ROOT / room).glob("*.py"))]


@pytest.mark.parametrize("path", [path for path in SCRIPTS if "def main" in path.read_text()], ids=lambda p: p.stem)
def test_help_says_what_a_script_does_and_writes_nothing(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    if path.stem == "lm_eval_model":
        pytest.importorskip("lm_eval")
    script = importlib.import_module(f"{path.parent.name}.{path.stem}")
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    assert " ".join(script.__doc__.split("\n")[0].split()) in " ".join(capsys.readouterr().out.split())


def test_help_of_training_explains_every_setting(monkeypatch, capsys):
    train = importlib.import_module("train")
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "<class" not in text and "MSN_JAX_CACHE=off" in text
    for section, kind in SECTIONS.items():
        for field in dataclasses.fields(kind):
            assert f"--{section}.{field.name}" in text and describe(field) in text, field.name
    assert "noise.kind KIND ahead: tokens before it in its example" in text and "[ahead, random, none]" in text


def test_help_of_the_benchmark_shows_what_a_method_may_be(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["spec_bench.py", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.spec_bench").main()
    assert "METHOD[:TREE][@BATCH]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["decode", "train"])
def test_installed_commands_are_the_scripts(name, monkeypatch, capsys):
    for part in ("_log_to_stderr", "use_compile_cache"):  # they would stay for the tests that follow in this process
        monkeypatch.setattr(f"msn_jax.terminal.{part}", lambda: None)
    monkeypatch.setattr("sys.argv", [f"msn-{name}", "--help"])
    with pytest.raises(SystemExit) as ended:
        getattr(commands, name)()
    assert ended.value.code == 0 and f"usage: msn-{name}" in capsys.readouterr().out


def test_a_wheel_has_the_scripts_where_the_commands_look():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {f"{name}.py": f"msn_jax/scripts/{name}.py" for name in ("decode", "train")}
    assert settings["project"]["scripts"] == {f"msn-{n}": f"msn_jax.commands:{n}" for n in ("decode", "train")}


def test_a_hint_names_an_extra_that_there_is():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    files = [ROOT / "README.md", *ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    hinted = {name for file in files for name in re.findall(r"pip install -e '\.\[(\w+)\]'", file.read_text("utf-8"))}
    assert {"plots", "tpu", "eval"} <= hinted <= extras.keys()


def test_a_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^--plot needs matplotlib; pip install -e '\.\[plots\]' in the checkout$"):
        plot.check_plot(str(tmp_path))


def test_a_slice_without_libtpu(monkeypatch):
    def refuses(platform, topology_name):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.\nSee the guide.")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuses)
    with pytest.raises(InputError) as refused:
        plan.topology_devices("v5e:2x4")
    assert str(refused.value) == (
        "--topology v5e:2x4: cannot compile for it (JAX TPU support not installed; cannot generate TPU topology.) "
        "in the checkout: pip install -e '.[tpu]'"
    )
    with pytest.raises(InputError, match="accepted: v4, v5e, v5p, v6e and a shape"):
        plan.topology_devices("h100")


def test_the_harness_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "evals.lm_eval_model", raising=False)
    with pytest.raises(SystemExit, match=r"^lm_eval_model.py: error: .*; pip install -e '\.\[eval\]' brings lm-eval$"):
        importlib.import_module("evals.lm_eval_model")


def test_a_store_without_its_file_system(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"^gs://bucket/run: .*gcsfs.*; for gs:// pip install 'etils\[epath-gcs\]'$"):
        run_dir.is_run("gs://bucket/run")


def test_the_readme_lists_every_file_of_the_package():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| file | what it holds |") : text.index("Shapes, in docstrings")]
    named = set()
    for row in table.strip().splitlines()[2:]:
        _, where, about, _ = row.split("|")
        first, *others = re.findall(r"`([^`]+)`", where)
        folder = ROOT / first if first.endswith("/") else (ROOT / first).parent
        others += re.findall(r"`(\w+\.(?:py|sh|md))`", about) if first.endswith("/") else []
        named |= {ROOT / first, *(folder / name for name in others)}
    assert sorted(path for path in named if not path.exists()) == []
    files = {path for path in (ROOT / "msn_jax").rglob("*.py") if path.name != "__init__.py"}
    assert sorted(files - named) == []


def test_a_flag_lists_names_that_are_known():
    assert records.listed("--dtypes", "int8,float32", ("float32", "int8")) == ["int8", "float32"]
    with pytest.raises(InputError, match="^--dtypes int4,: accepted: float32, int8$"):
        records.listed("--dtypes", "int4,int8,", ("float32", "int8"))
