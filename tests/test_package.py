"""What a user meets first: the import, the public names, the help of every script."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import msn_jax

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


SCRIPTS = [path for room in ("benchmarks", "evals", "experiments") for path in sorted((ROOT / room).glob("*.py"))]


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
