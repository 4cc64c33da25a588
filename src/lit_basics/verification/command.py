"""``lit_basics verify``: the checks over a configuration."""

from lit_basics.callbacks.random_state import RandomState
from lit_basics.config import Config
from lit_basics.errors import UserError
from lit_basics.trainers import as_list, with_durable_checkpoints, with_guard
from lit_basics.verification.checks import CHECKS, STEPS, verify
from lit_basics.words import option, taken


def verify_config(args: list[str]) -> None:
    """Print a row for each check.

    Raises:
        SystemExit: With code 1, if one failed.
        UserError: If the words are wrong.
    """
    checks, args = taken(args, "--checks")
    steps, args = taken(args, "--steps")
    if steps and not steps[-1].isdecimal():
        raise UserError(f"steps is {steps[-1]}; it must be a number of optimizer steps")
    for name in ("--run_dir", "--resume", "--ckpt_path"):
        if option(args, name) is not None:
            raise UserError(f"verify takes no {name}: it starts anew, and writes into a temporary folder only")
    for name in ("--check", "--step"):
        if option(args, name) is not None:
            raise UserError(f"there is no option {name}; did you mean '{name}s'?")
    config = Config(args)
    config.config.trainer.logger = False
    config.build()
    config.check_data()
    arguments = dict(config.trainer_arguments)
    arguments["callbacks"] = [*with_guard(config, as_list(arguments["callbacks"])), RandomState()]
    arguments["plugins"] = with_durable_checkpoints(arguments["plugins"])
    report = verify(
        config.model,
        datamodule=config.datamodule,
        checks=[check.strip() for check in ",".join(checks).split(",")] if checks else CHECKS,
        steps=int(steps[-1]) if steps else STEPS,
        each=lambda verdict: print(verdict, flush=True),
        weights_only=True,
        **arguments,
    )
    if not report.passed:
        raise SystemExit(1)
