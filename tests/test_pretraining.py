"""The training loop of the demo's towers."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from panollava.demo.pretraining import fit


def test_the_loop_learns_and_is_reproducible() -> None:
    def run() -> tuple[float, float, Tensor]:
        torch.manual_seed(0)
        model, inputs = nn.Linear(4, 1), torch.randn(64, 4)
        targets = inputs.sum(dim=1, keepdim=True)

        def loss(step: int) -> Tensor:
            return functional.mse_loss(model(inputs), targets)

        first = loss(0).item()
        return first, fit(model, loss, range(100), lr=0.1, beta2=0.98, name="toy"), model.weight

    first, last, weights = run()
    assert last < 0.1 * first
    assert torch.equal(weights, run()[2])


@pytest.mark.parametrize("slope", [0.25, 5.0])
def test_the_loop_is_adamw_with_one_cycle_and_clipped_gradients(slope: float) -> None:
    moving, still = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
    places, gradients = [], []

    def loss(step: int) -> Tensor:
        places.append(moving.item())
        if moving.grad is not None:  # of the previous step
            gradients.append(moving.grad.item())
        return slope * moving.sum() + 0 * still.sum()

    fit(nn.ParameterList([moving, still]), loss, range(100), lr=0.01, beta2=0.98, name="toy")
    assert gradients == pytest.approx([min(slope, 1.0)] * 99)
    # With a constant gradient, Adam moves a weight by about the learning rate.
    rates = -np.diff([*places, moving.item()])
    assert 5 < rates.argmax() < 25 and rates.max() == pytest.approx(0.01, rel=0.2)
    assert rates[0] == pytest.approx(0.01 / 25, rel=0.01) and rates[-1] < 1e-5
    assert still.item() == pytest.approx(1 - 0.05 * rates.sum(), abs=1e-3)
