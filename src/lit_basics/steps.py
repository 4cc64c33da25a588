"""Where training stands: amid a step or at its end, before a validation, at its own end."""

import math

import lightning.pytorch as pl


def place(trainer: pl.Trainer) -> tuple[int, int]:
    """Return how far training is: the steps, which stay 0 where an optimizer is stepped past Lightning, and batches."""
    return trainer.global_step, trainer.fit_loop.total_batch_idx


def accumulating(trainer: pl.Trainer) -> bool:
    """Return whether this batch ends amid the batches of a step."""
    batches = trainer.accumulate_grad_batches
    return batches > 1 and (trainer.fit_loop.batch_idx + 1) % batches != 0 and not trainer.is_last_batch


def at_step_boundary(trainer: pl.Trainer, halfway: bool = False) -> bool:
    """Return whether a save at the end of this batch would be resumed exactly.

    Lightning does not make up for a validation, or an epoch's end, that was due right after the save, and keeps no
    gradients that are accumulated half-way.

    Args:
        trainer: The Trainer.
        halfway: Whether such gradients are kept, as those of a LitSupervised are.
    """
    if not halfway and accumulating(trainer):
        return False
    loop = trainer.fit_loop
    return not trainer.is_last_batch and not validates_after(trainer, loop.batch_idx + 1, loop.total_batch_idx + 1)


def ends_after_batch(trainer: pl.Trainer) -> bool:
    """Return whether training ends with this batch, by ``max_steps`` or because it was asked to stop."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    lasted = trainer.should_stop and trainer.current_epoch >= (trainer.min_epochs or 0)
    return lasted and trainer.global_step >= (trainer.min_steps or 0)


def validates_after(trainer: pl.Trainer, number: int, total: int) -> bool:
    """Return whether a validation within the epoch is due after a batch.

    Args:
        trainer: The Trainer.
        number: Which batch of its epoch it is, from 1.
        total: Which batch of the run it is, from 1.
    """
    check = trainer.val_check_batch
    done = total if trainer.check_val_every_n_epoch is None else number
    return check is not None and math.isfinite(check) and done % int(check) == 0


def validation_follows(trainer: pl.Trainer) -> bool:
    """Return whether Lightning validates after this batch, which is at its end."""
    batches, every, loop = trainer.num_val_batches, trainer.check_val_every_n_epoch, trainer.fit_loop
    return (
        trainer.enable_validation
        and (sum(batches) > 0 or not batches)  # none are known before the first validation
        and (every is None or (1 + trainer.current_epoch) % every == 0)
        and validates_after(trainer, 1 + loop.batch_idx, 1 + loop.total_batch_idx)
    )
