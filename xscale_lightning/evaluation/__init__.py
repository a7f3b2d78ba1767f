"""Evaluation as pure functions on tensors: no Lightning, no files read, nothing remembered between calls."""

from xscale_lightning.evaluation.bootstrap import Estimate, Statistic, bootstrap_draws, estimates, values
from xscale_lightning.evaluation.dense import (
    DenseHead,
    DenseRecipe,
    DenseScores,
    confusion_matrices,
    dense_scores,
    fit_dense_head,
)
from xscale_lightning.evaluation.geometry import effective_rank, mean_cosine, uniformity
from xscale_lightning.evaluation.knn import knn_evaluate, knn_predict, knn_scores
from xscale_lightning.evaluation.linear import LinearFit, LinearHead, LinearRecipe, fit_linear, logistic_regression
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
from xscale_lightning.evaluation.scores import class_scores, label_scores, pixel_scores
from xscale_lightning.evaluation.spectral import spectral_angle

__all__ = [
    "DenseHead",
    "DenseRecipe",
    "DenseScores",
    "ErrorSums",
    "Estimate",
    "LinearFit",
    "LinearHead",
    "LinearRecipe",
    "Statistic",
    "bilinear_inpainting",
    "bootstrap_draws",
    "class_scores",
    "composite",
    "confusion_matrices",
    "dense_scores",
    "downsample",
    "effective_rank",
    "error_sums",
    "estimates",
    "fit_dense_head",
    "fit_linear",
    "knn_evaluate",
    "knn_predict",
    "knn_scores",
    "label_scores",
    "logistic_regression",
    "masked_psnr",
    "mean_cosine",
    "mean_fill",
    "percentile_range",
    "picture_grid",
    "pixel_scores",
    "psnr",
    "save_png",
    "spectral_angle",
    "stretch_limits",
    "uniformity",
    "values",
]
