"""The command line: what to run, and which exit code.

Nothing heavy is imported before it is known what was asked for.
"""

import gc
import sys
from importlib.metadata import version

from lit_basics.errors import UserError, nearest, printable, shortened
from lit_basics.output import outlive_readers
from lit_basics.recipes import all_names, recipe_names, recipe_path

SUBCOMMANDS = ("fit", "verify", "validate", "test", "predict")

HELP = f"""\
usage: lit_basics COMMAND [--config RECIPE_OR_PATH ...] [--KEY VALUE ...]

commands:
  fit             train            lit_basics fit --config quickstart
  verify          is the training exact: loop, resume, manual, ddp, kill
  validate, test  evaluate a run   lit_basics test --run_dir runs/quickstart/...
  predict         write the predictions of a run's net to predictions.npz
  recipes [NAME]  list the packaged recipes and overlays, or print one

options of fit, verify, validate, test and predict:
  --config C      a recipe's name or a YAML file; several are laid over one another
  --run_dir D     fit: the run's directory, by default runs/RECIPE/DATE_TIME; validate, test, predict: the run to take
  --resume R      fit: auto goes on with the newest good run; or a run's directory or a checkpoint
  --resume_reset  resume with another batch size, data or seed, which begin anew with the next epoch
  --ckpt_path P   the checkpoint to start from; for validate, test and predict by default the run's best
  --allow_import P  let a config name what lies in the package P, beside the libraries of training
  --checks A,B    verify: only these checks; --steps N for longer or shorter runs
  --KEY VALUE     any setting, such as --trainer.max_epochs 3, --model.optimizer Adam or --data.batch_size 64
  --print_config  fit: print the resolved configuration and train nothing
  --help          after a command: the Trainer's settings; --model.help CLASS: a class's
  --version       print the version

recipes: {", ".join(recipe_names())}
overlays: {", ".join(recipe_names("overlays"))}
"""


def main(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code, as docs/command-line.md lists them."""
    if args is None:
        args = sys.argv[1:]
        outlive_readers(trains=args[:1] == ["fit"] and "--print_config" not in args)
    try:
        return _dispatch(args)
    except UserError as error:
        print(f"lit_basics: {printable(shortened(str(error), 900))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:  # stopped by a signal, the state saved; or by the user's own code
        code = _code_of_signal(error)
        if code is not None:
            print("stopped by a signal", file=sys.stderr)
            return code
        if isinstance(error.code, int | None):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1


def _code_of_signal(error: SystemExit) -> int | None:
    """Return 130 or 143 where Lightning leaves after a signal, with other codes; None elsewhere."""
    if type(error) is SystemExit and error.code == 1 and isinstance(error.__context__, KeyboardInterrupt):
        return 130
    from lightning.pytorch.utilities.exceptions import SIGTERMException  # imported by whoever raised it

    return 143 if type(error) is SIGTERMException else None


def _dispatch(args: list[str]) -> int:
    command, rest = (args[0], args[1:]) if args else ("--help", [])
    if command in ("-h", "--help") or (command == "recipes" and {"-h", "--help"}.intersection(rest)):
        print(HELP, end="")
    elif command == "--version":
        print(f"lit_basics {version('lit_basics')}")
    elif command == "recipes":
        _recipes(rest)
    elif command in SUBCOMMANDS:
        collecting = gc.isenabled()
        gc.disable()  # an import makes no garbage, and looking for it takes a sixth of the time
        try:
            from lit_basics.running import run
        finally:
            if collecting:
                gc.enable()
        run(command, rest)
    else:
        raise UserError(f"there is no command {command!r}{nearest(command, (*SUBCOMMANDS, 'recipes'))}")
    return 0


def _recipes(names: list[str]) -> None:
    if not names:
        for name in all_names():
            first = recipe_path(name).read_text("utf-8").splitlines()[0]
            print(f"{name:20} {first.removeprefix('# ')}")
    for name in names:
        print(recipe_path(name).read_text("utf-8"), end="")
