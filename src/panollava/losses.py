"""VICReg (Bardes, Ponce, LeCun: Variance-Invariance-Covariance Regularization, ICLR 2022)."""

import torch
from torch import Tensor
from torch.nn import functional


def vicreg(
    x: Tensor, y: Tensor, invariance: float, variance: float, covariance: float
) -> dict[str, Tensor]:
    """Loss and its parts for two sets of features that describe the same things.

    x, y: (samples, features). Statistics are in fp32 and over all samples that are given."""
    x, y = x.float(), y.float()
    parts = {
        "invariance": functional.mse_loss(x, y),
        "variance": (_variance(x) + _variance(y)) / 2,
        "covariance": _covariance(x) + _covariance(y),
    }
    loss = (
        invariance * parts["invariance"]
        + variance * parts["variance"]
        + covariance * parts["covariance"]
    )
    return {"loss": loss, **parts}


def _variance(x: Tensor) -> Tensor:
    """Hinge that keeps each feature's standard deviation at 1 or above."""
    return functional.relu(1 - torch.sqrt(x.var(dim=0) + 1e-4)).mean()


def _covariance(x: Tensor) -> Tensor:
    """Squared covariances between different features, over the number of features."""
    centred = x - x.mean(dim=0)
    matrix = centred.T @ centred / (len(x) - 1)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / x.shape[1]
