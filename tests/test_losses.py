import torch

from panollava.losses import vicreg


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


def test_equal_and_decorrelated_features_of_unit_variance_lose_nothing() -> None:
    x = torch.linalg.qr(torch.randn(64, 4, dtype=torch.float64)).Q
    x = x - x.mean(0)
    x = torch.linalg.qr(x).Q * 63**0.5 * 1.01
    assert vicreg(x, x, 25.0, 25.0, 1.0)["loss"] < 1e-4


def test_collapse_is_what_variance_punishes() -> None:
    x = torch.ones(16, 4)
    result = vicreg(x, x, 25.0, 25.0, 1.0)
    assert result["invariance"] == 0 and result["variance"] > 0.98
