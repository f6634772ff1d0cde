"""The moments of a run at which it can be killed, counted from outside: calls of torch and of the operating system.

A moment is a phase and a number: the n-th module called in training ("forward") or without gradients ("evaluation"),
the n-th operation inside backward passes or optimizer steps, the n-th file opened for writing, synced or renamed. The
same command has the same moments every time.
"""

import errno
import functools
import os
import resource
import signal
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

COMPUTING = ("forward", "backward", "optimizer", "evaluation")
SAVING = ("open", "half", "fsync", "rename", "renamed")  # half: what was written is cut in two, for SIGKILL alone


class Moments:
    """Counts the moments of this process from now on, and does `act` at the `number`-th of `phase`.

    `act` is the name of a signal that the process sends itself, "memory" (that of the GPU is not enough), or what
    becomes of the disk when a file is opened for writing: "full" or "readonly".
    """

    def __init__(self, phase: str = "", number: int = 0, act: str = "") -> None:
        self.phase, self.number, self.act = phase, number, act
        self.process = os.getpid()  # data workers inherit the counters, and are not meant
        self.counts: Counter[str] = Counter()
        self.synced: list[str] = []  # files, in the order of their n-th "fsync"
        self.renamed: list[tuple[str, str]] = []  # from and to, in the order of their n-th "rename"
        self.folders: list[int] = []  # how many renames had been done at each sync of a folder
        self.opened: list[str] = []  # files, in the order of their n-th "open"
        self.broken = ""  # "full" or "readonly": what has become of the disk
        self.operations = _Operations(self)
        self._hear_modules()
        self._hear_backward()
        self._hear_optimizers()
        self._hear_files()
        if self.pass_by("start"):
            self._break()

    def counted(self) -> dict[str, Any]:
        """What is known at the end of the run; `opened`: final name of a file -> its moments of "open"."""
        final = dict(self.renamed)
        opened: dict[str, list[int]] = {}
        for number, path in enumerate(self.opened, 1):
            opened.setdefault(os.path.basename(final.get(path, path)), []).append(number)
        kept = {"counts": self.counts, "synced": self.synced, "renamed": self.renamed, "folders": self.folders}
        return {**kept, "opened": opened}

    def pass_by(self, phase: str) -> bool:
        """Counts; True where this is the moment (and the process is still there)."""
        self.counts[phase] += 1
        if (phase, self.counts[phase]) != (self.phase, self.number) or os.getpid() != self.process:
            return False
        if self.act == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.act.startswith("SIG"):
            os.kill(self.process, getattr(signal, self.act))
        return True

    def _hear_modules(self) -> None:
        def called(module: torch.nn.Module, _: Any) -> None:
            self.pass_by("forward" if module.training and torch.is_grad_enabled() else "evaluation")

        register_module_forward_pre_hook(called)

    def _hear_backward(self) -> None:
        backward = torch.autograd.backward

        @functools.wraps(backward)
        def heard(*arguments: Any, **named: Any) -> None:
            with self.operations.of("backward"):
                backward(*arguments, **named)

        torch.autograd.backward = heard

    def _hear_optimizers(self) -> None:
        def before(*_: Any) -> None:
            self.pass_by("optimizer")
            self.operations.of("optimizer").__enter__()

        def after(*_: Any) -> None:
            self.operations.__exit__(None, None, None)

        register_optimizer_step_pre_hook(before)
        register_optimizer_step_post_hook(after)

    def _hear_files(self) -> None:
        fsync, replace, main_thread = os.fsync, os.replace, threading.main_thread()
        home = os.getcwd() + os.sep

        def heard(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in ("open", "os.rename", "os.mkdir") or threading.current_thread() is not main_thread:
                return
            path = arguments[0]
            if not isinstance(path, str | bytes | os.PathLike):
                return
            if not os.path.abspath(os.fsdecode(path)).startswith(home):
                return
            if event == "open":
                if not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                    return
                self.opened.append(os.path.abspath(os.fsdecode(path)))
                if self.pass_by("open"):
                    self._break()
            if self.broken == "readonly":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fsdecode(path))

        def synced(handle: int) -> None:
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                self.folders.append(len(self.renamed))
            else:
                self.synced.append(os.readlink(f"/proc/self/fd/{handle}"))
                if self.phase == "half" and self.counts["half"] + 1 == self.number:
                    os.ftruncate(handle, os.fstat(handle).st_size // 2)
                self.pass_by("half")
                self.pass_by("fsync")
            fsync(handle)

        def renamed(source: Any, target: Any, **more: Any) -> None:
            self.pass_by("rename")
            replace(source, target, **more)
            self.renamed.append((os.path.abspath(source), os.path.abspath(target)))
            self.pass_by("renamed")

        sys.addaudithook(heard)
        os.fsync, os.replace = synced, renamed  # type: ignore[assignment]

    def _break(self) -> None:
        """A limit on the size of files stands for a full disk: `write` fails as it does there."""
        self.broken = self.act
        if self.act == "full":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


class _Operations(TorchDispatchMode):
    """Counts every operation of torch while it is entered, for the phase of the moment."""

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self.moments, self.phase = moments, ""

    def of(self, phase: str) -> "_Operations":
        self.phase = phase
        return self

    def __torch_dispatch__(self, operation: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.moments.pass_by(self.phase)
        return operation(*args, **(kwargs or {}))
