"""Is this training what it should be? Five checks over any LightningModule and its data.

Every run of a check is a process of its own, on the CPU, in one thread, and writes into a temporary folder only.
"""

import inspect
import math
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch._dynamo import OptimizedModule
from tqdm import tqdm

from lit_basics.data.arrays import ArrayDataModule
from lit_basics.errors import UserError, first_line, nearest
from lit_basics.modules import AUTOMATIC_ONLY, LitSupervised
from lit_basics.verification.forks import Run, RunError, Work, run_all
from lit_basics.verification.ranks import RANKS, Recorded, environments, joined, uneven
from lit_basics.verification.report import Failed, NotApplicable, Outcome, Report, Verdict
from lit_basics.verification.runs import RANK_STEPS, Subject
from lit_basics.verification.tracing import Difference, Trace, digest, largest_difference, rounding, tensors_of

CHECKS = ("loop", "resume", "manual", "ddp", "kill")
STEPS = 24
"""Optimizer steps of a run: three epochs of (at most) eight, so that 23 resume points lie within and between epochs."""
KILLS = 3
"""Kills within the run."""
TOLERANCES = {"64-true": 1e-6, None: 1e-2}
"""Largest difference between two ranks and one in float64, and in the user's own precision, as a part of the largest
update so far; beside it the rounding of the weights themselves is allowed.

Sums come in another order, which Adam's division enlarges for weights with hardly a gradient. A lost sample is a part
of the update as large as its share of the global batch, and a wrong factor all of it; only under an optimizer that
takes no notice of the gradient's length (Adam, Muon) a factor leaves no more than its epsilon.
"""
TELLING = 0.01
"""The part of an update that must be above the rounding of the weight, or the update tells nothing."""
UNCALLED = ("optimizer_step", "lr_scheduler_step", "configure_gradient_clipping", "backward", "optimizer_zero_grad")
"""Hooks around the update that the plain loop does not call."""
METRIC_TOLERANCE = 1e-5
"""Largest difference of a validation metric, relative to values above 1: float32 sums in another order."""


def verify(
    model: pl.LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: pl.LightningDataModule | None = None,
    *,
    checks: Sequence[str] = CHECKS,
    steps: int = STEPS,
    progress: bool = True,
    each: Callable[[Verdict], None] | None = None,
    weights_only: bool | None = None,
    **trainer_arguments: Any,
) -> Report:
    """Verify what ``Trainer(**trainer_arguments).fit(model, ...)`` does.

    - *loop*: the Trainer's weights equal a plain loop's after every step (without validation and callbacks).
    - *resume*: stopped and resumed at every step, the weights and the optimizer's state stay the same.
    - *manual*: manual optimization gives the weights of automatic optimization (:class:`LitSupervised` only).
    - *ddp*: two processes make the update of one at the same global batch, and validate each sample once.
    - *kill*: killed (SIGKILL) at random moments and restarted from its newest checkpoint, the run ends the same.

    All but *ddp* compare bit for bit.

    Args:
        model: The module to train; it is not changed. It is trained uncompiled.
        train_dataloaders: As for ``Trainer.fit``.
        val_dataloaders: As for ``Trainer.fit``.
        datamodule: As for ``Trainer.fit``.
        checks: Which checks to make, of ``loop``, ``resume``, ``manual``, ``ddp`` and ``kill``.
        steps: Optimizer steps of each run, and batches at least (*ddp* makes five).
        progress: Whether to show a progress bar, on stderr.
        each: Called with each verdict as soon as it is there.
        weights_only: As for ``Trainer.fit``, for the checkpoints that are resumed from.
        **trainer_arguments: As for ``Trainer``. The checks themselves set the device, the loggers, the checkpoint
            callbacks, and the numbers of epochs, steps and batches; a validation has at most 2 batches, except where
            *ddp* counts its samples. They leave out ``max_time``, ``min_epochs``, ``min_steps``, ``fast_dev_run``,
            ``overfit_batches``, ``profiler``, ``barebones`` and ``model_registry``.

    Returns:
        The report: ``report.passed`` is whether no check failed, ``report["loop"].outcome`` is ``"passed"``,
        ``"failed"`` or ``"not applicable"``, ``report["loop"].text`` says how much was compared, or what failed and
        why; ``print(report)`` shows one row a check.

    Raises:
        UserError: If ``checks`` is empty or names a check that does not exist, if the Trainer has no argument of a
            given name, or if ``steps`` is below 2.
    """
    if not checks:
        raise UserError(f"there is no check to make; there is {', '.join(CHECKS)}")
    for name in trainer_arguments:
        if name not in inspect.signature(pl.Trainer).parameters:
            raise UserError(
                f"the Trainer has no argument {name!r}{nearest(name, inspect.signature(pl.Trainer).parameters)}"
            )
    for check in checks:
        if check not in CHECKS:
            raise UserError(f"checks: there is no check {check!r}{nearest(check, CHECKS)}")
    if steps < 2:
        raise UserError(f"steps is {steps}; it must be at least 2")
    if isinstance(model, OptimizedModule):  # of torch.compile, as Trainer.fit takes it
        model = to_uncompiled(model)
    if isinstance(train_dataloaders, pl.LightningDataModule):  # as Trainer.fit takes it
        train_dataloaders, datamodule = None, train_dataloaders
    if isinstance(datamodule, ArrayDataModule):
        trainer, datamodule.trainer = datamodule.trainer, None  # one on a GPU would have the images there
        try:
            with suppress(AttributeError):  # hooks of its own may ask for the Trainer: then each run loads the images
                datamodule.prepare_data()
                datamodule.setup("fit")  # once, in memory that all runs share
        finally:
            datamodule.trainer = trainer
    for loaders in (train_dataloaders, val_dataloaders):  # a fork would shut down workers that are not its own
        (loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)).reset()
    subject = Subject(model, train_dataloaders, val_dataloaders, datamodule, trainer_arguments, steps, weights_only)
    report = Report()
    with (
        ending_on_sigterm(),
        tempfile.TemporaryDirectory(prefix="lit_basics_verify_") as folder,
        tqdm(total=1, desc="verify", unit="run", disable=not progress, leave=False, dynamic_ncols=True) as bar,
    ):
        verification = Verification(subject, Path(folder), bar)
        if torch.accelerator.is_available():  # autograd's threads for it, once begun, leave forks unable to train
            try:
                verification.one(lambda _: torch.autograd.backward(torch.ones(1, requires_grad=True)))
            except RunError as error:
                reason = "this process has trained already; call verify in a new one, or before the fit"
                raise UserError(f"{reason}: {error}") from error
        for check in (name for name in CHECKS if name in checks):
            bar.set_description(f"verify: {check}")
            verdict = verification.verdict(check)
            report.verdicts.append(verdict)
            if each is not None:
                bar.clear()
                each(verdict)
    return report


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Leave the body by an exception on SIGTERM, so that processes and folders are cleared away."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Verification:
    """The checks of one subject, with the runs that they share."""

    def __init__(self, subject: Subject, folder: Path, bar: Any) -> None:
        self.subject, self.folder, self.bar = subject, folder, bar
        self.log = folder / "output.txt"
        self._reference: Trace | None = None
        self._again: Trace | None = None
        self._bare: Trace | None = None

    def verdict(self, check: str) -> Verdict:
        """Make one check."""
        outcome: Outcome = "passed"
        try:
            text = str(getattr(self, check)())
        except NotApplicable as reason:
            outcome, text = "not applicable", str(reason)
        except Failed as reason:
            outcome, text = "failed", str(reason)
        except RunError as error:
            outcome, text = "failed", f"the run ended in {error}"
        return Verdict(check, outcome, text)

    def one(self, work: Work) -> Any:
        """Make one run and return what ``work`` returned there."""
        self.bar.total += 1
        (run,) = run_all([work], self.log, self.bar.update)
        return run.result()

    def reference(self) -> Trace:
        """Return the trace of the uninterrupted run, made at the first call.

        Raises:
            NotApplicable: If it diverges or moves no weight, or makes no step by itself in an epoch of the run.
            RunError: If it makes no step, or if it does not come out the same twice.
        """
        if self._reference is None:
            work = partial(self.subject.trace, folder=self.folder / "reference", save_to=self.folder / "checkpoints")
            self._reference = self.one(work)
        trace: Trace = self._reference
        if not (trace.steps or self.subject.model.automatic_optimization):
            batches = self.subject.limit(self.subject.steps)
            raise NotApplicable(
                f"no optimizer step that Lightning counts in epochs of {batches} batches; --steps makes them longer"
            )
        if not trace.steps:
            raise RunError("no optimizer step")
        refuse_vacuous(trace)
        if self._again is None:
            self._again = self.one(partial(self.subject.trace, folder=self.folder / "again", reference=trace))
        if self._again.difference is not None:
            raise RunError(
                f"two results: the same run, made twice, differs {self._again.difference}; something in it draws "
                "from neither torch, NumPy nor random, or depends on the time"
            )
        return trace

    def resumable(self) -> Trace:
        """Return the reference, if the user's run, whose length is not limited as in ours, takes no batch ahead."""
        reference = self.reference()
        if reference.ahead and not isinstance(self.subject.arguments.get("limit_train_batches"), int):
            raise NotApplicable(
                "the training loader has a state and no length: Lightning takes one batch ahead of it, which a resumed "
                "run loses; a whole number as limit_train_batches prevents it"
            )
        return reference

    def bare(self) -> Trace:
        """Return the trace of a run without validation and callbacks, made at the first call.

        Raises:
            NotApplicable: If only with them it trains, or if it diverges or moves no weight.
        """
        if self._bare is None:
            try:
                self._bare = self.one(partial(self.subject.trace, folder=self.folder / "bare", bare=True))
            except RunError as error:
                self.reference()
                raise NotApplicable(f"without validation and callbacks it cannot train: {error}") from error
        refuse_vacuous(self._bare)
        return self._bare

    def loop(self) -> str:
        """Compare the Trainer with a plain loop."""
        bare = self.bare()
        try:
            trace: Trace = self.one(partial(self.subject.loop, folder=self.folder / "loop", reference=bare))
        except RunError as error:
            if error.kind == "NotApplicable":
                raise NotApplicable(error.reason) from error
            raise NotApplicable(f"a plain loop cannot run it, it needs a Trainer: {error}") from error
        if trace.difference is not None:
            self.reference()  # says so if no two runs are equal
            model = self.subject.model
            changed = ", ".join(name for name in UNCALLED if is_overridden(name, model))
            if changed:
                raise NotApplicable(
                    f"{type(model).__name__} overrides {changed}, which the plain loop does not call: "
                    f"the Trainer differs from it {trace.difference}"
                )
            raise Failed(f"differs from a plain loop's {trace.difference}; {loop_cause(trace, bare)}")
        assert_same_length(trace, bare)
        return f"{bare.steps} steps, {trace.compared} comparisons: equal to a plain loop's"

    def resume(self) -> str:
        """Resume at every checkpoint of the reference."""
        reference = self.resumable()
        # the last may have been saved twice, at the end of a batch and of an epoch
        points = [path for path in dict.fromkeys(reference.checkpoints) if path != reference.checkpoints[-1]]
        works = [
            partial(self.subject.trace, folder=self.folder / path.stem, reference=reference, checkpoint=path)
            for path in points
        ]
        if not works:
            raise NotApplicable("the run is too short to be stopped within it")
        self.bar.total += len(works)
        compared, failed = 0, []
        for path, run in zip(points, run_all(works, self.log, self.bar.update), strict=True):
            try:
                trace: Trace = run.result()
            except RunError as error:
                raise Failed(f"resumed after {path.stem}, the run ended in {error}") from error
            compared += trace.compared
            if trace.difference is not None or trace.steps != reference.steps:
                failed.append((path.stem, trace))
        if not failed:
            return f"{len(works)} resume points, {compared} comparisons: equal to the uninterrupted run"
        stem, trace = failed[0]
        what = f"made {trace.steps} steps instead of {reference.steps}"
        if trace.difference is not None:
            what = f"{trace.difference}; {resume_cause(trace, reference, self.subject.model)}"
        raise Failed(f"{len(failed)} of {len(works)} resume points differ; the first, resumed after {stem}, {what}")

    def manual(self) -> str:
        """Compare manual with automatic optimization."""
        model = self.subject.model
        if not isinstance(model, LitSupervised):
            raise NotApplicable(f"{type(model).__name__} has one mode; a LitSupervised module has both")
        for name in AUTOMATIC_ONLY:
            if is_overridden(name, model, LitSupervised):
                raise NotApplicable(f"{type(model).__name__} overrides {name}, which leaves it automatic optimization")
        reference = self.reference()
        try:
            trace: Trace = self.one(
                partial(self.subject.trace, folder=self.folder / "manual", reference=reference, manual=True)
            )
        except RunError as error:
            if error.kind == "UserError":  # manual optimization refused
                raise NotApplicable(error.reason) from error
            raise
        if trace.difference is not None:
            raise Failed(f"manual differs from automatic optimization {trace.difference}")
        assert_same_length(trace, reference)
        return f"{reference.steps} steps, {trace.compared} comparisons: manual equals automatic"

    def ddp(self) -> str:
        """Compare two ranks with one process: updates, and validation."""
        if any(isinstance(module, nn.SyncBatchNorm) for module in self.subject.model.modules()):
            raise NotApplicable("the module has a SyncBatchNorm, which several processes can train on GPUs only")
        steps, compared, trained = self._ddp_updates()
        model, data = self.subject.model, self.subject.datamodule
        loader = self.subject.val_dataloaders is not None or any(
            owner is not None and is_overridden("val_dataloader", owner) for owner in (data, model)
        )
        equal = f"{steps} steps, {compared} comparisons: two ranks equal one"
        limit = self.subject.arguments.get("limit_val_batches")
        if not (loader and is_overridden("validation_step", model)) or limit == 0:
            return f"{equal}; no validation"
        if isinstance(limit, int):
            return f"{equal}; validation is cut by limit_val_batches, its samples and metrics are not compared"
        for precision in dict.fromkeys((trained, None)):  # what trains may not validate in float64
            validate = partial(self.subject.validate, folder=self.folder, precision=precision)
            alone: Any = None
            try:
                alone, metrics, draws = self.one(partial(validate, ranks=1))
                ranks = self._ranks(partial(validate, ranks=RANKS))
                break
            except RunError as error:
                if precision is None and alone is None:
                    reason = f"validation cannot run outside a fit ({error})"
                    return f"{equal}; {reason}: its samples and metrics are not compared"
                if precision is None:
                    raise
        seen = ranks[0][0] + ranks[1][0]
        if seen.keys() - alone.keys():
            others = "validation samples are others in other batches (padding, random draws)"
            return f"{equal}; {others}: they and the metrics are not compared"
        if seen != alone:
            repeated, missed = (seen - alone).total(), (alone - seen).total()
            if repeated == alone.total():
                raise Failed(f"each of two ranks validates all {repeated} samples: share them out by rank")
            raise Failed(
                f"of {alone.total()} validation samples two ranks repeat {repeated} and miss {missed}: "
                "Lightning's sampler pads to equal shares; a loader whose shares may differ does not "
                "(ArrayDataModule, ResumableDataLoader)"
            )
        counted = f"each of {alone.total()} validation samples counted once" if alone else "no validation"
        for rank, (_, values, _) in enumerate(ranks):
            for name, expected in metrics.items():
                if rank and name not in values:
                    continue  # logged by rank 0 only
                value = values.get(name, float("nan"))
                if not same_metric(value, expected):
                    if draws:
                        return f"{equal}; {counted}; validation draws random numbers, its metrics are not compared"
                    if all(name in other and same_metric(other[name], value) for _, other, _ in ranks):
                        raise Failed(
                            f"{name} is {value:.6g} on two ranks, {expected:.6g} in one process: its mean over batches "
                            "depends on how samples fall into them; log it as a torchmetrics metric"
                        )
                    raise Failed(
                        f"{name} is {value:.6g} on rank {rank} of two, {expected:.6g} in one process: it is the "
                        "mean of that rank's batches; log it with sync_dist=True, or as a torchmetrics metric"
                    )
        return f"{equal}; {counted}"

    def _joint_runs(self) -> tuple[list[Recorded], Recorded, str | None]:
        """Train on two ranks, and in one process on their batches put together; in float64 where that can be."""
        for precision in TOLERANCES:
            ranks: list[Recorded] = []
            try:
                ranks = self._ranks(partial(self.subject.ranks, folder=self.folder, precision=precision))
                if not all(rank.epochs and rank.epochs[0] for rank in ranks):
                    raise NotApplicable("a rank has no batch: the data are too few for two")
                replay = partial(self.subject.replay, epochs=joined_epochs(ranks), length=ranks[0].length)
                alone: Recorded = self.one(partial(replay, folder=self.folder, precision=precision))
                break
            except RunError as error:
                if precision is None:
                    self.bare()
                    if error.kind == "UserError":  # refused, as a batch size that two ranks cannot share
                        raise NotApplicable(error.reason) from error
                    if ranks:
                        what = "one process cannot take the ranks' batches put together"
                        raise NotApplicable(f"{what}: {error}") from error
                    raise
        return ranks, alone, precision

    def _ddp_updates(self) -> tuple[int, int, str | None]:
        ranks, alone, precision = self._joint_runs()
        first, second = (rank.epochs[0] for rank in ranks)
        if tensors_of(first[0]) and digest(first[0]) == digest(second[0]):
            raise Failed("both ranks train on the same batches: share the samples out by rank")
        steps, made = len(alone.states), [len(rank.states) for rank in ranks]
        if not (any([steps, *made]) or self.subject.model.automatic_optimization):
            raise NotApplicable(f"no optimizer step in epochs of {RANK_STEPS} batches, of which it makes no more")
        if {steps} != set(made) or not steps:
            raise Failed(f"two ranks made {made} steps, one process {steps}")
        for rank, rate in zip(ranks[0].rates, alone.rates, strict=False):
            if not math.isclose(rank, rate, rel_tol=1e-6):
                both = f"{rank:.6g} on two, {rate:.6g} on one"
                raise NotApplicable(f"the learning rate depends on the number of processes ({both})")
        return steps, compared_updates(ranks, alone, TOLERANCES[precision]), precision

    def _ranks(self, work: Work) -> list[Any]:
        self.bar.total += RANKS
        return [run.result() for run in run_all([work] * RANKS, self.log, self.bar.update, environments())]

    def kill(self) -> str:
        """Kill the run, restart it from its newest checkpoint, and so on, until it comes to its end."""
        reference = self.resumable()
        folder = self.folder / "killed"
        last = folder / "last.ckpt"
        moments: list[int] = []
        compared = 0
        for _ in range(10 * KILLS):
            newest = last if last.exists() else None
            work = partial(self.subject.trace, folder=folder, reference=reference, checkpoint=newest, last=last)
            run = Run(work, self.log)
            self.bar.total += 1
            first, last_step = (reference.steps * (len(moments) + i) // (KILLS + 1) for i in (0, 1))
            moment = random.SystemRandom().randint(first + 1, max(first + 1, last_step))
            try:
                killed = kill_after(run, moment if len(moments) < KILLS else None)
            finally:
                run.kill()  # Ctrl-C here leaves no process
            self.bar.update()
            if killed:
                moments.append(run.step)
                continue
            try:
                trace: Trace = run.result()
            except RunError as error:
                after = f"killed after step {moments[-1]}, the restarted" if moments else "the"
                raise Failed(f"{after} run ended in {error}") from error
            compared += trace.compared
            since = f"restarted after a kill at step {moments[-1]}" if moments else "made again"
            if trace.steps != reference.steps:
                raise Failed(f"{since}, the run made {trace.steps} steps instead of {reference.steps}")
            if trace.difference is not None:
                cause = resume_cause(trace, reference, self.subject.model)
                raise Failed(f"{since}, the run differs {trace.difference}; {cause}")
            if len(moments) >= KILLS and trace.compared:
                after = ", ".join(map(str, moments))
                return f"killed in the steps after {after}; {compared} comparisons: equal to the uninterrupted run"
            shutil.rmtree(folder)  # it was quicker than a kill: once more
            moments.clear()
        raise NotApplicable("the run is too short to be killed within it")


def refuse_diverged(diverged: int) -> None:
    """Raise NotApplicable if weights were not finite after step ``diverged`` (0: never): NaN equals NaN here."""
    if diverged:
        raise NotApplicable(f"the weights are not finite after step {diverged}: nothing can be compared")


def refuse_vacuous(trace: Trace) -> None:
    """Raise NotApplicable if weights were not finite or never changed: such runs are equal, whatever is lost."""
    refuse_diverged(trace.diverged)
    if trace.steps and not trace.moved:
        raise NotApplicable(
            f"in {trace.steps} steps no weight changes: nothing is proved (does training_step return the loss, has the "
            "optimizer this module's parameters, is the learning rate 0?)"
        )


def joined_epochs(ranks: list[Recorded]) -> list[list[Any]]:
    """Return the batches of all ranks, put together; not if they cannot be."""
    try:
        return [
            [joined(list(batches)) for batches in zip(*epochs, strict=False)]
            for epochs in zip(*(rank.epochs for rank in ranks), strict=False)
        ]
    except Exception as error:  # a batch may be anything
        raise NotApplicable(f"the ranks' batches cannot be put together into one: {first_line(error)}") from error


def compared_updates(ranks: list[Recorded], alone: Recorded, tolerance: float) -> int:
    """Compare the ranks' states after each step with one process's; return how many comparisons that were."""
    compared, update = 0, 0.0
    for step, (expected, *others) in enumerate(zip(alone.states, *(rank.states for rank in ranks), strict=True), 1):
        moved = {n: largest_difference(expected[n], before) for n, before in alone.initial.items() if n in expected}
        update = max([update, *moved.values()])
        for name, value in expected.items():
            allowed = tolerance * update + rounding(value, step)
            for other in others:
                compared += 1
                largest = largest_difference(other.get(name), value)
                if largest <= allowed:
                    continue
                found = Difference(step, name, largest)
                if alone.draws:
                    draws = "the step draws random numbers, which differ from rank to rank by intent"
                    raise NotApplicable(f"{draws}: two ranks differ from one process {found}")
                if any(uneven(batch) for epoch in ranks[0].epochs for batch in epoch):
                    sizes = (
                        "tensors of a batch differ in their first dimension, along which the ranks' are put together"
                    )
                    raise NotApplicable(f"{sizes}: two ranks differ from one process {found}")
                raise Failed(
                    f"two ranks differ from one process on the same global batch {found}; a loss that is not the mean "
                    "over its batch, or a layer that looks at the whole batch, would do that (or batches that cannot "
                    "be put together along their first dimension)"
                )
    if not compared:
        raise Failed("there was nothing to compare: the module has no parameters")
    refuse_diverged(alone.diverged)
    if not any(TELLING * moved[name] > rounding(alone.states[-1][name], len(alone.states)) for name in moved):
        raise NotApplicable(
            f"in {len(alone.states)} steps no weight moves by more than {update:.3g}: rounding would hide a fault"
        )
    return compared


def same_metric(value: float, expected: float) -> bool:
    """Return whether two values of a metric are the same, but for rounding; NaN is the same as NaN."""
    close = math.isclose(value, expected, rel_tol=METRIC_TOLERANCE, abs_tol=METRIC_TOLERANCE)
    return close or (math.isnan(value) and math.isnan(expected))


def assert_same_length(trace: Trace, reference: Trace) -> None:
    """Fail if a run, equal as far as it went, ended at another step, or nothing was compared."""
    if trace.steps != reference.steps or not trace.compared:
        raise Failed(f"made {trace.steps} steps instead of {reference.steps}; {trace.compared} comparisons")


def kill_after(run: Run, step: int | None) -> bool:
    """Kill a run at a random time soon after ``step`` was made; return False if it ended by itself before."""
    first, started = 0, 0.0
    while run.receive():
        if not first:
            first, started = run.step, time.monotonic()
        if step is not None and run.step >= step:
            seconds = (time.monotonic() - started) / (run.step - first) if run.step > first else 0.01
            time.sleep(random.SystemRandom().uniform(0, 1.5 * min(seconds, 5.0)))
            run.kill()
            return bool(run.process.exitcode == -signal.SIGKILL)
    return False


def resume_cause(trace: Trace, reference: Trace, model: pl.LightningModule) -> str:
    """Return in words why a resumed run probably differs."""
    batch = first_difference(trace.batches, reference.batches)
    drawn = first_difference(trace.random, reference.random)
    if batch is not None and trace.loader:
        earlier = next((n for n, value in reference.batches.items() if value == trace.batches[batch]), None)
        instead = "of another order" if earlier is None else f"batch {earlier} again"
        return (
            f"the training loader ({trace.loader}) has no state_dict: batch {batch} is {instead}; "
            "ResumableDataLoader and ArrayDataModule keep their place and order"
        )
    if drawn is not None and (batch is None or drawn <= batch):
        return (
            "the random state is not in the checkpoint (dropout, augmentation, a shuffled loader draw from it): "
            "the callback RandomState saves it, and ResumableDataLoader, unlike a DataLoader, draws nothing from it"
        )
    if batch is not None:
        return f"the state of the training loader does not bring back its order: batch {batch} is another"
    if reference.halfway:
        return (
            "an epoch ends amid the batches of a step, whose gradients are not in its checkpoint: step the optimizer "
            "at the epoch's last batch too (trainer.is_last_batch)"
        )
    if is_overridden("on_train_batch_end", model):
        return (
            "checkpoints are saved before the module's on_train_batch_end, which a resume does not repeat (what it "
            "changes belongs in on_before_zero_grad, optimizer_step or a callback), or something is kept outside "
            "parameters and buffers"
        )
    return "something is not in the checkpoint that the module or a callback keeps outside parameters and buffers"


def loop_cause(trace: Trace, bare: Trace) -> str:
    """Return in words why the Trainer probably differs from a plain loop."""
    batch = first_difference(trace.batches, bare.batches)
    if batch is not None:
        return f"batch {batch} is another one: the loader depends on the Trainer or on something outside the seed"
    if first_difference(trace.random, bare.random) is not None:
        return "the random state differs: something draws from it only under the Trainer"
    return "a callback or hook of the module changes weights or gradients"


def first_difference(digests: dict[int, str], expected: dict[int, str]) -> int | None:
    """Return the first number whose digests differ."""
    return next((n for n in sorted(digests) if n in expected and digests[n] != expected[n]), None)
