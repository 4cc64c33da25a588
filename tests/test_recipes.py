"""Every packaged YAML is found by a recursive search and run end to end."""

import math
from pathlib import Path

import pytest
import torch
from helpers import metrics, write_npz

import lit_basics.recipes
from lit_basics.cli import main

FOLDER = Path(lit_basics.recipes.__file__).parent
YAMLS = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.yaml"))
RECIPES = [path.stem for path in YAMLS if len(path.parts) == 1]
OVERLAYS = [path.stem for path in YAMLS if path.parts[0] == "overlays"]

ON_CIFAR10 = ("blitz", "convnet3", "lenet5", "speed94", "speed96")
SHORT = {  # what makes a recipe short enough for a test; none is changed otherwise
    "blitz": ["--trainer.max_epochs", "1"],
    "lenet5": ["--trainer.max_epochs", "1"],
    "muon": ["--trainer.max_epochs", "1", "--data.train_images", "500"],
    "speed94": ["--trainer.max_epochs", "2", "--data.batch_size", "50"],
    "speed96": ["--trainer.max_epochs", "2", "--data.batch_size", "50"],
    "linear": ["--trainer.max_epochs", "10"],
    "embedding": ["--trainer.max_epochs", "10"],
}


def command_line(recipe, tmp_path):
    words = ["fit", "--config", recipe, *SHORT.get(recipe, []), "--run_dir", str(tmp_path / "run")]
    if recipe in ON_CIFAR10:
        words += ["--data", "NpzDataModule", "--data.path", write_npz(tmp_path / "images.npz", train=150)]
    return words


def check(run):
    table = metrics(run)
    losses = [row["train/loss_epoch"] for row in table.values() if "train/loss_epoch" in row]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    assert torch.load(run / "best.pth", weights_only=True)
    newest = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert newest["global_step"] == max(table)


def test_the_search_finds_all_and_each_has_a_description():
    assert len(RECIPES) + len(OVERLAYS) == len(YAMLS)
    assert len(RECIPES) >= 9
    assert len(OVERLAYS) >= 6
    for path in YAMLS:
        assert (FOLDER / path).read_text().startswith("# ")


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "quickstart"])
def test_every_recipe_runs(recipe, tmp_path):
    assert main([*command_line(recipe, tmp_path), "--trainer.enable_progress_bar", "false"]) == 0
    check(tmp_path / "run")


def test_quickstart_keeps_its_promise(tmp_path, capfd):
    assert main(["fit", "--config", "quickstart", "--run_dir", "run"]) == 0
    check(tmp_path / "run")
    table = metrics(tmp_path / "run")
    assert table[max(table)]["val/acc"] >= 0.95
    captured = capfd.readouterr()
    assert "Epoch 4" in captured.out + captured.err  # the progress bar
    assert captured.out.splitlines()[-2].startswith("run directory: ")
    assert captured.out.splitlines()[-1].startswith("best checkpoint: ")


OVERLAY_RECIPE = {"long": "convnet3", "fast": "blitz"}


# test_ddp.py and test_tracking.py run the two that start processes
@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name not in ("gpu", "ddp", "wandb")])
def test_every_overlay_runs(overlay, tmp_path):
    recipe = OVERLAY_RECIPE.get(overlay, "muon")
    words = command_line(recipe, tmp_path)
    words[3:3] = ["--config", overlay]
    assert main([*words, "--trainer.enable_progress_bar", "false"]) == 0
    check(tmp_path / "run")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_overlay_runs(tmp_path):
    words = command_line("quickstart", tmp_path)
    assert main([*words[:3], "--config", "gpu", *words[3:]]) == 0
    check(tmp_path / "run")
