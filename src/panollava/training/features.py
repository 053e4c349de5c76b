"""The frozen encoder run once over every panorama, its pooled features kept on disk."""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from panollava import paths
from panollava.arrays import open_array, write_array
from panollava.config import Settings
from panollava.data.batches import gather
from panollava.errors import UserError
from panollava.model.encoder import load_encoder, pool_tokens
from panollava.model.precision import autocast
from panollava.provenance import made_from as provenance
from panollava.stages import find_stage
from panollava.training.start import load_start

log = logging.getLogger(__name__)

READS = (
    "views",
    "model.encoder",
    "model.resampler.pool",
    "model.features",
    "trainer.accelerator",
    "trainer.threads",
    "trainer.precision",
)
_BATCH = 8  # panoramas at once
_TRAINED_BY = find_stage("resampler")  # the last stage that trains the encoder


class _EncoderAlone(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder


def write_features(settings: Settings, source: Path | None = None) -> None:
    """Write runs/features/<split>.npy, (panoramas, views, grid, grid, features), for all splits,
    and rolled.npy, the same of turned panoramas.

    `source`: the file that holds the encoder, where it isn't the last stage's that trains it."""
    device = choose_device(settings.trainer.accelerator)
    provenance.check_prepared(settings.views)
    provenance.forget(paths.FEATURES)
    torch.set_num_threads(settings.trainer.threads)
    model = _EncoderAlone(load_encoder(settings.model.encoder, settings.views.size))
    source = source or paths.weights_file(_TRAINED_BY.name)
    load_start(source, model, ("encoder",), _TRAINED_BY)
    model.eval().requires_grad_(False).to(device)
    inputs = {split: paths.PREPARED / split / "views.npy" for split in ("train", "valid", "test")}
    for name, file in {**inputs, "rolled": paths.ROLLED}.items():
        views = open_array(file)
        out = paths.FEATURES / f"{name}.npy"
        _write(model.encoder, views, out, device, settings)
        log.info("features of %d panoramas: %s", len(views), out)
    provenance.record_features(settings, model.encoder)


def choose_device(accelerator: str) -> torch.device:
    """The device that Lightning would take for `trainer.accelerator`. Raises UserError for a GPU
    that isn't there."""
    there = torch.cuda.is_available()
    if accelerator == "gpu" and not there:
        raise UserError(
            f"trainer.accelerator: found gpu, but torch {torch.__version__} finds no GPU that it "
            "can use; set it to cpu, or to auto, which takes a GPU where there is one"
        )
    return torch.device("cuda" if there and accelerator != "cpu" else "cpu")


@torch.inference_mode()
def _write(
    encoder: nn.Module,
    views: np.ndarray,
    out: Path,
    device: torch.device,
    settings: Settings,
) -> None:
    pool, dtype = settings.model.resampler.pool, settings.model.features
    with write_array(out) as append:
        for at in tqdm(range(0, len(views), _BATCH), desc=f"features, {out.stem}"):
            index = list(range(at, min(at + _BATCH, len(views))))
            with autocast(device, settings.trainer.precision):
                features = pool_tokens(encoder(gather(views, index).to(device)), pool)
            values = features.float().cpu().numpy().astype(dtype)
            if not np.isfinite(values).all():
                raise UserError(
                    f"{out}: features of panoramas {index[0]}-{index[-1]} are not finite in "
                    f"{dtype}; set model.features to float32"
                )
            append(values)
