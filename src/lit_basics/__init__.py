"""The basics of PyTorch training as a Lightning plug-in.

The public names are imported when they are first used: ``import lit_basics`` does not import torch.
"""

import importlib
from typing import Any

_PUBLIC = {
    "ArrayDataModule": "data.arrays",
    "ArrayLoader": "data.arrays",
    "BestLossCheckpoint": "callbacks.best_loss",
    "BlitzNet": "nets",
    "CIFAR10DataModule": "data.cifar10",
    "ConvNet3": "nets",
    "DurableCheckpointIO": "checkpoint_io",
    "EmbeddingDataModule": "data.linear",
    "EpochOrder": "data.order",
    "FilterMuon": "optim",
    "GradientMonitor": "callbacks.gradients",
    "ImageArrays": "data.arrays",
    "LastCheckpoint": "callbacks.last",
    "LeNet5": "nets",
    "Line": "nets",
    "LeanSGD": "optim",
    "LinearDataModule": "data.linear",
    "LitBlitzNet": "modules",
    "LitClassifier": "modules",
    "LitConvNet3": "modules",
    "LitEmbedding": "modules",
    "LitLeNet5": "modules",
    "LitLinearRegression": "modules",
    "LitObjective": "modules",
    "LitSpeedNet": "speed94",
    "LitSpeedNet96": "speed96",
    "LitSupervised": "modules",
    "LookaheadLR": "optim",
    "LookaheadSGD": "optim",
    "LossReport": "callbacks.report",
    "MetricsCSV": "loggers",
    "NonFiniteError": "callbacks.non_finite",
    "NonFiniteGuard": "callbacks.non_finite",
    "NpzDataModule": "data.npz",
    "PairedOptimizer": "optim",
    "Powers": "nets",
    "Preemption": "callbacks.preemption",
    "ProcessSettings": "callbacks.process_settings",
    "ProgressBar": "callbacks.progress",
    "Quadratic": "nets",
    "SpeedNet": "nets",
    "SpeedOptimizer": "optim",
    "Square": "nets",
    "RandomState": "callbacks.random_state",
    "ResumableDataLoader": "data.loader",
    "SyntheticCIFAR10": "data.synthetic",
    "UserError": "errors",
    "ValueMonitor": "callbacks.values",
    "fail_soft": "soft_loggers",
    "verify": "verification.checks",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lit_basics")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lit_basics' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lit_basics.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
