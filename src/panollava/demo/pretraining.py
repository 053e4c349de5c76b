"""What the demo's two towers share: their size, and the training loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, lr_scheduler
from tqdm import tqdm

TOWER: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}


def fit(
    model: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    steps: range,
    lr: float,
    beta2: float,
    name: str,
) -> float:
    """AdamW with a one-cycle learning rate that peaks at `lr`. Returns the last step's loss."""
    optimizer = AdamW(model.parameters(), lr=lr, betas=(0.9, beta2), weight_decay=0.05)
    schedule = lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(steps), pct_start=0.1)
    bar = tqdm(steps, desc=name)
    for step in bar:
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return loss.item()
