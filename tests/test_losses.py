"""VICReg and InfoNCE against their formulas."""

import torch

from panollava.training.losses import infonce, top1_retrieval, vicreg


def test_vicreg_is_the_paper_s_formula() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(50, 6) * 0.5, torch.randn(50, 6)
    result = vicreg(x, y, 25.0, 25.0, 1.0)
    invariance = ((x - y) ** 2).sum() / 300
    variance = sum(
        max(0.0, 1 - float((z[:, j].var() + 1e-4) ** 0.5)) / 12 for z in (x, y) for j in range(6)
    )
    covariance = 0.0
    for z in (x, y):
        matrix = torch.cov(z.T)
        covariance += float((matrix**2).sum() - (matrix.diagonal() ** 2).sum()) / 6
    expected = 25 * invariance + 25 * variance + covariance
    assert torch.isclose(result["loss"], expected, rtol=1e-5)


def test_vicreg_is_0_for_equal_decorrelated_features_of_unit_variance() -> None:
    x = torch.linalg.qr(torch.randn(64, 4, dtype=torch.float64)).Q
    x = x - x.mean(0)
    x = torch.linalg.qr(x).Q * 63**0.5 * 1.01
    assert vicreg(x, x, 25.0, 25.0, 1.0)["loss"] < 1e-4


def test_the_variance_term_penalizes_collapse() -> None:
    x = torch.ones(16, 4)
    result = vicreg(x, x, 25.0, 25.0, 1.0)
    assert result["invariance"] == 0 and result["variance"] > 0.98


def test_infonce_is_cross_entropy_over_the_group_both_ways() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    terms = []
    for a, b in zip(x, y, strict=True):
        similar = torch.cosine_similarity(a[:, None], b[None], dim=-1) / 0.2
        for logits in (similar, similar.T):
            terms += [-logits[i].log_softmax(0)[i] for i in range(5)]
    assert torch.isclose(infonce(x, y, 0.2)["loss"], torch.stack(terms).mean(), rtol=1e-5)


def test_losses_are_the_same_under_autocast() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 30, 16)
    expected = infonce(x, y, 0.1), vicreg(x[0], y[0], 25, 25, 1)
    with torch.autocast("cpu", torch.bfloat16):
        result = infonce(x, y, 0.1), vicreg(x[0], y[0], 25, 25, 1)
    assert result == expected


def test_retrieval_accuracy_is_the_share_of_nearest_counterparts() -> None:
    x = torch.eye(6).expand(3, 6, 6)
    alike = infonce(x, 2 * x, 0.05)
    assert alike["retrieval_accuracy"] == 1 and alike["loss"] < 1e-3
    assert infonce(x, x.roll(1, dims=1), 0.05)["retrieval_accuracy"] == 0
    angles = torch.deg2rad(torch.tensor([[0.0, 63.0], [-46.0, 37.0]]))
    x_only, y_only = torch.stack([angles.cos(), angles.sin()], dim=-1)[:, None]
    assert top1_retrieval(x_only, y_only) == 0.5 and top1_retrieval(y_only, x_only) == 1
    half = torch.cat([x[:, :3], x[:, 3:].flip(1)], dim=1)  # 3 and 5 exchanged
    assert torch.allclose(top1_retrieval(x, half), torch.tensor(4 / 6))
