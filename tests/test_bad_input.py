"""Wrong input: exit code 2, one short message that names the value, the place and what is valid, nothing lost."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import quiet_trainer

from lit_basics import UserError
from lit_basics.checkpoint_files import load_checked
from lit_basics.cli import main
from lit_basics.run_files import has_stepped
from lit_basics.tracebacks import is_restoring, own_frames

SMALL = (
    *("--data", "SyntheticCIFAR10", "--data.train_images", "100", "--data.test_images", "20"),
    *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
)
QUICK = ("fit", "--config", "quickstart")
DATA = "model: LitLeNet5\ndata: {class_path: SyntheticCIFAR10, init_args: {train_images: 100}}\n"


def snapshot(folder):
    """Return every file's content, and None for every folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


@pytest.fixture
def refused(tmp_path, capsys):
    def check(words, *fragments):
        capsys.readouterr()
        before = snapshot(tmp_path)
        code = main([str(word) for word in words])
        message = capsys.readouterr().err
        assert_short(message, *fragments)
        assert code == 2
        assert snapshot(tmp_path) == before
        return message

    return check


def assert_short(message, *fragments):
    assert message.startswith("lit_basics: "), message
    assert len(message.rstrip("\n").splitlines()) <= 2, message
    assert len(message) < 400, message
    for no in ("Traceback", "Union", "Namespace", "jsonargparse", "Expected a"):
        assert no not in message
    for fragment in fragments:
        assert fragment in message, message


# the command line


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("ft --config quickstart", ["'ft'", "'fit'"]),
        ("quickstart", ["'quickstart'", "fit, predict"]),
        ("fit", ["fit --config quickstart", "SyntheticCIFAR10"]),
        ("fit --config gpu", ["which model?"]),
        ("fit --data SyntheticCIFAR10", ["which model?"]),
        ("fit quickstart", ["'quickstart' stands alone", "'--config quickstart'"]),
        ("fit --config quickstart manual", ["'manual' stands alone", "'--config manual'"]),
        ("fit --config quickstart --trainer.max_epochs 3 4", ["'4' stands alone"]),
        ("fit --config quickstart --trainer.gradient_clip_val=-1", ["gradient_clip_val is -1; it must be 0 or more"]),
        ("fit --config", ["--config needs a value"]),
        ("fit --config quickstart --run_dir", ["--run_dir needs a value"]),
        ("fit --config quickstart --resume --print_config", ["--resume needs a value"]),
        ("test --run_dir --ckpt_path last", ["--run_dir needs a value"]),
        ("test --config quickstart --ckpt_path ~best.ckpt", ["there is no checkpoint ~best.ckpt"]),
        ("test --config quickstart --ckpt_path s3://a/best.ckpt", ["s3://a/best.ckpt is remote"]),
        ("recipes quikstart", ["'quikstart'", "'quickstart'"]),
        # a recipe
        ("fit --config quikstart", ["'quikstart'", "'quickstart'"]),
        ("fit --config=quikstart", ["'quikstart'", "'quickstart'"]),
        ("fit -c=quikstart", ["'quikstart'", "'quickstart'"]),
        ("fit --config quickstart --config gpus", ["'gpus'", "'gpu'"]),
        ("fit --config quickstart.yaml", ["quickstart.yaml", "does not exist", "'quickstart'"]),
        ("fit --config ./nowhere", ["./nowhere", "does not exist"]),
        ("fit --config .", ["folder"]),
        ("fit --config= quickstart", ["--config needs a value"]),
        ("fit --config quickstart --data.batch_size", ["--data.batch_size needs a value"]),
        ("fit --config quickstart --data.batch_size=8 --data.seed", ["--data.seed needs a value"]),
        ("fit --config quickstart --data.batch_size --trainer.max_epochs 1", ["--data.batch_size needs a value"]),
        ("fit --config quickstart --model.optimizer.lr -1e-3", ["is one after =: --model.optimizer.lr=-1e-3"]),
        ("fit --config quickstart --model --data SyntheticCIFAR10", ["--model needs a value"]),
        # an option
        ("fit --confg quickstart", ["--confg", "'--config'"]),
        ("fit --config quickstart --trainer.max_epoch 3", ["--trainer.max_epoch", "'--trainer.max_epochs'"]),
        ("fit --config quickstart --trainer.max-epochs 3", ["'--trainer.max_epochs'"]),
        ("fit --config quickstart --run-dir x", ["'--run_dir'"]),
        ("fit --config quickstart --epochs 3", ["'--trainer.max_epochs'"]),
        ("fit --config quickstart --lr 0.1", ["'--model.optimizer.lr'"]),
        ("fit --config quickstart --optimizer Adam", ["'--model.optimizer'"]),
        ("fit --config quickstart --batch-size 4", ["'--data.batch_size'"]),
        ("fit --config quickstart --seed 1", ["'--seed_everything'"]),
        ("fit --config quickstart --allow-import mine", ["'--allow_import'"]),
        ("fit --config quickstart --allow_imports=mine", ["'--allow_import'"]),
        ("verify --config quickstart --check loop", ["no option --check; did you mean '--checks'"]),
        ("verify --config quickstart --step=3", ["no option --step; did you mean '--steps'"]),
        ("verify --config quickstart --checks loop,resumes", ["no check 'resumes'; did you mean 'resume'"]),
        ("verify --config quickstart --checks loop,_", ["no check '_'; choose from ddp, kill, loop, manual, resume"]),
        ("fit -lr 0.1", ["-lr", "'--model.optimizer.lr'"]),
        ("fit —config quickstart", ["—config", "'--config'"]),  # two hyphens made a dash
        # a key
        ("fit --config quickstart --model.optimzer Adam", ["model.optimzer", "'model.optimizer'"]),
        ("fit --config quickstart --model.lr 0.1", ["model.lr", "'model.optimizer.lr'"]),
        ("fit --config quickstart --data.batchsize 4", ["data.batchsize", "'data.batch_size'"]),
        ("fit --config quickstart --model.optimizer.momentun 0.9", ["'model.optimizer.momentum'"]),
        (
            "fit --config quickstart --model.optimizer Adam --model.optimizer.momentum 0.9",
            ["model.optimizer.momentum", "betas"],
        ),
        ("fit --config muon --model.optimizer.matrices.lrr 1", ["'model.optimizer.matrices.lr'"]),
        # a class
        ("fit --config quickstart --model LitLenet", ["model", "LitLenet", "'LitLeNet5'"]),
        ("fit --config quickstart --model lit_basics.LitLenet5", ["lit_basics.LitLenet5", "'LitLeNet5'"]),
        ("fit --config quickstart --model torch.nn.Linear", ["torch.nn.Linear", "LightningModule"]),
        ("fit --model mine.Mine", ["mine.Mine", "python -m lit_basics"]),
        ("fit --config quickstart --data NpzDatModule", ["NpzDatModule", "'NpzDataModule'"]),
        ("fit --config quickstart --trainer.callbacks GradMonitor", ["GradMonitor", "'GradientMonitor'"]),
        ("fit --config quickstart --trainer.callbacks+ EarlyStoping", ["EarlyStoping", "'EarlyStopping'"]),
        (
            "fit --config quickstart --trainer.callbacks+ LossReport --trainer.callbacks+ LossReport",
            ["more than one stateful callback", "LossReport"],
        ),
        ("fit --config quickstart --trainer.logger CSVLoger", ["CSVLoger", "'CSVLogger'"]),
        ("fit --model LitClassifier --model.net LeNt5", ["model.net", "LeNt5", "'LeNet5'"]),
        ("fit --model LitClassifier --model.net torch.nn.Linea", ["torch.nn.Linea", "'Linear'"]),
        ("fit --config quickstart --data.transform torchvision.transforms.v2.RandomFlp", ["RandomFlp"]),
        ("fit --config quickstart --data.transform RandomInvrt", ["RandomInvrt", "'RandomInvert'"]),
        ("fit --config quickstart --data.transform RandomInvert", ["torchvision.transforms.v2.RandomInvert"]),
        ("fit --config quickstart --data.transform torch.optim.SGD", ["transform is torch.optim.SGD, which", "Module"]),
        # an optimizer, a scheduler
        ("fit --config quickstart --model.optimizer Adm", ["model.optimizer", "Adm", "'Adam'"]),
        ("fit --config quickstart --model.optimizer adam", ["adam", "'Adam'"]),
        ("fit --config quickstart --model.optimizer torch.optim.Adm", ["torch.optim.Adm", "'Adam'"]),
        ("fit --config quickstart --model.optimizer torch.nn.Linear", ["torch.nn.Linear", "Optimizer"]),
        ("fit --config muon --model.optimizer.matrices Muo", ["model.optimizer.matrices", "Muo", "'Muon'"]),
        ("fit --config quickstart --model.lr_scheduler StepLr", ["model.lr_scheduler", "StepLr", "'StepLR'"]),
        ("fit --config quickstart --model.lr_scheduler StepLR", ["StepLR", "step_size"]),
        (
            "fit --config quickstart --model.lr_scheduler OneCycleLR --model.lr_scheduler.max_lr 0.1",
            ["lr_scheduler cannot be made", "total_steps"],
        ),
        (
            "fit --config quickstart --model.lr_scheduler ReduceLROnPlateau",
            ["torch.optim.lr_scheduler.ReduceLROnPlateau"],
        ),
        # what is missing
        ("fit --config quickstart --data NpzDataModule", ["NpzDataModule", "needs path"]),
        ("fit --model LitClassifier --data SyntheticCIFAR10", ["LitClassifier", "needs net"]),
        # a type
        ("fit --config quickstart --trainer.max_epochs many", ["trainer.max_epochs is many", "must be int"]),
        ("fit --config quickstart --data.batch_size 1.5", ["data.batch_size is 1.5", "must be int"]),
        ("fit --config quickstart --model.optimizer.lr fast", ["model.optimizer.lr is fast", "be float"]),
        ("fit --config blitz --model.optimizer.parms 1", ["no key model.optimizer.parms", "mean 'model.optimizer'?"]),
        ("fit --config blitz --model.optimizer LeanSDG", ["no class LeanSDG; did you mean 'LeanSGD'?"]),
        ("fit --config quickstart --model.num_classes ten", ["model.num_classes is ten", "must be int"]),
        ("fit --config quickstart --model.activation swish", ["model.activation is swish", "'tanh', 'relu'"]),
        ("fit --config quickstart --trainer.precision 17", ["trainer.precision is 17", "'bf16-mixed'"]),
        ("fit --config quickstart --trainer.callbacks.every_n_steps x", ["every_n_steps is x", "must be int"]),
        ("fit --config muon --model.optimizer.matrices.lr x", ["matrices.lr is x", "must be float"]),
        ("fit --config quickstart --metrics_csv maybe", ["metrics_csv is maybe", "bool"]),
        ("fit --config quickstart --trainer.max_epochs=", ["trainer.max_epochs is empty", "must be int"]),
        ("fit --config quickstart --data.mean 0.5", ["data.mean is 0.5", "a list"]),
        (
            "fit --config quickstart --config wandb --trainer.logger.name [a]",
            ["trainer.logger.name is read as YAML, ['a']; a --config file takes it as text, in quotes"],
        ),
        # a range
        ("fit --config quickstart --seed_everything -1", ["seed_everything is -1", "from 0"]),
        ("fit --config quickstart --trainer.log_every_n_steps 0", ["log_every_n_steps is 0", "at least 1"]),
        ("fit --config quickstart --trainer.accumulate_grad_batches 0", ["accumulate_grad_batches is 0"]),
        ("fit --config quickstart --data.batch_size 0", ["batch_size is 0", "at least 1"]),
        ("fit --config linear --data.batch_size 0", ["batch_size is 0", "at least 1"]),
        ("fit --config quickstart --data.val_size 1.5", ["val_size is 1.5", "[0, 1)"]),
        ("fit --config quickstart --data.val_size -1", ["val_size is -1"]),
        ("fit --config quickstart --data.train_images 0", ["train_images is 0"]),
        ("fit --config quickstart --model.lr_interval day", ["lr_interval is 'day'", "'step'"]),
        # the Trainer
        ("fit --config quickstart --trainer.accelerator cudda", ["cudda", "'cuda'"]),
        ("fit --config quickstart --trainer.strategy ddpp", ["ddpp", "'ddp'"]),
        ("fit --config quickstart --trainer.strategy ddp_spawn", ["strategy: ddp_spawn is", "by command it is ddp"]),
        (
            "fit --config quickstart --trainer.strategy none",
            ["ddp_find_unused_parameters_true, deepspeed"],
        ),
        (
            "fit --config quickstart --trainer.strategy DDPStrategy",
            ["no strategy DDPStrategy; for a class: --trainer.strategy.class_path DDPStrategy"],
        ),
        ("test --config quickstart --trainer.strategy ddp_fork_find_unused_parameters_true", ["it is ddp"]),
        (
            "fit --config quickstart --trainer.strategy DDPStrategy --trainer.strategy.start_method forkserver",
            ["start_method='forkserver' is", "by command it is ddp"],
        ),
        ("fit --config quickstart --trainer.devices two", ["devices"]),
        ("fit --config quickstart --trainer.devices 0", ["devices"]),
        ("fit --config quickstart --trainer.max_epochs -5", ["max_epochs", "-5"]),
        ("fit --config quickstart --trainer.limit_train_batches 2.5", ["limit_train_batches", "2.5"]),
        ("fit --config quickstart --trainer.val_check_interval 0", ["val_check_interval is 0", "at least 1"]),
        (
            "fit --config quickstart --trainer.val_check_interval 1000",
            ["val_check_interval", "(1000)", "less than"],
        ),
        (
            "fit --config quickstart --trainer.accumulate_grad_batches 2 "
            '--trainer.callbacks+={"class_path":"GradientAccumulationScheduler","init_args":{"scheduling":{"1":2}}}',
            ["`accumulate_grad_batches`", "GradientAccumulationScheduler"],
        ),
        (f"fit --config quickstart --trainer.val_check_interval {'x' * 9000}", ["val_check_interval", "DD:HH:MM:SS"]),
        # a run, a checkpoint
        ("test", ["--run_dir"]),
        ("test --run_dir nowhere", ["nowhere", "no run"]),
        ("test --config quickstart", ["--ckpt_path"]),
        ("test --config quickstart --ckpt_path nowhere.ckpt", ["nowhere.ckpt"]),
    ],
)
def test_words(refused, line, fragments):
    refused(line.split(), *fragments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_a_gpu(refused):
    refused([*QUICK, "--config", "gpu"], "trainer.accelerator is gpu", "cpu")


# config files


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        (None, ["does not exist"]),
        ("", ["is empty"]),
        ("# nothing\n", ["is empty"]),
        ("- a\n- b\n", ["holds a list"]),
        ("hello", ["holds a str"]),
        (bytes(range(256)), ["not a YAML text file"]),
        (b"\x00\x01", ["not a YAML text file"]),
        ("trainer:\n  max_epochs: [1\n", ["not a YAML text file", "line 3"]),
        ("a: b\n\tc: 4\n", ["not a YAML text file", "line 2"]),
        ("a: " + "[" * 2_000, ["not a YAML text file"]),
        ("trainer: 3\nmodel: LitLeNet5\n", ["trainer is 3"]),
        ("3: 4\nmodel: LitLeNet5\n", ["3", "my.yaml"]),
        ("model: 3\n", ["model is 3", "my.yaml", "class_path"]),
        ("model: LitLeNet5\ndata: [SyntheticCIFAR10]\n", ["SyntheticCIFAR10", "class_path"]),
        ("model:\n  clas_path: LitLeNet5\n", ["clas_path", "class_path"]),
        ("model:\n  class_path: LitLeNet5\n  optimizer: SGD\n", ["model holds more than class_path"]),
        ("model: LitLeNet5\nmodel.optimizer: SGD\n", ["model", "'optimizer'"]),
        (DATA + "trainr:\n  max_epochs: 1\n", ["trainr", "'trainer'"]),
        (DATA + "trainer:\n  max_epoch: 1\n", ["trainer.max_epoch", "'trainer.max_epochs'"]),
        (DATA + "trainer:\n  max_epochs: many\n", ["trainer.max_epochs is many", "must be int"]),
        (DATA + "trainer:\n  callbacks:\n  - class_path: GradMonitor\n", ["GradMonitor", "'GradientMonitor'"]),
        (
            DATA + "trainer: {callbacks: [{class_path: GradientMonitor, init_args: {every: 3}}]}\n",
            ["trainer.callbacks.every", "'trainer.callbacks.every_n_steps'"],
        ),
        (
            DATA + "trainer: {callbacks: [{class_path: GradientMonitor, init_args: {every_n_steps: x}}]}\n",
            ["trainer.callbacks.every_n_steps is x", "must be int"],
        ),
        ("model: {class_path: LitLeNet5, init_args: {optimzer: Adam}}\n", ["'model.optimizer'"]),
        ("model: {class_path: LitLeNet5, init_args: {optimzer: {class_path: Adam}}}\n", ["'model.optimizer'"]),
        ("model: {class_path: LitLenet5}\n", ["LitLenet5", "'LitLeNet5'"]),
        ("model: {class_path: LitLeNet5, init_args: {optimizer: {class_path: Adm}}}\n", ["Adm", "'Adam'"]),
        (
            "model: {class_path: LitLeNet5, init_args: {optimizer: {class_path: Adam, init_args: {lr: x}}}}\n",
            ["model.optimizer.lr is x", "must be float"],
        ),
        (
            "model: {class_path: LitClassifier, init_args: {net: {class_path: torch.nn.Linear}}}\n",
            ["torch.nn.Linear", "in_features"],
        ),
        ("model: LitLeNet5\ndata: {class_path: SyntheticCIFAR10, init_args: {batch_size: big}}\n", ["big"]),
        # null, or nothing after the colon
        (DATA + "seed_everything: null\n", ["seed_everything is null", "must be bool or int"]),
        (DATA + "non_finite_guard:\n", ["non_finite_guard is null", "must be bool"]),
        (DATA + "last_checkpoint:\n", ["last_checkpoint is null", "must be bool"]),
        (DATA + "trainer:\n  strategy:\n", ["trainer.strategy is null", "must be str"]),
        (DATA.replace("100", ""), ["data.train_images is null", "must be int"]),
        (
            "model: {class_path: LitLeNet5, init_args: {optimizer: {class_path: Adam, init_args: {lr: }}}}\n",
            ["model.optimizer.lr is null", "must be float"],
        ),
        ("model: {class_path: LitLeNet5, init_args: {optimizer: null}}\n", ["model.optimizer is null", "be a class"]),
        (
            DATA + "trainer: {callbacks: [{class_path: GradientMonitor, init_args: {every_n_steps: }}]}\n",
            ["trainer.callbacks.every_n_steps is null", "must be int"],
        ),
    ],
)
def test_config_files(refused, tmp_path, text, fragments):
    path = tmp_path / "my.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(["fit", "--config", "my.yaml"], *fragments)
    if fragments != ["trainer is 3"]:
        assert "my.yaml" in message


def test_the_nearest_file_is_suggested(refused, tmp_path):
    (tmp_path / "config.yaml").write_text(DATA)
    refused(["fit", "--config", "confg.yaml"], "confg.yaml", "did you mean 'config.yaml'?")


@pytest.mark.parametrize(
    "words", [["--config", "a.yaml", "--config=b.yaml"], ["--config=a.yaml", "--config", "b.yaml"]]
)
def test_the_last_file_with_the_key_is_named(words, refused, tmp_path):
    """Spelling by spelling, a.yaml comes last."""
    (tmp_path / "a.yaml").write_text(DATA)
    (tmp_path / "b.yaml").write_text("data: {init_args: {batch_size: big}}\n")
    refused(["fit", *words], "data.batch_size is big (in b.yaml)")


@pytest.mark.parametrize(
    "words",
    [
        ["--data.init_args.batch_size", "big"],
        ["--data", '{"class_path": "SyntheticCIFAR10", "init_args": {"batch_size": "big"}}'],
        ["--data={class_path: SyntheticCIFAR10, init_args: {batch_size: big}}"],
    ],
)
def test_a_file_is_not_blamed_for_what_was_typed(words, refused, tmp_path):
    (tmp_path / "my.yaml").write_text(DATA.replace("100", "100, batch_size: 4"))
    assert "my.yaml" not in refused(["fit", "--config", "my.yaml", *words], "data.batch_size is big; it must be int")


def test_a_config_from_a_pipe(refused):
    descriptor, end = os.pipe()
    os.close(end)
    refused(["fit", "--config", f"/dev/fd/{descriptor}"], "is a pipe or a device; save it to a file first")
    os.close(descriptor)


# data


def arrays(**changes):
    whole = {
        "x_train": np.zeros((8, 32, 32, 3), np.uint8),
        "y_train": np.arange(8) % 2,
        "x_test": np.zeros((4, 32, 32, 3), np.uint8),
        "y_test": np.arange(4) % 2,
    }
    return {key: value for key, value in {**whole, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (arrays(y_test=None), ["lacks the key y_test", "x_train, y_train, x_test"]),
        (arrays(x_train=np.zeros((8, 32, 32, 4), np.uint8)), ["x_train has shape (8, 32, 32, 4)"]),
        (arrays(x_train=np.zeros((8, 3, 32, 32), np.uint8)), ["x_train has shape", "(N, H, W, 3)"]),
        (arrays(x_train=np.zeros((0, 32, 32, 3), np.uint8)), ["x_train has shape (0, 32, 32, 3)"]),
        (arrays(x_test=np.zeros((4, 28, 28, 3), np.uint8)), ["x_test", "(28, 28, 3)"]),
        (arrays(x_train=np.zeros((8, 32, 32, 3))), ["x_train has dtype float64", "uint8"]),
        (arrays(y_train=np.zeros(8)), ["y_train has dtype float64", "integer"]),
        (arrays(y_train=np.zeros(7, int)), ["y_train has shape (7,)", "8 images"]),
        (arrays(y_test=np.zeros((4, 2), int)), ["y_test has shape (4, 2)"]),
        (arrays(y_train=np.arange(8) - 1), ["y_train has labels from -1"]),
        (arrays(y_train=np.arange(8) + 5), ["labels go up to 12", "num_classes is 10"]),
        (arrays(y_test=np.arange(4) + 10), ["labels go up to 13", "num_classes is 10"]),
        (arrays(y_train=np.array([object()] * 8)), ["pickled objects"]),
        (b"this is text", ["damaged"]),
        (b"", ["damaged"]),
        (b"PK\x03\x04 but not a zip", ["damaged"]),
    ],
)
def test_npz(refused, tmp_path, content, fragments):
    path = tmp_path / "d.npz"
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
    words = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    message = refused(
        ["fit", "--model", "LitLeNet5", "--data", "NpzDataModule", "--data.path", "d.npz", *words], *fragments
    )
    assert "d.npz" in message or "num_classes" in message


def test_a_truncated_npz(refused, tmp_path):
    np.savez(tmp_path / "d.npz", **arrays())
    whole = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(whole[: len(whole) // 2])
    refused([*QUICK, "--data", "NpzDataModule", "--data.path", "d.npz"], "d.npz", "damaged")


def test_a_damaged_compressed_npz(refused, tmp_path):
    images = np.random.default_rng(0).integers(0, 4, (8, 32, 32, 3), np.uint8)
    np.savez_compressed(tmp_path / "d.npz", **arrays(x_train=images))
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[60:100] = bytes(40)  # of x_train: zlib finds that it cannot go on
    (tmp_path / "d.npz").write_bytes(content)
    refused([*QUICK, "--data", "NpzDataModule", "--data.path", "d.npz"], "d.npz", "damaged")


def test_an_npz_with_a_member_that_is_no_array(refused, tmp_path):
    np.savez(tmp_path / "d.npz", **arrays(x_test=None))
    with zipfile.ZipFile(tmp_path / "d.npz", "a") as file:
        file.writestr("x_test", "text")
    refused([*QUICK, "--data", "NpzDataModule", "--data.path", "d.npz"], "d.npz: x_test has dtype")


def test_a_name_that_is_too_long(refused):
    refused(["fit", "--config", "a" * 300 + ".yaml"], "File name too long")


def test_a_date_that_is_none(refused, tmp_path):
    (tmp_path / "d.yaml").write_text("seed_everything: 2025-02-30\n")
    refused(["fit", "--config", "d.yaml"], "d.yaml: not a YAML text file", "day is out of range")


def test_what_the_users_own_code_says_when_it_exits(mine, capsys):
    text = "import lit_basics, sys\nclass Mine(lit_basics.LitLeNet5):\n"
    text += "    def setup(self, stage):\n        sys.exit('no images')"
    assert main([*QUICK, "--model", f"{mine(text)}.Mine"]) == 1
    assert "no images" in capsys.readouterr().err


def test_a_missing_npz(refused):
    refused([*QUICK, "--data", "NpzDataModule", "--data.path", "no.npz"], "data.path", "no.npz")


def test_a_data_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    words = ["fit", "--config", "blitz", "--data.data_dir", "file/data"]
    refused(words, "data folder file/data", "Not a directory", "--data.data_dir")


def test_too_many_validation_images(refused):
    refused([*QUICK, *SMALL, "--data.val_size", "100"], "val_size is 100", "only 100 training images")


@pytest.mark.parametrize(
    "words", [["quickstart", "--data.image_seed"], ["linear", "--data.seed"], ["quickstart", "--data.seed"]]
)
def test_a_negative_seed(refused, words):
    refused(["fit", "--config", *words, "-1"], f"{words[1].removeprefix('--data.')} is -1; it must be 0 or more")


def test_a_crop_as_large_as_the_image(refused):
    refused([*QUICK, *SMALL, "--data.crop", "32"], "crop is 32", "32 pixels")


# what torch finds out


@pytest.mark.parametrize("mode", [[], ["--config", "manual"]])
@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--model.optimizer", "Muon"], ["Muon", "2D"]),
        (["--model.optimizer", "SparseAdam"], ["SparseAdam", "dense", "Adam"]),
        (["--model.optimizer.lr", "-1"], ["learning rate", "-1"]),
        (["--model.optimizer.lr=-1"], ["learning rate", "-1"]),
        (["--model.optimizer.momentum", "-1"], ["momentum", "-1"]),
        (["--model.num_classes", "5"], ["labels go up to 9", "num_classes is 5"]),
    ],
)
def test_optimizers_and_nets_that_cannot_work(refused, mode, words, fragments):
    refused([*QUICK, *mode, *SMALL, *words], *fragments)


def test_dense_optimizer_on_sparse_gradients(refused):
    refused(["fit", "--config", "embedding", "--model.optimizer", "Adam"], "Adam", "sparse", "SparseAdam")


def test_paired_optimizer_without_matrices(refused):
    words = ["--model.optimizer", "PairedOptimizer", "--model.optimizer.matrices", "Muon"]
    refused(["fit", "--config", "linear", *words, "--model.optimizer.rest", "SGD"], "2-D")


@pytest.mark.parametrize("mode", [[], ["--config", "manual"]])
def test_plateau_that_monitors_an_unknown_key(capsys, tmp_path, mode):
    scheduler = ["--model.lr_scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau"]
    assert main([*QUICK, *mode, *SMALL, *scheduler, "--model.lr_monitor", "val/los"]) == 2
    assert_short(capsys.readouterr().err, "ReduceLROnPlateau", "val/los", "val/loss")


def test_manual_mode_of_a_module_with_its_own_training_step(refused, mine):
    name = mine(
        "from lit_basics import LitLeNet5\n\n\n"
        "class OwnStep(LitLeNet5):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        return self.compute_loss(batch, batch_idx)\n"
    )
    manual = [*SMALL, "--model.automatic_optimization", "false"]
    refused(["fit", "--model", f"{name}.OwnStep", *manual], "OwnStep", "training_step", "compute_loss")
    refused(["fit", "--model", f"{name}.OwnStp", *manual], f"{name}.OwnStp", "did you mean 'OwnStep'?")
    refused(["fit", *manual, "--model", f"{name}.OwnStep"], "'automatic_optimization', but no class", "first")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("class Mine(:\n", ["invalid syntax", "mine_in_a_test.py, line 1"]),
        ("import no_such_module\n", ["mine_in_a_test.Mine", "no_such_module"]),
        ("import torch\ntorch.no_such_thing\n", ["mine_in_a_test.Mine", "no_such_thing"]),
        ("class Mine:\n    pass\n", ["mine_in_a_test.Mine", "not a subclass of LightningModule"]),
        (
            "from torch import nn\nfrom lit_basics import LitClassifier\n\n\n"
            "class Mine(LitClassifier):\n    def __init__(self):\n"
            "        super().__init__(net=nn.Linear(3, 10), colour=3)\n",
            ["TypeError at mine_in_a_test.py:7", "colour"],
        ),
    ],
)
def test_modules_of_the_users_own_that_cannot_be_built(refused, mine, text, fragments):
    refused(["fit", *SMALL, "--model", f"{mine(text)}.Mine"], *fragments)


def test_a_package_that_a_callback_lacks(refused, mine):
    text = (
        "import lightning.pytorch as pl\n\n\nclass Lacking(pl.Callback):\n    def setup(self, *args, **kwargs):\n"
        "        raise ModuleNotFoundError('`psutil` is not installed. HINT: Try running `pip install psutil`')\n"
    )
    refused([*QUICK, *SMALL, f"--trainer.callbacks+={mine(text)}.Lacking"], "`pip install psutil`")
    refused([*QUICK, *SMALL, "--trainer.callbacks+=LearningRateFinder"], "'lr', 'learning_rate'")


def test_an_error_in_the_users_own_code_keeps_its_traceback(mine):
    """Without ``own_frames`` LitLeNet5 "cannot train on this data", and no line is named."""
    name = mine("class Broken:\n    def __call__(self, images):\n        return images + None\n")
    with pytest.raises(TypeError, match="unsupported operand"):
        main([*QUICK, *SMALL, "--data.transform", f"{name}.Broken"])
    assert not Path("runs").exists()


WORKERS = """
from torch.utils.data import DataLoader
from lit_basics import SyntheticCIFAR10

def collate(samples):
    return None + len(samples)

class Data(SyntheticCIFAR10):
    def train_dataloader(self):
        return DataLoader(range(8), batch_size=4, num_workers=1, collate_fn=collate)
"""


def test_an_error_in_a_worker_keeps_its_traceback(mine):
    """Raised again in this process, it has frames of torch's only; "cannot train on this data" would be all of it."""
    with pytest.raises(TypeError, match=r"(?s)Caught TypeError in DataLoader worker.*in collate"):
        main([*QUICK, "--data", f"{mine(WORKERS)}.Data", *SMALL[2:]])


@pytest.mark.parametrize("folder", ["/usr/lib/python3/dist-packages", "/opt/lib/python3.12/site-packages"])
def test_libraries_are_not_the_users_own_code(folder):
    """On Debian's Python and in Colab they are in dist-packages."""
    source = compile("def fail():\n    raise TypeError", f"{folder}/torch/functional.py", "exec")
    names: dict = {}
    exec(source, names)
    with pytest.raises(TypeError) as raised:
        names["fail"]()
    assert [Path(frame.filename).name for frame in own_frames(raised.value)] == [Path(__file__).name]


def test_a_full_gpu_is_not_the_checkpoints_fault():
    """It is told as it is; "lacks a part of a run's state" would have good checkpoints thrown away."""

    def restore_training_state(error):
        raise error

    for error, wanted in ((RuntimeError("size mismatch"), True), (torch.cuda.OutOfMemoryError("full"), False)):
        with pytest.raises(RuntimeError) as raised:
            restore_training_state(error)
        assert is_restoring(raised.value) is wanted


# runs and checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of LeNet-5."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main([*QUICK, *SMALL, "--run_dir", str(folder)]) == 0
    return folder


def test_a_run_directory_that_holds_a_run(refused, trained):
    before = snapshot(trained)
    refused([*QUICK, *SMALL, "--run_dir", trained], str(trained), "holds a run already")
    assert snapshot(trained) == before


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "checkpoints"])
def test_a_run_directory_with_a_part_of_a_run(refused, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    refused([*QUICK, *SMALL, "--run_dir", "run"], "run holds a run already")


def test_a_refused_run_leaves_the_files_of_its_directory(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refused([*QUICK, *SMALL, "--run_dir", "run", "--model.optimizer", "Muon"], "Muon")


@pytest.mark.parametrize("folder", ["file/run", "file"])
def test_a_run_directory_that_cannot_be_written(refused, tmp_path, folder):
    (tmp_path / "file").write_text("a file, not a folder")
    refused([*QUICK, *SMALL, "--run_dir", folder], folder, "cannot be written", "--run_dir")


@pytest.mark.parametrize("link", ["runs", "runs/quickstart"])
def test_a_link_to_a_folder_that_is_gone(refused, link, tmp_path):
    """Taken for the name of another run of this second, it is tried again without an end, until the alarm."""
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to("gone")

    def too_long(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        refused([*QUICK, *SMALL], "runs/quickstart", "cannot be written: File exists", "--run_dir")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_checkpoint",)


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(
    ("kind", "fragments"),
    [
        ("missing", []),
        ("text", ["damaged"]),
        ("empty", ["damaged"]),
        ("truncated", ["damaged"]),
        ("hostile", ["safe load refuses"]),
        ("plain weights", ["no state_dict"]),
        ("folder", []),
        ("another model", ["another model", "LitBlitzNet"]),
    ],
)
def test_checkpoints(refused, trained, tmp_path, command, kind, fragments):
    path = tmp_path / "my.ckpt"
    whole = (trained / "checkpoints" / "best.ckpt").read_bytes()
    if kind == "hostile":
        torch.save({"state_dict": Hostile()}, path)
    elif kind == "plain weights":
        path.write_bytes((trained / "best.pth").read_bytes())
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        contents = {"text": b"not a checkpoint", "empty": b"", "truncated": whole[: len(whole) // 2]}
        path.write_bytes(contents.get(kind, whole))
    model = "LitBlitzNet" if kind == "another model" else "LitLeNet5"
    refused([command, "--model", model, *SMALL, "--ckpt_path", "my.ckpt"], "my.ckpt", *fragments)


def test_a_damaged_checkpoint_gives_the_terminal_no_orders(refused, tmp_path):
    """Without ``printable`` the file's name for a part clears the screen."""
    with zipfile.ZipFile(tmp_path / "my.ckpt", "w") as archive:
        archive.writestr("part\x1b[2J\u202e", b"hello")
    path = tmp_path / "my.ckpt"
    path.write_bytes(path.read_bytes().replace(b"hello", b"jello"))
    message = refused([*QUICK, *SMALL, "--ckpt_path", path], "damaged", r"part\x1b[2J\u202e is wrong")
    assert message.rstrip("\n").isprintable()
    with pytest.raises(UserError, match="is wrong") as caught:  # and where no command line prints it
        load_checked(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["best", "last", "other"])
def test_fit_from_a_checkpoint_that_has_no_run(refused, name):
    told = "no checkpoint other" if name == "other" else f"fit takes a file here, such as RUN/checkpoints/{name}.ckpt"
    refused([*QUICK, *SMALL, "--ckpt_path", name], told)


def test_nothing_to_validate_on(refused, trained):
    checkpoint = trained / "checkpoints" / "best.ckpt"
    words = ["validate", "--config", "quickstart", *SMALL, "--data.val_size", "0"]
    refused([*words, "--ckpt_path", checkpoint], "nothing to validate on")


def test_a_checkpoint_of_a_run_that_is_done(refused, trained):
    """Without ``has_trained`` an empty directory is made, and the exit code is 0."""
    checkpoint = trained / "checkpoints" / "last.ckpt"
    words = [*QUICK, *SMALL, "--ckpt_path", checkpoint]
    refused(words, "nothing to train from", "complete at step 2; --trainer.max_epochs makes it longer")
    more = ["--trainer.max_epochs", "9", "--trainer.max_steps", "2"]
    refused([*words, *more], "nothing to train from", "complete at step 2; --trainer.max_steps makes it longer")


@pytest.mark.parametrize("words", [["--resume", ""], ["--resume="], ["--run_dir", ""]])
def test_a_variable_of_the_shell_that_is_not_set(refused, trained, words):
    """Without the refusal ``--resume ""`` starts afresh in a directory that holds a run."""
    before = snapshot(trained)
    refused([*QUICK, *SMALL, "--run_dir", trained, *words], f"{words[0].rstrip('=')} needs a value")
    assert snapshot(trained) == before


@pytest.fixture
def other_images(tmp_path):
    """Words for images of a size that LeNet-5 does not take."""
    images = {name: np.zeros((n, 28, 28, 3), np.uint8) for name, n in (("x_train", 8), ("x_test", 4))}
    np.savez(tmp_path / "other.npz", **arrays(**images))
    return ["--data", "NpzDataModule", "--data.path", "other.npz", "--trainer.enable_progress_bar", "false"]


@pytest.mark.parametrize("command", ["test", "predict"])
def test_evaluating_on_data_that_does_not_fit(refused, trained, other_images, command):
    told = f"LitLeNet5 cannot {command} on this data: "
    refused([command, "--run_dir", trained, *other_images], told, "shapes cannot be multiplied")


def test_going_on_with_data_that_does_not_fit(refused, trained, other_images, tmp_path, capsys):
    """The steps of the checkpoint are not the run's own: without ``has_stepped`` a traceback, and files that stay."""
    checkpoint = trained / "checkpoints" / "last.ckpt"
    told, longer = "LitLeNet5 cannot train on this data: ", ["--trainer.max_epochs", "2"]
    refused([*QUICK, *other_images, *longer, "--ckpt_path", checkpoint, "--run_dir", "new"], told)
    shutil.copytree(trained, tmp_path / "run")
    assert main(["fit", "--resume", "run", "--resume_reset", *other_images, *longer]) == 2
    assert_short(capsys.readouterr().err, told)


def test_a_failed_search_has_made_no_step():
    """Lightning leaves the Trainer with the callbacks of its search alone: the error was StopIteration."""
    assert not has_stepped(quiet_trainer())


def test_nothing_to_predict(refused, trained):
    words = ["predict", "--run_dir", trained, "--trainer.limit_predict_batches", "0"]
    refused(words, "nothing to predict")


def test_a_prediction_by_two_processes(refused, trained):
    words = ["predict", "--run_dir", trained, "--config", "ddp"]
    refused(words, "predict runs in one process: --trainer.devices 1")


HPARAMS = """
from pathlib import Path
from lit_basics import LitLeNet5, SyntheticCIFAR10

class Net(LitLeNet5):
    def __init__(self, value="Path('here')", **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters({"root": eval(value)})

class Data(SyntheticCIFAR10):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters({"roots": [Path("here")]})
"""


@pytest.fixture
def my_hparams(mine):
    return mine(HPARAMS, "my_hparams")


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ([], ["Net saves the hyper-parameter root, a PosixPath", "save_hyperparameters(ignore=['root'])"]),
        (["--model.value", "len"], ["Net saves the hyper-parameter root, a builtin_function_or_method"]),
        (["--model", "LitLeNet5", "--data", "my_hparams.Data"], ["Data saves the hyper-parameter roots, a PosixPath"]),
    ],
)
def test_hyperparameters_that_no_checkpoint_can_hold(refused, my_hparams, words, fragments):
    """Without ``check_hyperparameters`` it trains, and no ``--resume`` takes what it saved."""
    refused(["fit", "--model", "my_hparams.Net", *SMALL, *words], *fragments)


def test_hyperparameters_that_a_checkpoint_can_hold(my_hparams, capsys):
    words = ["fit", "--model", "my_hparams.Net", *SMALL, "--run_dir", "run", "--model.value"]
    assert main([*words, "dict(a=[1, 'x', None, (2.5, True)])"]) == 0
    assert main(["fit", "--resume", "run", "--trainer.max_epochs", "2"]) == 0
    no_checkpoints = ["--run_dir", "other", "--trainer.enable_checkpointing", "false"]
    assert main([*words, "Path('here')", *no_checkpoints]) == 0, "nothing to resume from"


# as a program


def test_as_a_program(tmp_path):
    words = ["fit", "--config", "quickstart", "--model.optimizer", "SparseAdam", "--data.train_images", "100"]
    command = [sys.executable, "-m", "lit_basics", *words, "--trainer.enable_progress_bar", "false"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert_short(done.stderr, "dense")
    assert (done.returncode, done.stdout) == (2, "")
    assert snapshot(tmp_path) == {}


ELASTIC = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}
SLURM = {name: "0" for name in ("SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID")} | {"SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize(
    ("command", "launcher", "fragment"),
    [
        ("fit", {**SLURM, "SLURM_NTASKS": "2"}, "trainer: You set `--ntasks=2` in your SLURM bash script"),
        ("test", {**SLURM, "SLURM_NTASKS": "2"}, "trainer: You set `--ntasks=2` in your SLURM bash script"),
        ("fit", {**SLURM, "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}, "`--ntasks-per-node=4` does not match"),
        ("test", ELASTIC, "the product (2 * 1) does not match the world size (4)"),
    ],
)
def test_a_launcher_of_other_processes(refused, trained, monkeypatch, command, launcher, fragment):
    """Without ``new_trainer`` and the pattern of ``_is_user_error``: a traceback, and exit code 1."""
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    words = ["test", "--run_dir", trained] if command == "test" else [*QUICK, *SMALL]
    refused([*words, "--config", "ddp"], fragment)


# what cannot be written or read


def fill(folder):
    with (folder / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


@pytest.fixture
def small_disk(tmp_path):
    """A full file system of 8 MB; the run's directory on it can be made, and an empty file."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted")
    fill(folder)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_refused_before_the_first_step(refused, small_disk):
    """Without what ``check_writable`` writes this trains, and fails with a traceback at the first checkpoint."""
    refused([*QUICK, *SMALL, "--run_dir", small_disk / "run"], "cannot be written", "No space left", "--run_dir")


def test_a_read_only_disk_is_refused_before_the_first_step(refused, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused([*QUICK, *SMALL, "--run_dir", small_disk / "run"], "cannot be written", "Read-only", "--run_dir")


def test_resuming_on_a_disk_that_cannot_be_written(refused, trained, small_disk):
    (small_disk / "ballast").unlink()
    shutil.copytree(trained, small_disk / "run")
    fill(small_disk)
    words = ["fit", "--resume", small_disk / "run", "--trainer.max_epochs", "2"]
    refused(words, "cannot be written", "No space left")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused(words, "cannot be written", "Read-only")


def test_predictions_that_cannot_be_written(refused, trained, small_disk):
    """Without the look before, the whole test set is predicted first, and a hidden temporary file named."""
    (small_disk / "ballast").unlink()
    shutil.copytree(trained, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    run = small_disk / "run"
    refused(["predict", "--run_dir", run], f"{run} cannot be written: Read-only", "--run_dir may name another")
    config, checkpoint = run / "config.yaml", run / "checkpoints" / "best.ckpt"
    words = ["predict", "--config", config, "--ckpt_path", checkpoint]
    refused([*words, "--run_dir", small_disk / "other" / "one"], f"{small_disk} cannot be written")
    assert main([*map(str, words), "--run_dir", "other/one"]) == 0
    assert Path("other/one/predictions.npz").is_file()


def test_a_checkpoint_that_cannot_be_read(refused, trained, tmp_path):
    (tmp_path / "my.ckpt").write_bytes((trained / "checkpoints" / "best.ckpt").read_bytes())
    (tmp_path / "my.ckpt").chmod(0)
    if os.access(tmp_path / "my.ckpt", os.R_OK):
        pytest.skip("root reads everything")
    refused(["test", "--config", "quickstart", "--ckpt_path", "my.ckpt"], "my.ckpt", "Permission denied")
