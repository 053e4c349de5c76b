"""The frozen encoder's pooled features of every panorama, computed once and kept on disk."""

import logging
import operator
import pickle
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from pydantic_core import to_jsonable_python
from tqdm import tqdm

from panollava import paths
from panollava.config import Settings
from panollava.data.batches import gather
from panollava.data.shard_work import Distribute, Part, ShardStore, open_store
from panollava.data.shards import Shards, open_views, verify
from panollava.errors import UserError
from panollava.files import write_array
from panollava.model import ranks
from panollava.model.device import choose_device, configure_cpu
from panollava.model.encoder import EncoderOnly, load_encoder
from panollava.model.precision import autocast
from panollava.model.resampler import Pooling
from panollava.model.weights import load_start
from panollava.provenance import code_digest, made_from
from panollava.provenance.fingerprint import fingerprint
from panollava.stages import INFERENCE, STAGES

log = logging.getLogger(__name__)

READS = (
    *("data.store_dir", "views", "model.encoder", "model.tokens", "model.sphere_rows"),
    *("model.sphere_columns", "model.resampler.pool", "model.features", *INFERENCE),
)
_PLACES = ("data.store_dir",)  # parameters that change no result
_BATCH, _SUFFIX = 8, ".npy"  # panoramas; of a shard's file name
_TRAINED_BY = STAGES["resampler"]  # the last stage that trains the encoder
Inputs = Mapping[str, Shards]  # views, by shard set


class FeatureShard(NamedTuple):
    name: str  # of the shard set
    panoramas: range
    key: str  # a hash

    @property
    def title(self) -> str:
        return f"{self.name} {self.panoramas.start}-{self.panoramas.stop - 1}"


def write_features(
    settings: Settings,
    start: Path | None = None,
    part: Part | None = None,
    merge: bool = False,
    distribute: Distribute | None = None,
) -> None:
    """Write the shard sets runs/features/<split> of all splits, and runs/features/rolled of the
    rolled panoramas: (*shape, features) of each panorama, see `Pooling`. Each shard holds the
    panoramas of one of `prepare`.

    `start`: weights that hold the encoder (default: the result of the resampler stage). `part`:
    make only these of the missing shards, and write no outputs. `merge`: make none. `distribute`:
    who makes them.

    Raises:
        UserError: missing or other inputs, missing shards, or features that are not finite.
    """
    made_from.check_prepared(settings.views)
    if part is None:
        ranks.on_first(lambda: made_from.invalidate(paths.FEATURES))
    inputs = _open_inputs(settings)
    ranks.on_first(lambda: verify([*inputs.values()]))
    model = _Model(settings, start)
    shards = _plan_shards(model, inputs)
    if part is not None:
        shards = part.pick(shards)
    store = open_store("features", settings.data.store_dir)
    missing = ranks.on_first(lambda: store.missing(shards, merge))
    if distribute and missing:
        distribute(partial(make_shards, settings, start), missing)
    else:
        model.write(store, missing, inputs)
    if part is not None:
        log.info("part %d of %d: its %d shards are finished", *part, len(shards))
    elif not ranks.rank():
        for name, views in inputs.items():
            mine = [shard.key for shard in shards if shard.name == name]
            store.publish(paths.FEATURES / name, store.records(mine), _SUFFIX)
            log.info("features of %d panoramas: %s", len(views), paths.FEATURES / name)
        made_from.record_features(settings, model.encoder)
        store.close()


def make_shards(settings: Settings, start: Path | None, shards: Sequence[FeatureShard]) -> None:
    """Write the files of shards, in a process that may get others later."""
    model, inputs = _load(pickle.dumps((settings, start)))
    model.write(open_store("features", settings.data.store_dir), shards, inputs)


@lru_cache(1)
def _load(pickled: bytes) -> tuple["_Model", Inputs]:
    settings, start = pickle.loads(pickled)
    return _Model(settings, start), _open_inputs(settings)


def _open_inputs(settings: Settings) -> Inputs:
    folders = {
        split: paths.PREPARED / split / paths.PANORAMAS for split in ("train", "valid", "test")
    }
    folders[paths.ROLLED.name] = paths.ROLLED
    return {name: open_views(folder, settings.views) for name, folder in folders.items()}


def _plan_shards(model: "_Model", inputs: Inputs) -> Sequence[FeatureShard]:
    shards = []
    for name, views in inputs.items():
        for number, shard in enumerate(views.shards):
            panoramas = range(views.starts[number], views.starts[number + 1])
            key = fingerprint([model.described, shard.sha256, views.code], [], {})
            shards.append(FeatureShard(name, panoramas, key))
    return shards


class _Model:
    """The encoder with the pooling of its tokens."""

    def __init__(self, settings: Settings, start: Path | None) -> None:
        configure_cpu(settings.trainer.threads)
        self.settings, self.device = settings, choose_device(settings.trainer.accelerator)
        self.threads = ThreadPoolExecutor(settings.machine.decode_threads)
        model = EncoderOnly(load_encoder(settings.model.encoder, settings.views.size))
        load_start(start or paths.weights_file(_TRAINED_BY.name), model, ("encoder",), _TRAINED_BY)
        model.eval().requires_grad_(False).to(self.device)
        self.encoder = model.encoder
        pooling = Pooling(settings.model, settings.views, self.encoder.patch)
        self.pooling = pooling.to(self.device)
        values = {key: operator.attrgetter(key)(settings) for key in READS if key not in _PLACES}
        described = {
            "parameters": to_jsonable_python(values),
            "code": code_digest.digest("features"),
            "device": self.device.type,
            "encoder": self.encoder.describe(),
            "versions": [torch.__version__, transformers.__version__],
        }
        self.described = fingerprint(described, [], self.encoder.state_dict())

    @torch.inference_mode()
    def write(self, store: ShardStore, shards: Sequence[FeatureShard], inputs: Inputs) -> None:
        """Batches of fixed content, which ranks take in turn."""
        firsts = [[*shard.panoramas][::_BATCH] for shard in shards]
        total = sum(map(len, firsts))
        bar = tqdm(desc="features", total=total, disable=ranks.rank() > 0 or None)
        for shard, items in zip(shards, firsts, strict=True):
            compute = partial(self._compute, shard, inputs[shard.name])
            batches = ranks.map_in_turn(compute, items)
            if ranks.rank():
                for _ in batches:
                    pass
                continue
            with write_array(store.path(shard.key, _SUFFIX), shared=True) as append:
                for values in batches:
                    append(values)
                    bar.update()
            store.finish(shard.key, {_SUFFIX: len(shard.panoramas)})

    def _compute(self, shard: FeatureShard, source: Shards, first: int) -> NDArray:
        dtype = self.settings.model.features
        index = [*range(first, min(first + _BATCH, shard.panoramas.stop))]
        with autocast(self.device, self.settings.trainer.precision):
            views = gather(source, index, self.threads.map).to(self.device)
            features = self.pooling(self.encoder(views))
        values = features.float().cpu().numpy().astype(dtype)
        if not np.isfinite(values).all():
            raise UserError(
                f"{shard.name}: features of panoramas {index[0]}-{index[-1]} are not finite in "
                f"{dtype}; set model.features to float32"
            )
        return values
