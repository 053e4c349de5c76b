"""Losses between two sets of features of the same things: VICReg (Bardes, Ponce, LeCun:
Variance-Invariance-Covariance Regularization, ICLR 2022) and InfoNCE (van den Oord, Li, Vinyals:
Representation Learning with Contrastive Predictive Coding, 2018)."""

import torch
from torch import Tensor
from torch.nn import functional


def vicreg(
    x: Tensor, y: Tensor, invariance: float, variance: float, covariance: float
) -> dict[str, Tensor]:
    """The loss and its three terms. x, y: (samples, features).

    Statistics are over all samples, and in fp32 also under autocast."""
    x, y = x.float(), y.float()
    error = functional.mse_loss(x, y)
    hinge = (_variance(x) + _variance(y)) / 2
    squares = _covariance(x) + _covariance(y)
    loss = invariance * error + variance * hinge + covariance * squares
    return {"loss": loss, "invariance": error, "variance": hinge, "covariance": squares}


def infonce(x: Tensor, y: Tensor, temperature: float) -> dict[str, Tensor]:
    """Symmetric InfoNCE on cosine similarities, and the top-1 retrieval accuracy.

    x, y: (groups, samples, features). The negatives of a sample are the others of its group."""
    similarity = _similarity(x, y)
    logits = similarity / temperature
    # Flat: with more dimensions, the gradient on a GPU is not deterministic.
    target = torch.arange(x.shape[1], device=x.device).repeat(len(x))
    x_to_y = functional.cross_entropy(logits.flatten(0, 1), target)
    y_to_x = functional.cross_entropy(logits.transpose(1, 2).flatten(0, 1), target)
    accuracy = _top1(similarity.detach()).mean()
    return {"loss": (x_to_y + y_to_x) / 2, "retrieval_accuracy": accuracy}


def top1_retrieval(x: Tensor, y: Tensor) -> Tensor:
    """(groups,): the share of samples in x whose nearest sample of the group in y, by cosine
    similarity, is their counterpart. x, y: (groups, samples, features)."""
    return _top1(_similarity(x, y))


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    """Cosines, (groups, samples of x, samples of y)."""
    x, y = functional.normalize(x.float(), dim=-1), functional.normalize(y.float(), dim=-1)
    with torch.autocast(x.device.type, enabled=False):  # in bf16, many would be equal
        return x @ y.transpose(1, 2)


def _top1(similarity: Tensor) -> Tensor:
    counterpart = torch.arange(similarity.shape[1], device=similarity.device)
    return (similarity.argmax(dim=2) == counterpart).float().mean(dim=1)


def _variance(x: Tensor) -> Tensor:
    """Hinge on the standard deviation of each feature: 0 at 1 or above."""
    return functional.relu(1 - torch.sqrt(x.var(dim=0) + 1e-4)).mean()


def _covariance(x: Tensor) -> Tensor:
    """Squared covariances between different features, over the number of features."""
    centered = x - x.mean(dim=0)
    with torch.autocast(x.device.type, enabled=False):
        matrix = centered.T @ centered / (len(x) - 1)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / x.shape[1]
