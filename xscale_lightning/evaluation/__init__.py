"""Evaluation as pure functions on tensors: no Lightning, no files read, nothing remembered between calls."""

from xscale_lightning.evaluation.dense import (
    DenseHead,
    DenseRecipe,
    DenseScores,
    confusion_matrices,
    dense_scores,
    fit_dense_head,
    miou_error,
)
from xscale_lightning.evaluation.geometry import effective_rank, mean_cosine, uniformity
from xscale_lightning.evaluation.knn import knn_evaluate, knn_predict
from xscale_lightning.evaluation.pictures import composite, picture_grid, save_png, stretch_limits
from xscale_lightning.evaluation.reconstruction import (
    ErrorSums,
    bilinear_inpainting,
    error_sums,
    masked_psnr,
    mean_fill,
    percentile_range,
    psnr,
)
from xscale_lightning.evaluation.scales import downsample
from xscale_lightning.evaluation.spectral import spectral_angle

__all__ = [
    "DenseHead",
    "DenseRecipe",
    "DenseScores",
    "ErrorSums",
    "bilinear_inpainting",
    "composite",
    "confusion_matrices",
    "dense_scores",
    "downsample",
    "effective_rank",
    "error_sums",
    "fit_dense_head",
    "knn_evaluate",
    "knn_predict",
    "masked_psnr",
    "mean_cosine",
    "mean_fill",
    "miou_error",
    "percentile_range",
    "picture_grid",
    "psnr",
    "save_png",
    "spectral_angle",
    "stretch_limits",
    "uniformity",
]
