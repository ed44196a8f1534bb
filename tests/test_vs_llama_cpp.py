"""The parts of benchmarks/vs_llama_cpp.py that need no llama.cpp."""

import subprocess
import sys

import gguf
import numpy as np
import pytest
from test_gguf import write

from benchmarks.vs_llama_cpp import LOOKUP, PLAIN, STORED, LlamaCpp, figures, rewrite
from msn_jax import InputError
from msn_jax.io.gguf import GGUFSource


@pytest.mark.parametrize("dtype, steps", [("float32", None), ("bfloat16", 256), ("int8", 254)])
def test_a_file_keeps_all_but_the_type_of_its_matrices(tmp_path, dtype, steps):
    tokens = [("add_token_list", ["a", "b"]), ("add_bos_token_id", 1)]
    first = write(tmp_path / "first.gguf", "qwen2", gguf.GGMLQuantizationType.Q4_1, fields=tokens)
    rewrite(first, dtype, tmp_path / "second.gguf")
    first, second = GGUFSource(first), GGUFSource(tmp_path / "second.gguf")
    hidden = lambda meta: {k: v for k, v in meta.items() if not k.startswith("GGUF.") and k != "general.file_type"}
    assert hidden(second.meta) == hidden(first.meta) and second.meta["general.file_type"] == STORED[dtype][1]
    assert second.shapes == first.shapes
    for tensor in first.shapes:
        was, now = first.read(tensor), second.read(tensor)
        off = 0 if steps is None or was.ndim == 1 else 1.1 * np.abs(was).max(-1, keepdims=True) * 2 / steps
        assert (np.abs(now - was) <= off).all()


def test_what_is_missing_is_said_in_one_line(tmp_path):
    with pytest.raises(InputError, match="No such file or directory; accepted: a Python with llama-cpp-python"):
        LlamaCpp(str(tmp_path / "python"), tmp_path / "model.gguf", 64, 5, 1)
    if subprocess.run([sys.executable, "-c", "import llama_cpp"], capture_output=True).returncode:
        with pytest.raises(InputError, match="No module named 'llama_cpp'; accepted: a Python with llama-cpp-python"):
            LlamaCpp(sys.executable, tmp_path / "model.gguf", 64, 5, 1)


def test_figures_are_of_all_answers_together():
    arms = {"ar": (10, 1.0), "tr-jacobi": (10, 0.5), PLAIN: (20, 1.0), LOOKUP: (10, 0.4)}
    rows = [
        {"arm": arm, "count": count, "seconds": times * seconds, "identical": arm != LOOKUP}
        for times in (1, 3)
        for arm, (count, seconds) in arms.items()
    ]
    found = figures(rows)
    assert found["tr-jacobi"] == {
        "tokens_per_s": 10.0,
        "ratio_to_ar": 2.0,
        "ratio_to_llama_cpp": 1.0,
        "ratio_to_llama_cpp_lookup": 0.8,
        "answers": 2,
        "identical_to_ar": 2,
    }
    assert found[LOOKUP]["identical_to_ar"] == 0
