"""The frozen encoder's pooled features of every panorama, computed once and kept on disk."""

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from panollava import paths
from panollava.config import Settings
from panollava.data.batches import gather
from panollava.errors import UserError
from panollava.files import open_array, write_array
from panollava.model import ranks
from panollava.model.device import choose_device, configure_cpu
from panollava.model.encoder import Encoder, EncoderOnly, load_encoder
from panollava.model.precision import autocast
from panollava.model.resampler import Pooling
from panollava.model.weights import load_start
from panollava.provenance import made_from
from panollava.stages import INFERENCE, STAGES

log = logging.getLogger(__name__)

READS = (
    *("views", "model.encoder", "model.tokens", "model.sphere_rows", "model.sphere_columns"),
    *("model.resampler.pool", "model.features", *INFERENCE),
)
_BATCH = 8  # panoramas
_TRAINED_BY = STAGES["resampler"]  # the last stage that trains the encoder


def write_features(settings: Settings, start: Path | None = None) -> None:
    """Write runs/features/<split>.npy for all splits, and rolled.npy for the rolled panoramas:
    (panoramas, *shape, features), see `Pooling`.

    `start`: weights that hold the encoder (default: the result of the resampler stage)."""
    device = choose_device(settings.trainer.accelerator)
    made_from.check_prepared(settings.views)
    ranks.on_first(lambda: made_from.invalidate(paths.FEATURES))
    configure_cpu(settings.trainer.threads)
    model = EncoderOnly(load_encoder(settings.model.encoder, settings.views.size))
    load_start(start or paths.weights_file(_TRAINED_BY.name), model, ("encoder",), _TRAINED_BY)
    model.eval().requires_grad_(False).to(device)
    pooling = Pooling(settings.model, settings.views, model.encoder.patch).to(device)
    inputs = {split: paths.PREPARED / split / "views.npy" for split in ("train", "valid", "test")}
    for name, file in {**inputs, "rolled": paths.ROLLED}.items():
        views = open_array(file)
        out = paths.FEATURES / f"{name}.npy"
        _write(model.encoder, pooling, views, out, settings)
        log.info("features of %d panoramas: %s", len(views), out)
    ranks.on_first(lambda: made_from.record_features(settings, model.encoder))


@torch.inference_mode()
def _write(
    encoder: Encoder, pooling: Pooling, views: NDArray, out: Path, settings: Settings
) -> None:
    """Batches of fixed content, which ranks take in turn."""
    dtype, device = settings.model.features, encoder.mean.device

    def compute(first: int) -> NDArray:
        index = list(range(first, min(first + _BATCH, len(views))))
        with autocast(device, settings.trainer.precision):
            features = pooling(encoder(gather(views, index).to(device)))
        values = features.float().cpu().numpy().astype(dtype)
        if not np.isfinite(values).all():
            raise UserError(
                f"{out}: features of panoramas {index[0]}-{index[-1]} are not finite in "
                f"{dtype}; set model.features to float32"
            )
        return values

    firsts = range(0, len(views), _BATCH)
    batches = ranks.map_in_turn(compute, firsts)
    if ranks.rank():
        for _ in batches:
            pass
        return
    with write_array(out) as append:
        for values in tqdm(batches, desc=f"features, {out.stem}", total=len(firsts)):
            append(values)
