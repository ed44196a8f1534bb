"""Runs a program that a model wrote, apart from this one.

The program gets an empty folder in memory, no environment, one CPU for PROGRAM_SECONDS, 1 GiB of memory a process,
and, where Linux gives namespaces to a user:

- no network;
- no file to write but in its folder: all else is mounted read-only;
- no process that outlives it, whatever session it is in: the first process of a PID namespace takes the rest with it.

What is not covered: it can read what the user can read, talk to sockets in the file system, and use faults of the
kernel. A program that means harm is for a virtual machine; this is for programs that go wrong.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time

PROGRAM_SECONDS = 5

# It gives up what it can before the first line of the program, and says on descriptor 3 what it could not. Numbers
# are those of linux/sched.h, linux/mount.h, linux/capability.h and of the system call mount_setattr.
_CONFINED = f"""
import ctypes, os, resource, signal, struct, sys
libc, said = ctypes.CDLL(None), int(sys.argv[1])
lacks = []
user, group = os.getuid(), os.getgid()
if libc.unshare(0x10000000 | 0x40000000 | 0x08000000):  # CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC
    lacks.append("network")
else:  # a user that the namespace knows: no other can make files in its folder
    for name, text in ("setgroups", "deny"), ("uid_map", f"{{user}} {{user}} 1"), ("gid_map", f"{{group}} {{group}} 1"):
        with open("/proc/self/" + name, "w") as file:
            file.write(text)
if libc.unshare(0x20000000):  # CLONE_NEWPID: of the children
    lacks.append("processes")
readonly = struct.pack("QQQQ", 1, 0, 1 << 18, 0)  # MOUNT_ATTR_RDONLY; private
if (
    libc.unshare(0x00020000)  # CLONE_NEWNS
    or libc.syscall(442, -100, b"/", 0x8000, readonly, len(readonly))  # mount_setattr, AT_RECURSIVE
    or libc.mount(b"none", os.getcwd().encode(), b"tmpfs", 6, b"size=16m")  # MS_NOSUID, MS_NODEV
):
    lacks.append("files")
os.chdir(os.getcwd())
child = os.fork()
if child:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)
libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
for what, most in [("CPU", {PROGRAM_SECONDS}), ("AS", 1 << 30), ("FSIZE", 1 << 20), ("CORE", 0), ("NOFILE", 64)]:
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
os.write(said, ",".join(lacks).encode() + b"\\n")
program, nonce = sys.stdin.read().split("\\0")
exec(compile(program, "program", "exec"), {{"__name__": "__main__"}})
os.write(said, nonce.encode())
os._exit(0)
"""


def run_program(source: str) -> str:
    """Run a Python program; "passed", or why not: "failed", "timed out".

    It has passed when its last line was reached: neither an exception nor `sys.exit` came before.
    """
    return _run(source)[0]


def lacking() -> list[str]:
    """What this system does not keep a program from: some of network, processes, files."""
    return _run("")[1]


def _run(source: str) -> tuple[str, list[str]]:
    nonce = secrets.token_hex(16)
    hears, says = os.pipe()
    with tempfile.TemporaryDirectory() as folder, os.fdopen(hears, "rb") as heard:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CONFINED, str(says)],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(says,),
            start_new_session=True,
        )
        os.close(says)
        code = None
        try:
            process.stdin.write(f"{source}\0{nonce}".encode("utf-8", "replace"))
            process.stdin.close()
            code = process.wait(timeout=3 * PROGRAM_SECONDS)
        except BrokenPipeError:
            pass
        except subprocess.TimeoutExpired:
            pass
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
            except ProcessLookupError:
                pass
            process.wait()
        said = _available(heard)
    lacks, _, proof = said.partition(b"\n")
    lacks = [name for name in lacks.decode().split(",") if name]
    if proof == nonce.encode():
        return "passed", lacks
    return ("timed out" if code in (None, -signal.SIGXCPU, -signal.SIGKILL) else "failed"), lacks


def _available(pipe) -> bytes:
    """What stands in a pipe. A process that outlived its parent may hold the other end: nobody waits for it."""
    os.set_blocking(pipe.fileno(), False)
    said, end = b"", time.monotonic() + 1
    while time.monotonic() < end and select.select([pipe], [], [], 0)[0]:
        part = pipe.read()
        if not part:
            break
        said += part
    return said
