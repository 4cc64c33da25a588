"""Signals: the state is saved at the next step, then the process leaves."""

import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data._utils.worker import _worker_loop  # private, as _target below: else workers look like others

from lit_basics.callbacks.last import LastCheckpoint, go_behind
from lit_basics.errors import UserError
from lit_basics.launching import let_launcher_leave
from lit_basics.recording import compute_logged
from lit_basics.steps import at_step_boundary

SAME_SECONDS = 1.0
"""Ctrl-C reaches a process from the terminal and, again at once, from torchrun: within this they are one."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Preempted(SystemExit):
    """Raised once the state is saved; its code is 128 + the signal's number."""


class Preemption(Checkpoint):
    """On SIGTERM, SIGINT, SIGUSR1 or SIGHUP, saves ``last.ckpt`` at the next step boundary and leaves.

    The exit code is 143 (SIGTERM), 130 (SIGINT, Ctrl-C), 138 (SIGUSR1, which SLURM sends before the end of
    the time if asked to) or 129 (SIGHUP, of a terminal that is closed; ``nohup`` has it ignored, as here). All ranks
    stop at the same step if one gets the signal, and none leaves before the state is on the disk. A second Ctrl-C
    leaves at once. Handlers are installed while training runs, in the main thread only. A signal to the whole process
    group, such as Ctrl-C in a terminal or that of ``timeout``, ends no worker of a DataLoader that is forked in a fit:
    the main process ends them. (A program that such a worker starts has SIGTERM blocked.) It goes behind all other
    callbacks.

    Under SLURM, SIGUSR1, or the ``requeue_signal`` of a ``SLURMEnvironment``, also requeues the job (``scontrol
    requeue``) once the state is saved, where Lightning would: not in an interactive job, nor with
    ``SLURMEnvironment(auto_requeue=False)``. The job must then go on from
    the state: ``--resume auto`` by command, ``fit(ckpt_path=...)`` where there is a ``last.ckpt`` in your own project.

    Args:
        last: What saves the state. It joins the Trainer's callbacks if it is not one of them.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self._last = last
        self._signal = 0
        self._leaving = 0  # the signal for which the state is saved
        self._interrupted_at = float("inf")
        self._signals: set[int] = {*SIGNALS}
        self._requeue_signal: int | None = None
        self._telling = 0  # the process that tells of a Ctrl-C
        self._shields = False
        self._previous: dict[int, Any] = {}

    @property
    def best_model_path(self) -> str:
        """That of ``last``: Lightning asks, and after ``ddp_spawn`` tells, whichever checkpoint callback is first."""
        return self._last.best_model_path

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        self._last.best_model_path = path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let ``last`` save without a signal too: Lightning adds no checkpoint callback beside this one."""
        there: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        same = [c for c in there if isinstance(c, LastCheckpoint) and c.path == self._last.path]
        if same:
            self._last = same[0]
        else:
            self._last.setup(trainer, pl_module, stage)
        self._leaving = 0
        if stage == TrainerFn.FITTING:  # the workers of the first epoch are forked before training starts
            self._signals, self._shields = {*SIGNALS, _signal_of_requeue(trainer)}, True
            multiprocessing.util.register_after_fork(self, Preemption._shield)

    def _shield(self) -> None:
        """Block the signals in a DataLoader's worker; torch's own handler of SIGTERM would end it, and the fit."""
        if self._shields and getattr(multiprocessing.current_process(), "_target", None) is _worker_loop:
            self._shields = False
            for number in self._signals:
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, _pass_over)  # a program that the worker starts does not inherit it
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # torch sets its handler after this
            threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go behind all other callbacks, also behind ``last``, which has gone behind the others at its setup."""
        go_behind(trainer, self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers; Lightning has installed its own before.

        Raises:
            Preempted: If Lightning's have caught a SIGTERM; there is no new state to save.
            UserError: If SLURM has started this job anew, and it does not go on from the state that is saved.
        """
        path, own = self._last.path, self._last.best_model_path  # of an earlier fit of this process
        anew = trainer.fit_loop.total_batch_idx < 0  # a search for a learning rate leaves a ckpt_path of its own
        if int(os.environ.get("SLURM_RESTART_COUNT", 0)) and anew and not own and path.exists():
            raise UserError(f"this job was requeued, but would begin anew beside {path}: fit(ckpt_path={path})")
        self._signal, self._leaving, self._interrupted_at = 0, 0, float("inf")
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        # Lightning has a handler for it where the job is to be requeued, and nowhere else
        requeue, slurm = _signal_of_requeue(trainer), _slurm(trainer)
        requeues = slurm and slurm.auto_requeue and callable(self._previous.get(requeue)) and SLURMEnvironment.detect()
        self._requeue_signal = requeue if requeues else None
        if trainer.is_global_zero and sys.__stderr__ is not None:  # else 2 may be any file
            self._telling = os.getpid()
        if agreed := _highest(int(signal.SIGTERM) if trainer.received_sigterm else 0, trainer):
            raise Preempted(128 + agreed)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if time.monotonic() - self._interrupted_at > SAME_SECONDS:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            if self._telling == os.getpid():
                self._telling = 0
                with contextlib.suppress(OSError):  # print may be what was interrupted
                    os.write(2, b"\nCtrl-C: saving the state after this step, then leaving; again leaves at once\n")
            self._interrupted_at = min(self._interrupted_at, time.monotonic())
        self._signal = self._signal or number  # no more than this: a handler may interrupt anything

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave if a signal came, unless an epoch's end or a validation follows at once."""
        # ranks must ask each other; one alone knows
        if (self._signal or trainer.world_size > 1) and at_step_boundary(trainer):
            self._save_if_signalled(trainer)
            if self._leaving:
                # Lightning logs the step after this hook, and has no other one before it draws the next batch; several
                # steps for each of its batches have no self.log
                if getattr(pl_module, "steps_per_execution", 1) == 1:
                    trainer._logger_connector.update_train_step_metrics()
                self._leave_if_saved(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if a signal came; Lightning has yet to log the epoch."""
        compute_logged(trainer)
        self._save_if_signalled(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave if the state was saved at the end of the epoch before."""
        self._leave_if_saved(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave if it was saved at the end of the last epoch: the training is complete, and no job is requeued."""
        self._requeue_signal = None
        self._leave_if_saved(trainer)

    def _save_if_signalled(self, trainer: pl.Trainer) -> None:
        number = _highest(self._signal, trainer)
        if not number:
            return
        self._last.save(trainer)
        trainer.strategy.checkpoint_io.teardown()  # it may hold the state or be writing it still
        trainer.strategy.barrier()
        self._leaving = number

    def _leave_if_saved(self, trainer: pl.Trainer) -> None:
        number, self._leaving = self._leaving, 0
        if not number:
            return
        if number == self._requeue_signal and trainer.is_global_zero:
            _requeue()
        if trainer.world_size > 1:
            let_launcher_leave(trainer.world_size)
        raise Preempted(128 + number)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the earlier handlers back: Lightning's, which puts back those before its own later on."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the earlier handlers back."""
        self._restore()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave later workers alone, also after a fit in which nothing was left to train."""
        self._restore()

    def _restore(self) -> None:
        self._shields = False
        for number, handler in self._previous.items():
            # None is one that was not Python's, of a profiler say, which cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}


def _slurm(trainer: pl.Trainer) -> SLURMEnvironment | None:
    # Lightning's private name
    environment = trainer._accelerator_connector.cluster_environment
    return environment if isinstance(environment, SLURMEnvironment) else None


def _signal_of_requeue(trainer: pl.Trainer) -> int:
    """Return the signal at which a job of SLURM is to be requeued; Lightning's plugin may have another than SIGUSR1."""
    slurm = _slurm(trainer)
    return (slurm and slurm.auto_requeue and slurm.requeue_signal) or signal.SIGUSR1


def _pass_over(number: int, frame: Any) -> None:
    pass


def _leave_with_parent(parent: int) -> None:
    """Leave when the parent sends SIGTERM, as it does to a worker that does not end; that of others is passed over."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _highest(number: int, trainer: pl.Trainer) -> int:
    """Return the highest number that any rank has; all ranks must be here."""
    if trainer.world_size == 1:
        return number
    agreed = torch.tensor(number, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
    return int(agreed)


def _requeue() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        problem = done.stderr.strip() or f"code {done.returncode}" if done.returncode else ""
    except OSError as error:
        problem = str(error)
    text = f"SLURM job {job} could not be requeued: {problem}" if problem else f"SLURM job {job} is requeued"
    print(f"\n{text}", file=sys.stderr)
