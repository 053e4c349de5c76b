"""The training loop of the demo's towers."""

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
