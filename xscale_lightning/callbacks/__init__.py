"""Callbacks that show whether a run learns, without touching its loss, its optimizer or its random numbers."""

from xscale_lightning.callbacks.affinity import AffinityPictures
from xscale_lightning.callbacks.alignment import PairAlignment
from xscale_lightning.callbacks.dense_probe import OnlineDenseProbe
from xscale_lightning.callbacks.geometry import FeatureGeometry
from xscale_lightning.callbacks.guard import FiniteGuard
from xscale_lightning.callbacks.knn import OnlineKNN
from xscale_lightning.callbacks.linear_probe import LinearProbe
from xscale_lightning.callbacks.pictures import ReconstructionPictures
from xscale_lightning.callbacks.probe import Measurement, ProbeCallback, publish, run_folder
from xscale_lightning.callbacks.progress import ProgressBar
from xscale_lightning.callbacks.summary import RunSummary
from xscale_lightning.callbacks.tensorboard import TensorBoardReport
from xscale_lightning.callbacks.throughput import Throughput

__all__ = [
    "AffinityPictures",
    "FeatureGeometry",
    "FiniteGuard",
    "LinearProbe",
    "Measurement",
    "OnlineDenseProbe",
    "OnlineKNN",
    "PairAlignment",
    "ProbeCallback",
    "ProgressBar",
    "ReconstructionPictures",
    "RunSummary",
    "TensorBoardReport",
    "Throughput",
    "publish",
    "run_folder",
]
