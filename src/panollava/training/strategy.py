"""A Lightning strategy for one of several processes. Each computes on one device as if alone, and
`LitStage` sums the gradients: DDP would average them, in an order of its own. Only rank 0 writes.
"""

from typing import Any

import torch
from pytorch_lightning.strategies import SingleDeviceStrategy

from panollava.model import ranks


class RankStrategy(SingleDeviceStrategy):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.global_rank = ranks.rank()

    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    def barrier(self, name: str | None = None, *_: Any, **__: Any) -> None:
        """Wait until rank 0 has written a checkpoint; others of Lightning's barriers do nothing."""
        if name == "Trainer.save_checkpoint":
            ranks.on_first(lambda: None)
