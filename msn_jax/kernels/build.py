"""Compile the custom calls, one library for each instruction set, beside their sources.

    python -m msn_jax.kernels.build

`pip install` does it too, where there is a C++ compiler.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import jax.ffi

HERE = Path(__file__).parent
# No -ffast-math, no fused operations but those that the source asks for: see vector.h.
COMMON = ["-shared", "-fPIC", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
FLAGS: dict[str, list[str]] = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    FLAGS |= {"avx2": ["-mavx2", "-mfma"], "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"]}


@cache
def library_path(name: str) -> Path:
    """Where the library of an instruction set stands. Its name has the FFI version that it was compiled for, since
    environments with several versions of jax may share a checkout."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    version = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)[1] for part in ("MAJOR", "MINOR"))
    return HERE / f"_{name}.ffi{'_'.join(version)}.so"


def compiler() -> str | None:
    """$CXX, or the C++ compiler that is there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def compile_library(name: str, library: Path, extra: tuple[str, ...] = ("-O3",)) -> None:
    """Raises subprocess.CalledProcessError, which holds what the compiler said."""
    cxx = compiler()
    if cxx is None:
        raise FileNotFoundError("no C++ compiler")
    headers = ["-isystem", jax.ffi.include_dir()]
    command = [cxx, *COMMON, *FLAGS[name], *extra, *headers, str(HERE / "kernels.cpp"), "-o", f"{library}.partial"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    os.replace(f"{library}.partial", library)  # or a process that has the old one open would see it change


def build() -> list[Path]:
    """Compile every library. Returns their paths."""
    made = {name: library_path(name) for name in FLAGS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_library, made, made.values()))
    return list(made.values())


if __name__ == "__main__":
    try:
        print("built", *(path.name for path in build()))
    except FileNotFoundError as e:
        sys.exit(str(e))
    except subprocess.CalledProcessError as e:
        sys.exit(e.stderr)
