"""The pages' doctests run; the site's scripts, which need the ``docs`` extra, are not collected."""

from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = ["*.py"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run the snippets on one thread: their nets and batches are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the pages pass where warnings are errors: Lightning's own, on new torch, is not theirs."""
    for item in items:
        if item.path.suffix == ".md":
            item.add_marker(pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)"))
            item.add_marker(pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"))
