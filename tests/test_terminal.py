"""decode.py in a shell: pipes, encodings, closed streams, the compile cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture
def shell(tiny_ckpt, tmp_path):
    """Run a line of bash in which $DECODE is decode.py with a tiny checkpoint, and the method that compiles soonest."""

    def call(line, **env):
        decode = f"{sys.executable} {ROOT}/decode.py --ckpt {tiny_ckpt} --max_new_tokens 8 --method ar"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "DECODE": decode} | env
        return subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True)

    return call


def test_a_reader_that_goes_away(shell, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "abqc"}\n' * 40)
    done = shell("$DECODE --prompts in.jsonl | head -1; echo ${PIPESTATUS[0]}")
    assert done.stdout.splitlines() == ["--- 0", "141"]
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_rows_through_pipes(shell):
    done = shell("""printf '{"prompt": "ab"}\\n{"prompt": "qc", "id": "x"}\\n' | $DECODE --prompts - --out - 2>err""")
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [0, "x"], done
    # Text for people goes elsewhere.
    done = shell("$DECODE --method tr-jacobi --prompt ab --compare --out /dev/stdout")
    assert len(done.stdout.splitlines()) == 1 and json.loads(done.stdout)["method"] == "tr-jacobi"
    assert "tokens identical: yes" in done.stderr


def test_encodings_lose_nothing(shell, tmp_path):
    prompt = '{"prompt": "a", "id": "\\u2713 \\u96ea"}\n'
    (tmp_path / "in.jsonl").write_text(prompt * 2)
    for encoding in ("ascii", "cp1252"):
        done = shell("$DECODE --prompts in.jsonl; echo $?", PYTHONIOENCODING=encoding)
        assert done.stdout.count("--- \\u2713 \\u96ea\n") == 2 and done.stdout.endswith("0\n"), done
    done = shell("$DECODE --prompts in.jsonl --out -", PYTHONIOENCODING="ascii")
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ["✓ 雪"] * 2


def test_closed_streams(shell, tmp_path):
    done = shell("$DECODE --prompt ab --out rows >&- 2>&-")
    assert done.returncode == 0 and len((tmp_path / "rows").read_text().splitlines()) == 1
    done = shell("$DECODE --prompt ab --out - 2>&-")
    assert json.loads(done.stdout)["id"] == 0
    done = shell("$DECODE --prompt ab >&-")
    assert done.returncode == 1 and "stdout is closed; accepted with it: --out FILE" in done.stderr
    done = shell("$DECODE --prompt ab > /dev/full")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        "decode.py: error: cannot write (No space left on device)"
    )
    done = shell("COLUMNS=3 $DECODE --method tr-jacobi --prompt ab --compare")
    assert "tokens identical: yes" in done.stdout


def test_what_is_compiled_is_kept_where_it_is_wanted(shell, tmp_path):
    line = "env -u JAX_COMPILATION_CACHE_DIR -u JAX_COMPILATION_CACHE_MAX_SIZE "
    line += "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 $DECODE --prompt abqc"  # or a fast machine keeps nothing
    done = shell(line, XDG_CACHE_HOME=str(tmp_path / "cache"))
    kept = lambda: [p for p in (tmp_path / "cache" / "msn_jax" / "xla").glob("*-cache")]
    assert done.returncode == 0 and kept(), done
    again = shell(line, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert again.stdout == done.stdout and "compiling" in again.stderr
    assert "loading" in done.stderr and len(done.stderr.splitlines()) == 4, (
        done.stderr
    )  # and what computes, and the figures
    shell(line, XDG_CACHE_HOME=str(tmp_path / "other"), MSN_JAX_CACHE="off")
    shell("$DECODE --prompt abqc", XDG_CACHE_HOME=str(tmp_path / "other"))  # a folder of the user's own
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").write_text("")
    assert shell(line, XDG_CACHE_HOME=str(tmp_path / "file")).returncode == 0  # nowhere to keep it


def test_a_platform_that_is_not_there_is_one_line(shell):
    done = shell("$DECODE --prompt ab", JAX_PLATFORMS="foo")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "decode.py: error: JAX_PLATFORMS=foo: jax finds no such device here"
