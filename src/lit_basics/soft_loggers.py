"""Loggers that cannot end a run: what fails is said once, switched off, and the training goes on."""

import contextlib
import copyreg
import errno
import functools
import inspect
import logging
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from tqdm import tqdm

from lit_basics.errors import first_line
from lit_basics.tracebacks import root_cause

AnyLogger = TypeVar("AnyLogger", bound=Logger)

WANDB_LIMITS = {"WANDB_INIT_TIMEOUT": "20", "WANDB_FINISH_TIMEOUT": "120"}
"""Seconds that W&B may wait for its server, unless the environment or its own settings say otherwise."""

_ROOM = 64 * 1024
"""Bytes that must be free where W&B writes."""

_SECONDS_BETWEEN_LOOKS = 10.0


def fail_soft(logger: AnyLogger) -> AnyLogger:
    """Make a logger that cannot end the run: at its first exception it is switched off, with a word on stderr.

    It stays the same object and an instance of its class. Its methods do nothing from then on, and ``experiment``
    is an object that takes every call. What is called on the ``experiment`` of a working logger is not guarded.

    A ``WandbLogger`` that cannot reach or log in to its server goes on offline instead, in the same run and with
    the same settings, within half a minute (``WANDB_INIT_TIMEOUT``); when its disk is full, it is switched off,
    because W&B itself would drop the rows without a word.

    Args:
        logger: Any Lightning logger. ``lit_basics fit`` does this with all of a run's.

    Returns:
        The same logger.
    """
    if isinstance(logger, _Soft):
        return logger
    kind = type(logger)
    members: dict[str, Any] = {"_soft_kind": kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    for name in dir(kind):
        member = inspect.getattr_static(kind, name)
        if name.startswith("_"):
            continue
        if inspect.isfunction(member):
            members[name] = _method(name, member)
        elif isinstance(member, property) and member.fget is not None:
            members[name] = property(_getter(name, member.fget), member.fset, member.fdel, member.__doc__)
    logger.__class__ = types.new_class(kind.__name__, (kind, _Soft), exec_body=lambda body: body.update(members))
    return logger


def finish_wandb(loggers: Sequence[Logger], failed: bool = False) -> None:
    """End the W&B run of this process, if there is one: the next run would go on in it.

    Args:
        loggers: The loggers of the run that ends.
        failed: Whether W&B is to show it as failed, not as finished.
    """
    if _wandb_folder() is None:
        return
    import wandb

    soft = next((logger for logger in loggers if isinstance(logger, WandbLogger) and isinstance(logger, _Soft)), None)
    # where the disk is full, its log files would print a traceback for each of their lines
    noisy, logging.raiseExceptions = logging.raiseExceptions, soft is None or not soft._soft_failed
    try:
        wandb.finish(exit_code=int(failed))
    except Exception as error:
        if soft is None:
            _say(f"W&B failed at the end of the run ({type(error).__name__}: {error})")
        else:
            soft._switch_off(error)
        with contextlib.suppress(Exception):
            wandb.teardown()
        wandb.run = None  # W&B leaves it there
    finally:
        logging.raiseExceptions = noisy


class _Soft:
    """What a soft logger has beside its own class."""

    _soft_kind: type[Logger]
    _soft_failed = False
    _soft_step: int | None = None
    _soft_looked = 0.0

    def _switch_off(self, error: Exception) -> None:
        if self._soft_failed:
            return
        self._soft_failed = True
        cause = root_cause(error)  # what Lightning makes of it can be misleading
        lost = "its rows" if self._soft_step is None else f"its rows from about step {self._soft_step + 1} on"
        folder = _wandb_folder() if isinstance(self, WandbLogger) else None
        _say(
            f"{self._soft_kind.__name__} failed ({type(cause).__name__}: {first_line(cause)}) and is switched off; "
            f"the run goes on, {lost} are not logged there"
            + (f"\n  to upload what was written: wandb sync {folder}" if folder is not None else "")
        )

    def _before(self, name: str) -> None:
        """Look, before a row is logged, whether W&B has room for it."""
        folder = _wandb_folder() if isinstance(self, WandbLogger) else None
        due = name == "finalize" or time.monotonic() >= self._soft_looked + _SECONDS_BETWEEN_LOOKS
        if folder is not None and due:
            self._soft_looked = time.monotonic()
            _check_room(folder)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time: a copy in another process is made soft anew
        reduced = self._soft_kind.__reduce_ex__(self, protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return _soft_copy, (self._soft_kind,), *reduced[2:]
        return reduced


def _soft_copy(kind: type[Logger]) -> Logger:
    return fail_soft(kind.__new__(kind))


def _method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._soft_failed:
            return None
        try:
            self._before(name)
            result = function(self, *args, **kwargs)
            if name == "log_metrics":
                self._soft_step = kwargs.get("step", args[1] if len(args) > 1 else None)
            return result
        except Exception as error:
            self._switch_off(error)

    return guarded


def _getter(name: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(function)
    def guarded(self: Any) -> Any:
        experiment = name == "experiment"
        if self._soft_failed and experiment:
            return _Nothing()
        try:
            if experiment and isinstance(self, WandbLogger):
                return _wandb_experiment(self, function)
            return function(self)
        except Exception as error:
            self._switch_off(error)
            return _Nothing() if experiment else None

    return guarded


def _wandb_experiment(logger: Any, start: Callable[[Any], Any]) -> Any:
    """Return W&B's run; started within limits, and offline where that cannot be done online."""
    if _wandb_folder() is not None or rank_zero_only.rank:  # type: ignore[attr-defined]
        return start(logger)
    _check_room(Path(logger.save_dir or "."))
    import wandb

    limits = {name: os.environ.get(name, seconds) for name, seconds in WANDB_LIMITS.items()}
    with _environment(limits):
        try:
            return start(logger)
        except wandb.Error as error:
            if os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
                raise
            wandb.teardown()  # it reads the environment only once
            with _environment({"WANDB_MODE": "offline"}):
                run = start(logger)
            how = f"logging offline; to upload the run: wandb sync {_wandb_folder()}"
            _say(f"W&B cannot be used online ({first_line(error)}): {how}")
            return run


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _wandb_folder() -> Path | None:
    """Return the folder of the W&B run of this process."""
    run = getattr(sys.modules.get("wandb"), "run", None)  # a folder of this name can be imported, too
    return Path(run.dir).parent if run is not None else None


def _check_room(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_ROOM))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise


def _say(text: str) -> None:
    tqdm.write(f"lit_basics: {text}", file=sys.stderr)  # above a progress bar


class _Nothing:
    """Takes every call, of any depth, and does nothing."""

    def __getattr__(self, name: str) -> "_Nothing":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Nothing":
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __exit__(self, *args: Any) -> None:
        pass

    __getitem__ = __enter__ = __call__
    __setitem__ = __exit__
