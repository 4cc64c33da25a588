"""What the guards cost: the time to train blitz with all of them ÷ with none.

Usage: python benchmarks/guards.py [--rounds 5] [--quick]

The guards are what every run gets: RandomState, NonFiniteGuard, BestLossCheckpoint, LastCheckpoint, Preemption
and DurableCheckpointIO. Both are trained in one process, in turns, on synthetic images; the time is that of
``Trainer.fit``, saves included. The final weights must be equal bit for bit.
"""

import contextlib
import io
from functools import partial

import torch
from common import begin, end, figure, in_turns, now, prepared, ratios
from torch import Tensor

from lit_basics import RandomState

OFF = ["--best_checkpoint=false", "--last_checkpoint=false", "--non_finite_guard=false"]


def main() -> None:
    """Print the figures."""
    options = begin(__doc__)
    images = 200 if options.quick else 8000
    weights: dict[bool, list[Tensor]] = {}

    def train(guarded: bool) -> float:
        """Train blitz; return the seconds."""
        data = ["--data", "SyntheticCIFAR10", f"--data.train_images={images}", "--data.test_images=10"]
        quiet_words = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        words = ["--config", "blitz", *data, "--trainer.max_epochs=1", *quiet_words]
        with prepared([*words, *([] if guarded else OFF)]) as (config, trainer):
            if not guarded:
                trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, RandomState)]
            config.datamodule.setup("fit")  # draws the images
            begun = now()
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.fit(config.model, datamodule=config.datamodule)
            seconds = now() - begun
        weights[guarded] = [value.clone() for value in config.model.state_dict().values()]
        return seconds

    # many short runs, since the machine's noise is as large as what is measured
    times = in_turns({"on": partial(train, True), "off": partial(train, False)}, options.rounds * 4)
    if not all(map(torch.equal, weights[True], weights[False])):
        raise SystemExit("the guards change the final weights: nothing to compare")
    figure("guards on ÷ off", ratios(times, "on", "off"), 1.02)
    end()


if __name__ == "__main__":
    main()
