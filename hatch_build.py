"""Compile msn_jax/kernels while a wheel is built. Where that fails the wheel has none, and XLA's forms run."""

import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        path = Path(self.root, "msn_jax", "kernels", "build.py")
        spec = importlib.util.spec_from_file_location("kernels_build", path)
        build = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(build)
            libraries = build.build()
        except (ImportError, OSError, subprocess.CalledProcessError) as e:
            said = (getattr(e, "stderr", None) or str(e)).strip().splitlines()
            self.app.display_warning(f"the C++ kernels are not built: {said[0] if said else type(e).__name__}")
            return
        build_data["artifacts"] += [f"msn_jax/kernels/{library.name}" for library in libraries]
        build_data["pure_python"] = False
        # The libraries are for any Python.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
