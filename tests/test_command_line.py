"""The command line: the run directory, the other subcommands, the recipes, the exit codes."""

import json
import os
import pty
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import assert_equal, fit, metrics

from lit_basics import SyntheticCIFAR10, nets
from lit_basics.cli import main
from lit_basics.config import Config
from lit_basics.fitting import run_name
from lit_basics.running import quiet

SMALL = (
    *("--config", "quickstart", "--data.train_images", "200", "--data.test_images", "60"),
    *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
)


PROMISED = [
    "best.pth",
    *(f"checkpoints/{name}.ckpt{more}" for name in ("best", "last") for more in ("", ".sha256")),
    *("config.yaml", "metrics.csv"),
]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_run_directory_holds_what_is_promised(tmp_path, capsys):
    run = fit(*SMALL)
    assert files(run) == PROMISED
    assert files(tmp_path) == [f"run/{name}" for name in files(run)]  # nothing anywhere else
    printed = capsys.readouterr().out
    assert "run directory: run\n" in printed
    assert "best checkpoint: " in printed
    assert "checkpoints/best.ckpt" in printed


def test_metric_keys(tmp_path):
    keys = set().union(*metrics(fit(*SMALL, "--trainer.log_every_n_steps", "1")).values())
    parameters = {f"grad/norm/{name}" for name, _ in nets.LeNet5().named_parameters()}
    assert keys == {"train/loss", "train/loss_epoch", "val/loss", "val/acc", "lr", "grad/norm"} | parameters


def test_the_same_command_five_times_loses_nothing(tmp_path):
    for _ in range(5):
        assert main(["fit", *SMALL]) == 0
    runs = list((tmp_path / "runs" / "quickstart").iterdir())
    assert len(runs) == 5
    assert all(files(run) == PROMISED for run in runs)


@pytest.mark.slow
def test_the_same_command_five_times_at_once_loses_nothing(tmp_path):
    command = [sys.executable, "-m", "lit_basics", "fit", *SMALL]
    processes = [subprocess.Popen(command) for _ in range(5)]
    assert [process.wait(timeout=300) for process in processes] == [0] * 5
    runs = list((tmp_path / "runs" / "quickstart").iterdir())
    assert len(runs) == 5
    assert all(files(run) == PROMISED for run in runs)


def test_the_same_command_gives_the_same_weights(tmp_path):
    states = [torch.load(fit(*SMALL, run_dir=name) / "best.pth", weights_only=True) for name in ("a", "b")]
    assert_equal(*states)
    other = torch.load(fit(*SMALL, "--seed_everything", "1", run_dir="c") / "best.pth", weights_only=True)
    assert not torch.equal(other["c1.weight"], states[0]["c1.weight"])


def test_config_yaml_is_a_config_for_every_subcommand(tmp_path, capsys):
    run = fit(*SMALL, "--model.optimizer", "AdamW", run_dir="first")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert "run_dir" not in config
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    again = fit("--config", str(run / "config.yaml"), run_dir="again")
    assert_equal(torch.load(run / "best.pth", weights_only=True), torch.load(again / "best.pth", weights_only=True))
    assert (again / "config.yaml").read_text() == (run / "config.yaml").read_text()
    for command in ("validate", "test", "predict"):
        words = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "best.ckpt")]
        assert main([command, *words]) == 0


def test_a_new_optimizer_starts_from_its_own_defaults(tmp_path):
    # jsonargparse would keep SGD's weight_decay of 0; what the recipe writes (lr, momentum) stays
    run = fit(*SMALL, "--model.optimizer", "AdamW")
    arguments = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["optimizer"]["init_args"]
    assert arguments["weight_decay"] == 0.01
    assert arguments["lr"] == 0.03


def test_print_config_prints_what_a_run_has(tmp_path, capsys):
    """Printed before ``reset_unwritten`` AdamW has SGD's weight_decay."""
    words = [*SMALL, "--model.optimizer", "AdamW"]
    saved = (fit(*words) / "config.yaml").read_text()
    capsys.readouterr()
    assert main(["fit", *words, "--trainer.enable_progress_bar", "false", "--print_config"]) == 0
    assert capsys.readouterr().out == saved
    assert files(tmp_path / "runs") == []


def test_what_is_null_stays_null(tmp_path, capsys):
    """Without null in config.yaml each resume has the default in its place: here one that Lightning refuses."""
    run = fit(*SMALL, "--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "9")
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["check_val_every_n_epoch"] is None
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "2"]) == 0
    scheduler = ["--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "1"]
    run = fit(*SMALL, *scheduler, run_dir="other")
    capsys.readouterr()
    assert main(["fit", "--resume", str(run), "--model.lr_scheduler", "null"]) == 2
    assert "--model.lr_scheduler None: the run to resume has torch.optim.lr_scheduler.StepLR" in capsys.readouterr().err


def test_an_overlay_beside_a_run(tmp_path, capsys):
    """Parsed without the run's own config.yaml an overlay has no model, so that it is not told of, or not taken."""
    (tmp_path / "longer.yaml").write_text("trainer: {max_epochs: 7}\n")
    run = fit(*SMALL)
    capsys.readouterr()
    assert main(["fit", "--resume", str(run), "--config", "longer.yaml"]) == 0
    assert "what --config names has another trainer.max_epochs\n" in capsys.readouterr().out
    (tmp_path / "fewer.yaml").write_text("trainer: {limit_test_batches: 1}\n")
    assert main(["test", "--run_dir", str(run), "--config", "fewer.yaml"]) == 0
    assert "test/acc" in capsys.readouterr().out


def test_two_reports_of_the_loss(tmp_path):
    reports = [{"class_path": "LossReport", "init_args": {"every_n_steps": n}} for n in (2, 3)]
    run = fit(*SMALL, "--trainer.callbacks", json.dumps(reports))
    rows = metrics(run).values()
    assert [sum(f"train/loss_mean_{n}" in row for row in rows) for n in (2, 3)] == [1, 1]


def test_overlays_append_callbacks_and_typed_values_win(tmp_path):
    overlay = tmp_path / "more.yaml"
    overlay.write_text("trainer:\n  max_epochs: 7\n  callbacks+:\n    - class_path: LossReport\n")
    run = fit(*SMALL[:2], "--config", str(overlay), *SMALL[2:])
    config = yaml.safe_load((run / "config.yaml").read_text())
    kinds = [callback["class_path"] for callback in config["trainer"]["callbacks"]]
    assert kinds == ["lit_basics.GradientMonitor", "lit_basics.LossReport"]
    assert config["trainer"]["max_epochs"] == 1


def test_a_transform_is_named_in_a_config(tmp_path):
    parts = [{"class_path": f"torchvision.transforms.v2.{name}"} for name in ("GaussianNoise", "RandomInvert")]
    compose = {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": parts}}
    config = tmp_path / "transformed.yaml"
    config.write_text(yaml.safe_dump({"data": {"init_args": {"transform": compose}}}))
    words = ["fit", *SMALL, "--config", str(config), "--run_dir", str(tmp_path / "run")]
    with pytest.warns(UserWarning, match="Compose draws at random"):
        assert main(words) == 0
    with pytest.warns(UserWarning, match="Compose draws at random"):
        assert main(["fit", "--resume", str(tmp_path / "run"), "--trainer.max_epochs", "2"]) == 0
    with pytest.warns(UserWarning, match="Compose draws at random"):
        assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("name", "arguments", "kept"),
    [
        ("StochasticWeightAveraging", {"swa_lrs": 0.01}, {"swa_lrs": 0.01}),  # its device is a torch.device
        ("Timer", {"duration": "00:01:00:00"}, {"interval": "step"}),  # by default a member of an enumeration
        ("ModelPruning", {"pruning_fn": "l1_unstructured"}, {"pruning_fn": "l1_unstructured"}),  # or a function
    ],
)
def test_arguments_that_yaml_does_not_have(name, arguments, kept, tmp_path):
    """jsonargparse would not dump them, or dump a text with which a run cannot be resumed."""
    words = [f"--trainer.callbacks.{key}={value}" for key, value in arguments.items()]
    run = fit(*SMALL, f"--trainer.callbacks+={name}", *words)
    callbacks = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["callbacks"]
    (saved,) = (callback["init_args"] for callback in callbacks if callback["class_path"].endswith(name))
    assert saved.items() >= kept.items()
    assert "Unable" not in str(saved)
    assert main(["test", "--run_dir", str(run)]) == 0
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "2"]) == 0


def test_no_recipe_is_needed_where_model_and_data_are_named(tmp_path):
    words = ["--model", "LitBlitzNet", "--data", "SyntheticCIFAR10", "--data.train_images", "100"]
    assert main(["fit", *words, "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]) == 0
    (run,) = (tmp_path / "runs" / "LitBlitzNet").iterdir()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["momentum"] == 0.9
    assert config["seed_everything"] == 0


def test_an_accelerator_is_a_class(capsys):
    fit(*SMALL, "--trainer.accelerator.class_path", "CPUAccelerator")
    assert main(["fit", *SMALL, "--trainer.accelerator", "CPUAccelerator"]) == 2
    assert "for a class: --trainer.accelerator.class_path CPUAccelerator" in capsys.readouterr().err


def test_what_every_run_gets_can_be_switched_off(tmp_path):
    off = ["--metrics_csv", "false", "--best_checkpoint", "false", "--last_checkpoint", "false"]
    assert files(fit(*SMALL, *off, run_dir="off")) == ["config.yaml"]
    no_checkpoints = fit(*SMALL, "--trainer.enable_checkpointing", "false", run_dir="none")
    assert files(no_checkpoints) == ["config.yaml", "metrics.csv"]


def test_test_validate_and_predict_take_a_run(tmp_path, capsys):
    run = fit(*SMALL)
    before = {name: (run / name).read_bytes() for name in files(run)}
    capsys.readouterr()
    assert main(["test", "--run_dir", "run"]) == 0
    tested = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert main(["validate", "--run_dir", "run", "--ckpt_path", "last"]) == 0
    validated = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(validated["val/loss"]) == pytest.approx(metrics(run)[3]["val/loss"], rel=1e-5)
    assert main(["predict", "--run_dir", "run"]) == 0
    with np.load(run / "predictions.npz") as file:
        assert file["outputs"].shape == (60, 10)
        classes = file["classes"]
    labels = SyntheticCIFAR10(200, 60).load().y_test.numpy()
    assert float(tested["test/acc"]) == pytest.approx((classes == labels).mean(), rel=1e-5)
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_run_is_evaluated_with_its_own_mean_and_deviation(tmp_path, capsys):
    """Measured anew, those of other training images, or of another part of them, would be applied."""
    run = fit(*SMALL)
    arrays = SyntheticCIFAR10(200, 60).load()
    train, test = (x.permute(0, 2, 3, 1).numpy() for x in (arrays.x_train // 2, arrays.x_test))
    np.savez("other.npz", x_train=train, y_train=arrays.y_train, x_test=test, y_test=arrays.y_test)

    def predicted(*words):
        assert main(["predict", "--run_dir", "run", *words]) == 0
        with np.load(run / "predictions.npz") as file:
            return file["outputs"]

    own = predicted()
    other = ["--data", "NpzDataModule", "--data.path", "other.npz"]
    for words in (["--data.val_size", "0"], other):
        assert np.array_equal(predicted(*words), own)
    assert not np.array_equal(predicted(*other, "--data.mean", "[0.5]"), own)
    # as older checkpoints are
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    del checkpoint["SyntheticCIFAR10"]
    torch.save(checkpoint, "older.ckpt")
    assert not np.array_equal(predicted(*other, "--ckpt_path", "older.ckpt"), own)


def test_a_dry_run_does_not_block_the_real_one(tmp_path):
    """Without it ``config.yaml`` stays, and the directory holds a run."""
    for place in ([], ["--run_dir", "run"]):
        assert main(["fit", *SMALL, *place, "--trainer.fast_dev_run", "true"]) == 0
        assert files(tmp_path) == []
    fit(*SMALL)
    assert files(tmp_path) == [f"run/{name}" for name in PROMISED]


@pytest.mark.parametrize("words", [["--resume", "run"], [*SMALL, "--ckpt_path", "run/checkpoints/last.ckpt"]])
def test_a_dry_run_goes_on_with_nothing(words, tmp_path, capsys):
    """Lightning trains no batch then, or names a ``max_epochs`` that nobody has typed."""
    fit(*SMALL)
    before = files(tmp_path)
    assert main(["fit", *words, "--trainer.fast_dev_run", "true"]) == 2
    assert "fast_dev_run begins anew" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_a_dry_run_that_fails_leaves_nothing(tmp_path):
    words = [*SMALL, "--trainer.fast_dev_run", "3", "--model.optimizer.lr", "1e30", "--model.activation", "relu"]
    assert main(["fit", *words]) == 1
    assert files(tmp_path) == []
    assert not (tmp_path / "runs").exists()


def test_the_best_weights_load_in_bare_torch(tmp_path):
    run = fit(*SMALL)
    code = (
        "import sys, torch\n"
        "from lit_basics.nets import LeNet5\n"
        "LeNet5().load_state_dict(torch.load('run/best.pth', weights_only=True))\n"
        "assert not any('lightning' in name for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=run.resolve().parent)


def test_a_home_folder_that_the_shell_has_not_expanded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    words = ["--config", "quickstart", "--data.train_images", "200", "--trainer.max_epochs", "1", "--run_dir=~/run"]
    assert main(["fit", *words]) == 0
    names = {path.name for path in (tmp_path / "home" / "run").iterdir()}
    assert names == {"config.yaml", "metrics.csv", "best.pth", "checkpoints"}
    assert main(["fit", *words, "--resume=auto"]) == 0
    assert main(["test", "--run_dir=~/run"]) == 0
    (tmp_path / "home" / "more.yaml").write_text("trainer: {max_epochs: many}\n")
    for flag in (["--config=~/more.yaml"], ["--config", "~/more.yaml"], ["-c", "~/nobody.yaml"]):
        assert main(["fit", *words[:2], *flag]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[-3:-1] == [f"lit_basics: trainer.max_epochs is many (in {tmp_path}/home/more.yaml); it must be int"] * 2
    )
    assert lines[-1].startswith("lit_basics: --config ~/nobody.yaml: the file does not exist")
    assert main(["fit", "--config=~/run/config.yaml", "--run_dir=~/run"]) == 2
    assert "the run would write over it" in capsys.readouterr().err
    assert not (tmp_path / "~").exists()


ARGUMENTS = """
from pathlib import Path
from jsonargparse.typing import Path_fr
from lit_basics import LitLeNet5

class Mine(LitLeNet5):
    def __init__(self, labels: Path_fr, more: list[Path_fr] | None = None, names: set[str] | None = None, **kwargs):
        super().__init__(**kwargs)
        assert [Path(path.absolute).read_text() for path in (labels, more[0])] == ["a", "b"]
"""


def test_paths_and_sets_mean_the_same_in_a_runs_config(tmp_path, mine, capsys):
    """The files lie relative to the working directory and to a config, and strings hash otherwise in each process."""
    words = ["--model", f"{mine(ARGUMENTS)}.Mine", "--model.labels", "labels.txt", "--config", "conf/my.yaml"]
    (tmp_path / "labels.txt").write_text("a")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "labels.txt").write_text("b")
    (tmp_path / "conf" / "my.yaml").write_text(
        "model: {init_args: {more: [labels.txt], names: [alpha, beta, gamma, delta, epsilon]}}\n"
    )
    own = ["fit", *SMALL, *words, "--run_dir", "run"]
    for seed, command in enumerate((own, [*own, "--resume", "auto"])):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        program = [sys.executable, "-m", "lit_basics", *command]
        done = subprocess.run(program, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "resuming with model" not in done.stdout
    assert main(["fit", "--resume", "run", "--trainer.max_epochs", "2"]) == 0
    assert "resuming with model" not in capsys.readouterr().out
    assert main(["test", "--run_dir", "run"]) == 0


def test_a_warning_shows_no_line_of_code(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    quiet()
    assert warnings.formatwarning("text", UserWarning, "file.py", 3, "code()") == "file.py:3: UserWarning: text\n"


def test_recipes_lists_and_prints(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert "quickstart" in listed
    assert "ddp" in listed
    assert main(["recipes", "quickstart"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == "LitLeNet5"


@pytest.mark.parametrize(
    ("words", "most"), [(["--help"], 40), ([], 40), (["recipes", "--help"], 40), (["--version"], 1)]
)
def test_help_is_short_and_version_is_one_line(words, most, capsys):
    assert main(words) == 0
    assert 0 < len(capsys.readouterr().out.splitlines()) <= most


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "lit_basics"]
    done = subprocess.run([*command, "fit", *SMALL], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    wrong = subprocess.run([*command, "fti"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr == "lit_basics: there is no command 'fti'; did you mean 'fit'?\n"


def test_what_lightning_was_asked_to_say_is_said(tmp_path):
    words = ["--trainer.enable_model_summary", "true", "--trainer.profiler", "simple"]
    command = [sys.executable, "-m", "lit_basics", "fit", *SMALL, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for said in ("Trainable params", "FIT Profiler Report"):
        assert said in done.stderr
    assert "stopped: `max_epochs=1` reached" not in done.stderr


def test_a_reader_that_goes_away_ends_no_run(tmp_path):
    """Without it the run ends in a BrokenPipeError, with nothing saved."""
    for words, unbuffered in (["recipes"], "1"), (["recipes"], ""), (["fit", *SMALL, "--run_dir", "run"], ""):
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "lit_basics", *words], stdout=writer, stderr=writer, env=environment
        )
        os.close(writer)
        assert done.returncode == 0
    assert files(tmp_path) == [f"run/{name}" for name in PROMISED]


def test_a_terminal_that_goes_away_ends_no_run(tmp_path):
    """Its writes fail otherwise than those to a pipe; without it the run ends within, with nothing saved."""
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "lit_basics", "fit", *SMALL, "--trainer.callbacks+=LossReport", "--run_dir", "run"]
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end)
    os.close(end)
    os.close(terminal)
    assert process.wait(120) == 0
    assert files(tmp_path) == [f"run/{name}" for name in PROMISED]


def test_a_log_on_a_full_disk_ends_no_run(tmp_path):
    """Without it the run ends in an OSError, with nothing saved; what is asked for may fail."""
    for words, ends in (["recipes"], False), (["fit", *SMALL, "--run_dir", "run"], True):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-m", "lit_basics", *words], stdout=full, stderr=full)
        assert (done.returncode == 0) == ends
    assert files(tmp_path) == [f"run/{name}" for name in PROMISED]


def test_a_letter_that_the_output_does_not_have_ends_no_run():
    """Without ``backslashreplace`` it is an error; a config, which is for a file, is not changed."""
    command = [sys.executable, "-m", "lit_basics", "fit", *SMALL, "--trainer.default_root_dir", "läufe"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = partial(subprocess.run, capture_output=True, text=True, env=environment)
    assert r"run directory: l\xe4ufe" in run([*command, "--run_dir", "läufe"], check=True).stdout
    assert run([*command, "--print_config"]).returncode == 2


def test_closed_streams_end_no_run(tmp_path):
    words = " ".join([*SMALL, "--trainer.enable_progress_bar", "true", "--run_dir", "run"])
    subprocess.run(["sh", "-c", f'exec "{sys.executable}" -m lit_basics fit {words} <&- >&- 2>&-'], check=True)
    assert files(tmp_path) == [f"run/{name}" for name in PROMISED]


def test_a_run_of_a_class_with_arguments_is_named_after_the_class():
    path = "lit_basics.nets.Square"
    model = json.dumps({"class_path": "LitObjective", "init_args": {"objective": path, "note": "a/b"}})
    assert run_name(["--model", model]) == "LitObjective"
    assert run_name(["--model=lit_basics.LitLeNet5"]) == "LitLeNet5"


def test_a_failing_run_keeps_its_rows_and_its_traceback(tmp_path):
    (tmp_path / "broken.py").write_text(
        "from lit_basics import LitBlitzNet\n\n\n"
        "class Broken(LitBlitzNet):\n"
        "    def compute_loss(self, batch, batch_idx):\n"
        "        if batch_idx == 2:\n"
        "            raise RuntimeError('a bug of the user')\n"
        "        return super().compute_loss(batch, batch_idx)\n"
    )
    words = ["--model", "broken.Broken", "--data", "SyntheticCIFAR10", "--trainer.log_every_n_steps", "1"]
    command = [sys.executable, "-m", "lit_basics", "fit", *words, "--run_dir", "run"]
    # without a path, python -m finds the module in the working directory
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 1
    assert "a bug of the user" in done.stderr
    assert "Traceback" in done.stderr
    assert list(metrics("run")) == [1, 2]


def test_a_fit_without_an_end_says_so():
    """``quiet`` once hid it."""
    words = ["--model", "LitLeNet5", "--data", "SyntheticCIFAR10", "--data.train_images", "100"]
    with pytest.warns(UserWarning, match="1000 epochs"):
        assert main(["fit", *words, "--data.test_images", "10", "--trainer.limit_train_batches", "0"]) == 0


def test_files_named_in_a_config_count_as_written(tmp_path):
    """Without ``walk_file`` what they hold is replaced by the classes' defaults, in silence."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "data.yaml").write_text(
        "class_path: SyntheticCIFAR10\ninit_args: {batch_size: 7, train_images: 50, test_images: 10}\n"
    )
    (tmp_path / "parts" / "sgd.yaml").write_text("class_path: torch.optim.SGD\ninit_args: {lr: 0.5, momentum: 0.7}\n")
    (tmp_path / "parts" / "mine.yaml").write_text(
        "data: data.yaml\nmodel:\n  class_path: LitLeNet5\n  init_args:\n    optimizer: sgd.yaml\n"
    )
    config = Config(["--config", "parts/mine.yaml"]).to_dict()
    assert config["data"]["init_args"]["batch_size"] == 7
    assert config["data"]["init_args"]["train_images"] == 50
    optimizer = config["model"]["init_args"]["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["momentum"]) == (0.5, 0.7)


OWN = """
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lit_basics import LitLeNet5, SyntheticCIFAR10

class Data(SyntheticCIFAR10):
    def __init__(self, annotations: str, **kwargs):
        super().__init__(**kwargs)
        self.annotations = annotations

class Twice(Data):
    def predict_dataloader(self):
        return [super().predict_dataloader(), super().predict_dataloader()]

class Placed(LitLeNet5):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return super().predict_step(batch, batch_idx)

class Silent(LitLeNet5):
    def test_step(self, batch, batch_idx):
        pass

class Exact(LitLeNet5):
    def predict_step(self, batch, batch_idx):
        return self.value.repeat(len(batch[0]))

class Chooses(LitLeNet5):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

class Changes(LitLeNet5):
    def configure_optimizers(self):
        return super().configure_optimizers()

class Named(Chooses):
    def __init__(self, optimizer_name: str = "Adam", **kwargs):
        super().__init__(**kwargs)

class Untyped(LitLeNet5):
    def __init__(self, width, depth: int = 1, **kwargs):
        super().__init__(**kwargs)

class Scalar(LitLeNet5):
    def predict_step(self, batch, batch_idx):
        return batch[0].mean()

class Doubles(Exact):
    value = torch.tensor(1 + 1e-12, dtype=torch.float64)

class Numbers(Exact):
    value = torch.tensor(2**24 + 1)

class Brains(Exact):
    value = torch.tensor(1.5, dtype=torch.bfloat16)

class Words(DummyLogger):
    def __init__(self, prefix: str = "x"):
        super().__init__()
"""


@pytest.fixture
def own(mine):
    return mine(OWN, "own_in_a_test")


def test_a_data_file_named_as_text_is_not_read(own, tmp_path):
    """Read as YAML, tabs are an error, and so are many values."""
    (tmp_path / "train.json").write_text('{\n\t"images": [' + ", ".join(map(str, range(10_001))) + "]}\n")
    words = ["--model", "LitLeNet5", "--data", f"{own}.Data", "--data.annotations"]
    assert Config([*words, "train.json"]).to_dict()["data"]["init_args"]["annotations"] == "train.json"


def test_a_logger_without_a_folder_and_a_test_that_logs_nothing(own, capsys):
    """With ``save_dir`` the logger cannot be made; without metrics the data was said to have no images."""
    run = fit(*SMALL, "--model", f"{own}.Silent", "--trainer.logger", f"{own}.Words")
    capsys.readouterr()
    assert main(["test", "--run_dir", str(run)]) == 0
    assert capsys.readouterr().out == "Silent logs no metric\n"


@pytest.mark.parametrize(
    ("name", "dtype", "value"),
    [("Doubles", "float64", 1 + 1e-12), ("Numbers", "int64", 2**24 + 1), ("Brains", "float32", 1.5)],
)
def test_predictions_keep_their_dtype(name, dtype, value, own):
    """As float32 the first two are 1 and 2**24."""
    run = fit(*SMALL, "--model", f"{own}.{name}")
    assert main(["predict", "--run_dir", str(run)]) == 0
    with np.load(run / "predictions.npz") as file:
        assert file["outputs"].dtype == dtype
        assert set(file["outputs"].tolist()) == {value}


def test_predictions_of_several_loaders_come_one_after_the_other(own):
    """Lightning returns a list of each, and ``predict_step`` was said to."""
    data = ("--data", f"{own}.Twice", "--data.annotations", "none", *SMALL[2:])
    run = fit("--model", f"{own}.Placed", *data)
    assert main(["predict", "--run_dir", str(run)]) == 0
    with np.load(run / "predictions.npz") as file:
        first, second = np.split(file["outputs"], 2)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("words", [["--model.optimizer", "SGD"], ["--model.lr_scheduler", "ConstantLR"]])
def test_an_optimizer_that_has_no_effect_is_refused(words, own, tmp_path, capsys):
    """It was written into ``config.yaml``, and the module trained with its own."""
    more = ["--trainer.enable_progress_bar", "false", "--run_dir", "run"]
    assert main(["fit", *SMALL, "--model", f"{own}.Chooses", *words, *more]) == 2
    said = f"{words[0]} has no effect: Chooses.configure_optimizers makes others; leave it out"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    run = fit(*SMALL, "--model", f"{own}.Chooses")
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "2"]) == 0  # config.yaml has one, too
    fit(*SMALL, "--model", f"{own}.Changes", *words, run_dir="other")
    fit(*SMALL, "--model", f"{own}.Named", "--model.optimizer_name", "Adam", run_dir="named")  # of its own


def test_an_argument_without_a_type_is_needed_too(own, capsys):
    """jsonargparse gives it None."""
    words = ["--model", f"{own}.Untyped", "--print_config"]
    assert main(["fit", *SMALL, *words]) == 2
    assert f"model: {own}.Untyped needs width" in capsys.readouterr().err
    for value in ("3", "null"):
        assert main(["fit", *SMALL, *words, "--model.width", value]) == 0
        assert f"width: {value}\n" in capsys.readouterr().out


def test_a_module_that_is_not_there_is_said_to_be(own, capsys, monkeypatch):
    """``--allow_import`` was advised, which would not help."""
    assert main(["fit", *SMALL, "--model", "own_in_a_tst.Silent"]) == 2
    said = "model: there is no module own_in_a_tst for own_in_a_tst.Silent; did you mean 'own_in_a_test'?"
    assert said in capsys.readouterr().err
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != Path.cwd()])
    assert main(["fit", *SMALL, "--model", "own_in_a_tst.Silent"]) == 2
    assert "; python -m lit_basics finds those in the working directory" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "verify"])
def test_no_data_is_wrong_input(command, capsys):
    """Of ``verify`` each check failed by Lightning's exception."""
    assert main([command, "--model", "LitLeNet5"]) == 2
    assert "which data? LitLeNet5 has none of its own: --data CLASS" in capsys.readouterr().err


def test_plain_weights_are_no_checkpoint(capsys):
    """ "damaged", of the run's own file."""
    run = fit(*SMALL)
    for words in (["fit", *SMALL, "--run_dir", "other"], ["test", *SMALL]):
        assert main([*words, "--ckpt_path", str(run / "best.pth")]) == 2
        assert "best.pth holds weights only; a run goes on from a .ckpt" in capsys.readouterr().err


def test_predictions_that_are_no_rows_are_refused(own, capsys):
    """torch's error about zero-dimensional tensors, with its traceback."""
    run = fit(*SMALL, "--model", f"{own}.Scalar")
    capsys.readouterr()
    assert main(["predict", "--run_dir", str(run)]) == 2
    assert "Scalar.predict_step returns shapes (); predict writes (N, …)" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--trainer.limit_train_batches", "1"], ["--config", "one.yaml"]])
def test_one_batch_is_one_batch(words, tmp_path):
    """As ``float | int``, which Lightning's annotation says, 1 was 1.0: the whole epoch."""
    (tmp_path / "one.yaml").write_text("trainer: {limit_train_batches: 1}\n")
    fit(*SMALL, *words)
    assert len(metrics("run")) == 1
    limits = ["--trainer.limit_val_batches", "1", "--trainer.limit_test_batches=1.0"]
    settings = Config([*SMALL, *words, *limits]).to_dict()["trainer"]
    kinds = [type(settings[f"limit_{stage}_batches"]) for stage in ("train", "val", "test", "predict")]
    assert kinds == [int, int, float, type(None)]


def test_the_directory_of_a_run_is_typed(tmp_path, capsys):
    """Without the refusal the run goes elsewhere and nothing is resumed."""
    (tmp_path / "mine.yaml").write_text("run_dir: a/b\n")
    assert main(["fit", "--config", "quickstart", "--config", "mine.yaml"]) == 2
    assert "run_dir is typed, never part of a config: --run_dir a/b" in capsys.readouterr().err


def test_a_run_is_named_after_its_config_or_its_model():
    """An overlay is a name only where there is no other: runs of all models that take it would share a folder."""
    assert run_name(["--config", "quickstart", "--config", "ddp"]) == "quickstart"
    assert run_name(["--config", "manual", "--model", "LitLeNet5"]) == "LitLeNet5"
    assert run_name(["--config", "manual", "--config", "mine/own.yaml", "--model", "LitLeNet5"]) == "own"
    assert run_name(["--config", "manual"]) == "manual"
    assert run_name(["--model", "mine/net.yaml"]) == "net"  # not "yaml", which all such runs would share


def test_a_key_is_not_proposed_for_itself(capsys):
    """``model.optimizer.lr`` is a key of most modules, and not of this one."""
    assert main(["fit", "--config", "muon", "--model.optimizer.lr", "0.1"]) == 2
    assert "did you mean 'model.optimizer.lr'" not in capsys.readouterr().err
