"""Each training run of a verification in a process of its own, forked from this one.

A fork starts with the same objects and random state as its siblings, leaves nothing behind in this process,
and can be killed.
"""

import contextlib
import logging
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from lit_basics.tracebacks import where
from lit_basics.verification.report import NotApplicable

Work = Callable[[Callable[[int], None]], Any]
"""What a process does; it is given a function that reports a step to the parent."""


class RunError(Exception):
    """What ended a run.

    Args:
        text: The kind of the exception, the line of the user's code that it came from, and its message.
        kind: The kind alone.
        reason: The message alone.
    """

    def __init__(self, text: str, kind: str = "", reason: str = "") -> None:
        super().__init__(text)
        self.kind, self.reason = kind, reason


class Run:
    """A running process; its :meth:`result` comes once :meth:`receive` has returned False.

    Args:
        work: What to do there.
        log: Where the process's output goes.
        environment: Further environment variables of the process.
    """

    def __init__(self, work: Work, log: Path, environment: dict[str, str] | None = None) -> None:
        context = multiprocessing.get_context("fork")
        state = random.getstate()  # Python draws a new one in a forked process
        self.connection, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(work, theirs, log, environment or {}, state))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork beside threads
            self.process.start()
        theirs.close()
        self.step = 0
        """The newest step that the process has reported."""
        self._result: Any = None
        self._error: RunError | NotApplicable | None = RunError("silence: its process left without a result")

    def receive(self) -> bool:
        """Take the next message; return False if it was the last."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, OSError):  # OSError amid a message
            self.process.join()
            code = self.process.exitcode or 0
            if isinstance(self._error, RunError) and not self._error.kind and code < 0:
                self._error = RunError(signal.Signals(-code).name)
                if code == -signal.SIGKILL:  # not ours: of a run that we kill nobody asks for the result
                    self._error = NotApplicable("a run was killed from outside (SIGKILL): is there too little memory?")
            return False
        if kind == "step":
            self.step = content
            return True
        if kind == "result":
            self._result, self._error = pickle.loads(content), None
        else:
            self._error = RunError(*content)
        return True

    def result(self) -> Any:
        """Return what ``work`` returned.

        Raises:
            RunError: If it raised.
            NotApplicable: If it was killed from outside.
        """
        if self._error is not None:
            raise self._error
        return self._result

    def kill(self) -> None:
        """End the process by SIGKILL, if it is there, and take what it has said."""
        self.process.kill()
        self.process.join()
        with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            while self.connection.poll() and self.receive():
                pass


def run_all(
    works: Sequence[Work], log: Path, done: Callable[[], None], environments: Sequence[dict[str, str]] = ()
) -> list[Run]:
    """Run all ``works``, as many at once as there are cores, and return their runs.

    Args:
        works: As for :class:`Run`.
        log: Where their output goes.
        done: Called whenever one has ended.
        environments: Of the ranks of one job, which run all at once; one that fails ends the others.

    Raises:
        RunError: If a rank failed.
    """
    runs: list[Run] = []
    live: list[Run] = []
    try:
        while len(runs) < len(works) or live:
            while len(runs) < len(works) and len(live) < (len(environments) or len(os.sched_getaffinity(0))):
                runs.append(Run(works[len(runs)], log, environments[len(runs)] if environments else None))
                live.append(runs[-1])
            ready = wait([run.connection for run in live])
            for run in [run for run in live if run.connection in ready]:
                if not run.receive():
                    live.remove(run)
                    done()
                    if environments:
                        run.result()
    finally:
        for run in live:
            run.kill()
    return runs


def _child(work: Work, connection: Connection, log: Path, environment: dict[str, str], state: tuple[Any, ...]) -> None:
    with log.open("a") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        sys.stdout = sys.stderr = output
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its children
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        random.setstate(state)
        torch.set_num_threads(1)  # a forked process has none of its parent's threads
        # nor its CUDA, which the Trainer, on the CPU too, would ask for its random state
        torch.cuda.is_available = lambda: False
        warnings.simplefilter("ignore")
        logging.disable()
        message: tuple[str, Any]
        try:
            # not as the connection pickles: tensors would be shared with a process that is about to end
            message = ("result", pickle.dumps(work(lambda step: connection.send(("step", step)))))
        except BaseException as error:  # a SystemExit too: here nothing may end without a word
            traceback.print_exc()
            message = ("error", (where(error), type(error).__name__, str(error)))
        with contextlib.suppress(BrokenPipeError):
            connection.send(message)
        connection.close()


def _end_with(parent: int) -> None:
    """End this process once its parent has gone, by whatever signal."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
