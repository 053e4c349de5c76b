"""Losses of two sets of features that describe the same things: VICReg (Bardes, Ponce, LeCun:
Variance-Invariance-Covariance Regularization, ICLR 2022) and InfoNCE (van den Oord, Li, Vinyals:
Representation Learning with Contrastive Predictive Coding, 2018)."""

import torch
from torch import Tensor
from torch.nn import functional


def vicreg(
    x: Tensor, y: Tensor, invariance: float, variance: float, covariance: float
) -> dict[str, Tensor]:
    """Loss and its parts for two sets of features that describe the same things.

    x, y: (samples, features). Statistics are over all samples that are given, and in fp32, under
    autocast as well."""
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


def infonce(x: Tensor, y: Tensor, temperature: float) -> dict[str, Tensor]:
    """Loss, and the share of samples whose counterpart is found, see `found`.

    x, y: (groups, samples, features). Each sample of x is to be told from the others of its group
    by its counterpart in y, and the other way round, by cosine similarity."""
    similarity = _similarity(x, y)
    logits = similarity / temperature
    # Flat: of more dimensions the gradient differs from run to run on a GPU.
    counterpart = torch.arange(x.shape[1], device=x.device).repeat(len(x))
    there = functional.cross_entropy(logits.flatten(0, 1), counterpart)
    back = functional.cross_entropy(logits.transpose(1, 2).flatten(0, 1), counterpart)
    return {"loss": (there + back) / 2, "found": _found(similarity.detach()).mean()}


def found(x: Tensor, y: Tensor) -> Tensor:
    """(groups,): the share of samples of x whose counterpart in y is the nearest of the group's,
    by cosine similarity. x, y: (groups, samples, features)."""
    return _found(_similarity(x, y))


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    """Cosines, (groups, samples of x, samples of y)."""
    x, y = functional.normalize(x.float(), dim=-1), functional.normalize(y.float(), dim=-1)
    with torch.autocast(x.device.type, enabled=False):  # in bf16 many would be equal
        return x @ y.transpose(1, 2)


def _found(similarity: Tensor) -> Tensor:
    own = torch.arange(similarity.shape[1], device=similarity.device)
    return (similarity.argmax(dim=2) == own).float().mean(dim=1)


def _variance(x: Tensor) -> Tensor:
    """Hinge that keeps each feature's standard deviation at 1 or above."""
    return functional.relu(1 - torch.sqrt(x.var(dim=0) + 1e-4)).mean()


def _covariance(x: Tensor) -> Tensor:
    """Squared covariances between different features, over the number of features."""
    centered = x - x.mean(dim=0)
    with torch.autocast(x.device.type, enabled=False):
        matrix = centered.T @ centered / (len(x) - 1)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / x.shape[1]
