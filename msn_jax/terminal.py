"""A command line's surroundings: standard streams of any kind, lines on stderr, the compile cache, how it ends."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from msn_jax.errors import InputError

BROKEN_PIPE = 141  # what a shell reports of a program that wrote to a reader that went away
CACHE_HELP = (
    "What is compiled is kept in ~/.cache/msn_jax/xla for the next start (or under XDG_CACHE_HOME); "
    "JAX_COMPILATION_CACHE_DIR names another folder, MSN_JAX_CACHE=off keeps nothing."
)


def run_command(main: Callable[[], None]) -> None:
    """Run the `main` of a command line.

    An InputError becomes one line on stderr and exit status 1, Ctrl-C 130, a reader of stdout that went away 141.
    """
    program = Path(sys.argv[0]).name
    _mend_streams()
    _log_to_stderr()
    use_compile_cache()
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except InputError as e:
        sys.exit(f"{program}: error: {e}")
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes stdout once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"{program}: error: cannot write ({e.strerror})")
    except (RuntimeError, AssertionError):
        if _has_devices():
            raise
        platforms = os.environ.get("JAX_PLATFORMS", "")
        sys.exit(f"{program}: error: JAX_PLATFORMS={platforms}: jax finds no such device here")


def _has_devices() -> bool:
    """Whether jax has a backend; it raises RuntimeError for a name that it does not know, AssertionError for none."""
    import jax

    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False


def _mend_streams() -> None:
    """Let no text fail for the encoding of a stream, nor for a stderr that is closed."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Lines(logging.Handler):
    """Lines on stderr that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(record.getMessage(), file=sys.stderr)


def _log_to_stderr() -> None:
    logger = logging.getLogger("msn_jax")
    logger.addHandler(_Lines())
    logger.setLevel(logging.INFO)
    logger.propagate = False


def use_compile_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless the environment says otherwise (see CACHE_HELP)."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or os.environ.get("MSN_JAX_CACHE", "").lower() in ("off", "0"):
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msn_jax" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        return
    import jax  # here, or --help would wait for it

    jax.config.update("jax_compilation_cache_dir", str(folder))
    # With a bound jax locks the folder, so that no process meets over half an entry.
    ours = {"jax_compilation_cache_max_size": 2**31, "jax_persistent_cache_min_compile_time_secs": 0.3}
    for setting, value in ours.items():
        if setting.upper() not in os.environ:
            jax.config.update(setting, value)
