"""The thread that steps an engine while there are requests, and tells each of them what came."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from msn_jax.config import DecodeConfig
from msn_jax.decode.engine import Engine
from msn_jax.decode.request import Request

logger = logging.getLogger("msn_jax")

# Called in the worker's thread with new ids, and why the reply ended: its finish_reason, FAILED, or None: it goes on.
Tell = Callable[[list[int], str | None], None]
FAILED = "failed"


class Busy(Exception):
    """As many requests wait as may."""


class Worker(threading.Thread):
    """Runs until `stop`; what is still asked for then is decoded to its end."""

    def __init__(self, engine: Engine, most_waiting: int):
        super().__init__(name="msn_jax engine", daemon=True)
        self.engine, self.most_waiting = engine, most_waiting
        self.tokens = self.prompt_tokens = self.passes = 0  # of all requests so far
        self._told: dict[Request, tuple[Tell, int]] = {}  # and how many ids it has had
        self._news, self._stopping = threading.Condition(), False

    def submit(self, requests: Sequence[Request], tells: Sequence[Tell]) -> None:
        """Have requests decoded. Raises Busy, or InputError where one does not fit the context; then none is."""
        with self._news:
            free = self.engine.size - self.engine.running
            if self._stopping or self.engine.waiting + len(requests) > self.most_waiting + free:
                raise Busy
            for request, tell in zip(requests, tells, strict=True):
                self.engine.submit(request)
                self._told[request] = tell, 0
                self.prompt_tokens += len(request.prompt)
            self._news.notify()

    def warm(self) -> None:
        """Compile before the first request comes."""
        done = threading.Event()
        self.submit([Request([0], DecodeConfig(max_new_tokens=1))], [lambda ids, reason: reason and done.set()])
        done.wait()

    def stop(self) -> None:
        """Take no more requests, and return when the last one is done."""
        with self._news:
            self._stopping = True
            self._news.notify()
        self.join()

    def run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._told or self._stopping)
                if not self._told:
                    return
            for request in self._step():
                self._tell(request, request.finish_reason)
            if not self._told:
                self._step()  # ends the rows of requests that were cancelled, and lets a cache go that is not kept

    def _step(self) -> list[Request]:
        with self._news:
            asked = list(self._told)
        try:
            return self.engine.step()
        except Exception:  # of the device, such as its memory: those who wait are told, and the next ones may fit
            logger.exception("the engine failed; its requests are lost")
            with self._news:
                for request in self.engine.close():
                    if request not in asked:  # it came meanwhile, and has had nothing yet
                        self.engine.submit(request)
            for request in asked:
                self._tell(request, request.finish_reason or FAILED)
            return []

    def _tell(self, request: Request, reason: str | None) -> None:
        tell, sent = self._told[request]
        new = request.tokens[sent:]
        self.tokens += len(new)
        self.passes += len(request.accepted)
        with self._news:
            if reason is None:
                self._told[request] = tell, len(request.tokens)
            else:
                del self._told[request]
        tell(new, reason)
