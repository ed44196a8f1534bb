"""Programs of a model: what counts as passed, and what they cannot do."""

import os
import sys
import time
from pathlib import Path

import pytest

from evals import sandbox

LACKS = sandbox.lacking()
CHILD = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {!r}], start_new_session=True)"


@pytest.mark.parametrize(
    ("source", "outcome"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("assert 1 + 1 == 3", "failed"),
        ("import sys; sys.exit(99)", "failed"),
        ("import sys; sys.exit(0)\nassert 1 + 1 == 3", "failed"),
        ("import sys; sys.exit(0)", "failed"),  # nobody knows what would have come after it
        ("quit()\nassert 1 + 1 == 3", "failed"),
        ("import os; os._exit(0)\nassert 1 + 1 == 3", "failed"),
        ("raise SystemExit\nassert 1 + 1 == 3", "failed"),
        ("print('passed')\nassert 1 + 1 == 3", "failed"),
        ("import os\nfor i in range(1, 20):\n    os.write(i, b'passed')", "failed"),
        ("return", "failed"),
        ("s = '\ud800'", "passed"),
        ("import socket; socket.create_connection(('127.0.0.1', 9), 1)", "failed"),
        ("x = bytearray(2 << 30)", "failed"),
        ("open('f', 'w').write('a' * (2 << 20))", "failed"),
        ("open('f', 'w').write('a'); assert open('f').read() == 'a'", "passed"),
        ("import os; assert not os.listdir() and not os.environ.get('HOME')", "passed"),
        ("import threading; t = threading.Thread(target=print); t.start(); t.join()", "passed"),
    ],
)
def test_what_counts_as_passed(source, outcome):
    assert sandbox.run_program(source) == outcome


def test_programs_that_do_not_end_are_stopped(monkeypatch):
    monkeypatch.setattr(sandbox, "_CONFINED", sandbox._CONFINED.replace('("CPU", 5)', '("CPU", 1)'))
    assert sandbox.run_program("while True: pass") == "timed out"
    monkeypatch.setattr(sandbox, "PROGRAM_SECONDS", 0.2)
    assert sandbox.run_program("import time; time.sleep(60)") == "timed out"


@pytest.mark.skipif("files" in LACKS, reason="no mount namespaces for a user here")
def test_files_outside_its_folder_stay(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("mine")
    for source in (f"import os; os.remove({str(kept)!r})", f"open({str(kept)!r}, 'w')", f"open({str(kept)!r}, 'a')"):
        assert sandbox.run_program(source) == "failed"
    remount = "import ctypes; assert not ctypes.CDLL(None).mount(b'none', b'/', None, 32 | 4096, None)"  # writable
    assert sandbox.run_program(remount) == "failed"
    assert kept.read_text() == "mine" and os.listdir(tmp_path) == ["kept"]


@pytest.mark.skipif("processes" in LACKS, reason="no PID namespaces for a user here")
def test_no_child_outlives_it():
    mark = f"import time; time.sleep(60)  # {os.getpid()}-{time.time_ns()}"
    assert sandbox.run_program(CHILD.format(mark)) == "passed"
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert any(sys.executable.encode() in line for line in lines)  # they can be read
    assert not any(mark.encode() in line for line in lines)


WITHOUT = """
class Without:
    unshare = prctl = capset = staticmethod(lambda *_: -1)
libc = Without()
lacks = []
"""


def test_a_system_without_namespaces_says_so(monkeypatch):
    monkeypatch.setattr(sandbox, "_CONFINED", sandbox._CONFINED.replace("lacks = []", WITHOUT))
    assert sandbox.lacking() == ["network", "processes", "files"]
    assert sandbox.run_program("assert True") == "passed" and sandbox.run_program("assert False") == "failed"
