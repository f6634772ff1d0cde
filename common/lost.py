"""One of the processes of a training ends or hangs: which one it was, and what those that are left say of it.

What a collective tells them is that a connection was closed, or that time has run out. The rest they learn from each
other, through the store at which the processes have met: who fails leaves word before it ends, and those that notice
hold a roll call.
"""

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import TypeVar

import torch.distributed as distributed

from common.errors import UserError

T = TypeVar("T")
ROLL_CALL = 5.0  # seconds in which those that are left answer: a time-out reaches all of them at nearly the same time

# How gloo (torch 2.6 to 2.15) and NCCL say that another process is gone. gloo's "enforce fail at" is a defect of ours.
_GONE = re.compile(
    r"\[\S*gloo/transport/\S+:\d+\] (?:Connection closed by peer|Read (?:error|timeout)|Write timeout|writev"
    r"|Socket (?:unexpectedly )?closed|Timed out waiting)"
    r"|Application timeout caused pair closure|Gloo connectFullMesh failed"
    r"|ncclRemoteError|NCCL communicator was aborted|Watchdog caught collective operation timeout"
)
_TIME_OUT = re.compile(r"Timed out waiting|wait timeout|Application timeout|collective operation timeout")


class ProcessLost(UserError):
    """Another process has ended or does not answer; `first`: of those that have noticed, this one says so first."""

    def __init__(self, sentence: str, first: bool) -> None:
        super().__init__(sentence)
        self.first = first


def is_loss(error: BaseException) -> bool:
    """Whether `error` is how a collective fails because of another process."""
    unreachable = isinstance(error, distributed.DistNetworkError | distributed.DistStoreError)
    return unreachable or (isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None)


@dataclass(frozen=True)
class RollCall:
    """One process's part in finding out who is missing. `store` belongs to the processes of this start alone."""

    store: distributed.Store
    rank: int
    size: int
    timeout_s: float  # how long a collective waits

    def leave_word(self, reason: str) -> None:
        """Tells the others why this process ends, before it does."""
        self._ask(lambda: self.store.set(f"failed/{self.rank}", reason))

    def explain(self, error: BaseException, place: str) -> ProcessLost:
        """What there is to say of `error`, for which `is_loss` holds; `place`: where it was met, as " after step 3"."""
        waited = _TIME_OUT.search(str(error)) is not None
        answers = self._ask(lambda: self._call(waited))
        if answers is None:  # who keeps the store is missing: process 0, or its launcher
            kept_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            keeper = "the launcher of process 0" if kept_by_launcher else "process 0"
            return ProcessLost(self._sentence(keeper, waited, place), first=self.rank == 1 - kept_by_launcher)
        here, failed = answers
        if self.rank == 0 and self.size > 2:
            time.sleep(1)  # the store may live in this process, and the others have not all read in it
        missing = [rank for rank in range(self.size) if rank not in here and rank not in failed]
        if failed:
            rank, reason = min(failed.items())
            sentence = f"process {self.rank} stops{place} because process {rank} failed: {reason}"
        else:
            names = f"process{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing))}" if missing else ""
            sentence = self._sentence(names, waited or any(here.values()), place)
        return ProcessLost(sentence, first=not failed and self.rank == min(here))  # who failed says so itself

    def _call(self, waited: bool) -> tuple[dict[int, bool], dict[int, str]]:
        """Of each process that is here, whether its time has run out; of each that has left word, its reason."""
        self.store.set(f"here/{self.rank}", "waited" if waited else "noticed")
        deadline = time.monotonic() + ROLL_CALL
        while True:
            failed = self._read("failed")
            here = {rank: word == "waited" for rank, word in self._read("here").items() if rank not in failed}
            if len(here) + len(failed) >= self.size - 1 + bool(failed) or time.monotonic() > deadline:
                return here, failed
            time.sleep(0.05)

    def _read(self, kind: str) -> dict[int, str]:
        keys = {rank: f"{kind}/{rank}" for rank in range(self.size)}
        return {rank: self.store.get(key).decode() for rank, key in keys.items() if self.store.check([key])}

    def _ask(self, question: Callable[[], T]) -> T | None:
        """The store's answer; none where it gives none in time or its host has ended. It can block for good."""
        answers: list[T] = []

        def ask() -> None:
            with suppress(distributed.DistError):
                answers.append(question())

        thread = Thread(target=ask, daemon=True)
        thread.start()
        thread.join(2 * ROLL_CALL)
        return answers[0] if answers else None

    def _sentence(self, missing: str, waited: bool, place: str) -> str:
        me, wait = f"process {self.rank}", f"{self.timeout_s:g} s of --dist-timeout"
        if missing and waited:
            return f"no answer from {missing}{place} within the {wait}: it hangs, or needs longer ({me} says so)"
        if missing:
            several = "one of the " if "," in missing else ""
            return f"{me} lost {several}{missing}{place}: it was killed or has crashed, its launcher says how"
        why = f"had waited the {wait} for it" if waited else "are there: check the network"
        return f"{me} lost its connection to the others{place}, which {why}"
