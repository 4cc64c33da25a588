"""The basics of PyTorch training as a Lightning plug-in.

The public names are imported when they are first used: ``import lit_basics`` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:  # what _PUBLIC says, for type-checkers and editors
    from lit_basics.callbacks.best_loss import BestLossCheckpoint as BestLossCheckpoint
    from lit_basics.callbacks.gradients import GradientMonitor as GradientMonitor
    from lit_basics.callbacks.last import LastCheckpoint as LastCheckpoint
    from lit_basics.callbacks.non_finite import NonFiniteError as NonFiniteError
    from lit_basics.callbacks.non_finite import NonFiniteGuard as NonFiniteGuard
    from lit_basics.callbacks.preemption import Preemption as Preemption
    from lit_basics.callbacks.process_settings import ProcessSettings as ProcessSettings
    from lit_basics.callbacks.progress import ProgressBar as ProgressBar
    from lit_basics.callbacks.random_state import RandomState as RandomState
    from lit_basics.callbacks.report import LossReport as LossReport
    from lit_basics.callbacks.values import ValueMonitor as ValueMonitor
    from lit_basics.checkpoint_io import DurableCheckpointIO as DurableCheckpointIO
    from lit_basics.data.arrays import ArrayDataModule as ArrayDataModule
    from lit_basics.data.arrays import ArrayLoader as ArrayLoader
    from lit_basics.data.arrays import ImageArrays as ImageArrays
    from lit_basics.data.cifar10 import CIFAR10DataModule as CIFAR10DataModule
    from lit_basics.data.linear import EmbeddingDataModule as EmbeddingDataModule
    from lit_basics.data.linear import LinearDataModule as LinearDataModule
    from lit_basics.data.loader import ResumableDataLoader as ResumableDataLoader
    from lit_basics.data.npz import NpzDataModule as NpzDataModule
    from lit_basics.data.order import EpochOrder as EpochOrder
    from lit_basics.data.synthetic import SyntheticCIFAR10 as SyntheticCIFAR10
    from lit_basics.errors import UserError as UserError
    from lit_basics.loggers import MetricsCSV as MetricsCSV
    from lit_basics.modules import LitBlitzNet as LitBlitzNet
    from lit_basics.modules import LitClassifier as LitClassifier
    from lit_basics.modules import LitConvNet3 as LitConvNet3
    from lit_basics.modules import LitEmbedding as LitEmbedding
    from lit_basics.modules import LitLeNet5 as LitLeNet5
    from lit_basics.modules import LitLinearRegression as LitLinearRegression
    from lit_basics.modules import LitObjective as LitObjective
    from lit_basics.modules import LitSupervised as LitSupervised
    from lit_basics.nets import BlitzNet as BlitzNet
    from lit_basics.nets import ConvNet3 as ConvNet3
    from lit_basics.nets import LeNet5 as LeNet5
    from lit_basics.nets import Line as Line
    from lit_basics.nets import Powers as Powers
    from lit_basics.nets import Quadratic as Quadratic
    from lit_basics.nets import SpeedNet as SpeedNet
    from lit_basics.nets import Square as Square
    from lit_basics.optim import FilterMuon as FilterMuon
    from lit_basics.optim import LeanSGD as LeanSGD
    from lit_basics.optim import LookaheadLR as LookaheadLR
    from lit_basics.optim import LookaheadSGD as LookaheadSGD
    from lit_basics.optim import PairedOptimizer as PairedOptimizer
    from lit_basics.optim import SpeedOptimizer as SpeedOptimizer
    from lit_basics.soft_loggers import fail_soft as fail_soft
    from lit_basics.speed94 import LitSpeedNet as LitSpeedNet
    from lit_basics.speed96 import LitSpeedNet96 as LitSpeedNet96
    from lit_basics.verification.checks import verify as verify

    __version__: str

__all__ = sorted(_PUBLIC)


if not TYPE_CHECKING:  # which would take every name for one of ours

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("lit_basics")
        if name not in _PUBLIC:
            raise AttributeError(f"module 'lit_basics' has no attribute {name!r}")
        return getattr(importlib.import_module(f"lit_basics.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
