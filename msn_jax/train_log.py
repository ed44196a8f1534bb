"""What a training run tells: metrics.jsonl, TensorBoard, the progress bar; and how it is asked to stop."""

from __future__ import annotations

import math
import signal
import time

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tensorboardX import SummaryWriter
from tqdm import tqdm

from msn_jax import train_step
from msn_jax.config import RunConfig
from msn_jax.errors import InputError
from msn_jax.io.files import is_remote
from msn_jax.io.metrics import MetricsLog
from msn_jax.objectives.scores import metrics_of


class NotFinite(InputError):
    """A loss or a gradient that is not a finite number: the weights after it are worth nothing."""


def say(text: str) -> None:
    """Print, on the first process alone, without tearing the progress bar."""
    if jax.process_index() == 0:
        tqdm.write(text)


class TrainLog:
    """Where the numbers of each step go."""

    def __init__(self, run: RunConfig, mesh: Mesh, flops: int, start: int):
        """flops: of one step, in products with weights. start: the step that training goes on from."""
        device = mesh.devices.flat[0]
        self._mine = jax.process_index() == 0
        self._tokens = run.train.batch_size * run.data.max_tokens
        peak = train_step.peak_flops(device.device_kind, run.train.dtype)
        self._mfu_s = peak and flops / (peak * mesh.size)
        self._metrics = self._board = None
        if self._mine:
            self._metrics = MetricsLog(run.train.out)
            self._metrics.cut_back(start)
            if not is_remote(run.train.out):
                self._board = SummaryWriter(run.train.out, purge_step=start + 1)
        self._bar = tqdm(total=run.train.steps, initial=start, unit="step", disable=not self._mine)
        self._clock = time.perf_counter()

    def write(self, step: int, report: dict, evaluated: dict[str, float]) -> None:
        """A step that was taken. Waits for the device to finish it.

        Raises NotFinite, once the line is written, for a loss or a gradient that is not finite.
        """
        report = jax.device_get(report)
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        line = metrics_of(report["by_depth"])
        line |= {name: float(report[name]) for name in ("grad_norm", "learning_rate")}
        line |= {"tokens_per_s": self._tokens / seconds, **evaluated}
        if self._mfu_s:
            line["mfu"] = self._mfu_s / seconds
        if self._mine:
            self._metrics.write(step, line)
        for name, value in line.items() if self._board else ():
            self._board.add_scalar(name, value, step)
        self._bar.set_postfix(loss=f"{line['loss']:.3f}", tokens_per_s=f"{line['tokens_per_s']:.0f}")
        self._bar.update(1)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(line[name]):
                raise NotFinite(f"step {step}: {name} is {line[name]}")

    def pause(self, seconds: float) -> None:
        """Do not count this time as training."""
        self._clock += seconds

    def flush(self) -> None:
        """Put every line on the disk."""
        if self._mine:
            self._metrics.flush()

    def close(self) -> None:
        self._bar.close()
        if self._mine:
            self._metrics.close()
        if self._board:
            self._board.close()


class Stop:
    """Whether the run was asked to end: by Ctrl-C or SIGTERM, here or on any process of a pod.

    A context manager. A second Ctrl-C ends the program at once.
    """

    def __init__(self):
        self._asked, self._before = False, {}

    def __enter__(self) -> Stop:
        # All processes must save at the same step, so jax decides there; it listens to SIGTERM itself.
        if jax.process_count() == 1:
            self._before = {kind: signal.signal(kind, self._ask) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _ask(self, kind: int, _) -> None:
        self._asked = True
        if kind == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            say("stopping: this step is finished and saved first; Ctrl-C again ends at once, unsaved")

    def asked(self, step: int) -> bool:
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)
