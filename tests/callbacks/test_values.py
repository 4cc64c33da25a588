"""ValueMonitor; its use in the systems is tested with them."""

import pytest
from helpers import fit, metrics, train

from lit_basics import UserError, ValueMonitor


def test_parameters_of_several_numbers_have_a_key_for_each():
    table = metrics(fit("--config", "embedding", "--trainer.max_epochs", "2"))
    assert {f"param/weight[{i},0]" for i in range(11)} <= set(table[1])
    assert {f"grad/weight[{i},0]" for i in range(11)} <= set(table[1])


def test_too_many_numbers_are_refused():
    with pytest.raises(UserError, match="GradientMonitor logs norms"):
        train("--config", "quickstart", "--data.train_images", "100", callbacks=[ValueMonitor()])


def test_accumulated_gradients_show_once_a_step():
    words = ["--config", "linear", "--data.batch_size", "4", "--trainer.max_epochs", "2"]
    table = metrics(fit(*words, "--trainer.accumulate_grad_batches", "2"))
    assert list(table) == [1, 2, 3, 4]  # three batches an epoch make two steps
    for row in table.values():
        assert {"param/w", "grad/w", "train/loss"} <= set(row)
