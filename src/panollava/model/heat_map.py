"""Heat maps by occlusion (Zeiler and Fergus, 2014): how much less likely an answer becomes when a
part of the panorama is painted over.

Parts are painted over in the views, before the encoder: its tokens also hold what is next to them,
so that an answer hardly depends on any few of them."""

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from panollava.data.packing import Packed, pack
from panollava.geometry.discs import disc_centers, disc_masks, map_discs
from panollava.geometry.sphere import cell_centers
from panollava.geometry.views import token_rays
from panollava.model.precision import autocast

if TYPE_CHECKING:
    from panollava.model.panollava import PanoLLaVA

HEIGHT = 45  # pixels of a map, which is twice as wide
SPACING = 15.0  # degrees between the centers of discs
RADIUS = 20.0  # degrees
SMOOTHING = 14.0  # degrees
_CHUNK = 16  # discs at once


def encode_map(heat_map: NDArray[np.float32]) -> dict[str, Any]:
    """A map as viewer.js reads it: base64 of a byte for each direction."""
    height, width = heat_map.shape
    values = np.rint(255 * heat_map).astype(np.uint8)
    return {"width": width, "height": height, "values": base64.b64encode(values.tobytes()).decode()}


class HeatMaps:
    """The heat maps of one panorama. Its views are encoded once, with each disc painted over in the
    panorama's mean color."""

    def __init__(self, model: "PanoLLaVA", views: NDArray) -> None:
        """`views`: uint8 (views, size, size, 3), see `PanoLLaVA.views`."""
        self.model = model
        self.projections = model.sampler.layout.projections
        self.rays = token_rays(model.sampler.layout, cell_centers(views.shape[1]))
        self.centers = disc_centers(self.rays, SPACING, RADIUS)
        self._features = self._encode(torch.from_numpy(np.asarray(views)))
        # Of each (query, answer): the answer's tokens, and what each loses, (discs, tokens).
        self._losses: dict[tuple[str, str], tuple[list[int], NDArray]] = {}

    def heat_map(self, query: str, answer: str, part: slice | None = None) -> NDArray[np.float32]:
        """How much each direction mattered for an answer: equirectangular, (HEIGHT, 2 * HEIGHT), in
        [0, 1].

        It is the log-likelihood that the answer loses, relative to the largest loss of the map; or
        to 1 nat if that is larger, so that a map stays faint if no direction matters. 0 where no
        view looks, and where painting makes the answer likelier. `part`: characters of the answer,
        None: all."""
        values = self.losses(query, answer, part)
        heat = map_discs(values.clip(0), self.centers, self.projections, SMOOTHING, HEIGHT)
        return heat / max(float(heat.max()), 1.0)

    def losses(self, query: str, answer: str, part: slice | None = None) -> NDArray:
        """The log-likelihood, in nats, that the answer loses by each disc: (discs,)."""
        self.compute([(query, answer)])
        tokens, losses = self._losses[query, answer]
        if part is not None:
            losses = losses[:, self.tokens(tokens, answer, part)]
        return losses.sum(axis=1)

    def tokens(self, tokens: list[int], answer: str, part: slice) -> list[int]:
        """The indices of the tokens that have characters in `part`, spaces left out: decoded text
        may have other spaces than the answer."""
        decode = self.model.dialogue.decode
        ends = [len("".join(decode(tokens[: i + 1]).split())) for i in range(len(tokens))]
        first, last = (len("".join(answer[:at].split())) for at in part.indices(len(answer))[:2])
        starts = [0, *ends[:-1]]
        # A token of a space goes with the next one.
        pairs = enumerate(zip(starts, ends, strict=True))
        return [i for i, (start, end) in pairs if start < last and max(end, start + 1) > first]

    @torch.inference_mode()
    def compute(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Compute the maps of several (query, answer) together, which is faster than one by one."""
        model, dialogue = self.model, self.model.dialogue
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._losses]
        if not new:
            return
        rows = [dialogue.row(query, answer, truncate=False) for query, answer in new]
        vision = model.network.resampler.tokens
        likelihoods = []
        for features in self._features.split(_CHUNK):
            packed = pack(dialogue.text_prefix, vision, [rows] * len(features), dialogue.pad)
            packed = Packed(*(each.to(model.device) for each in packed))
            with autocast(model.device, model.precision):
                prefix = len(dialogue.text_prefix)
                logits = model.network.answer_logits(features, packed, prefix)
            losses = functional.cross_entropy(logits, packed.labels, reduction="none")
            likelihoods.append(-losses.view(len(features), -1).double().cpu())
        original, painted = torch.cat(likelihoods).split([1, len(self.centers)])
        ends = np.cumsum([len(row.answer) for row in rows])
        each_row = np.split((original - painted).numpy(), ends[:-1], axis=1)
        for pair, row, each in zip(new, rows, each_row, strict=True):
            self._losses[pair] = row.answer[:-1], each[:, :-1]  # without the end of the answer

    @torch.inference_mode()
    def _encode(self, views: Tensor) -> Tensor:
        """Features of the panorama itself and with each disc painted over: (1 + discs, ...)."""
        model = self.model
        encoder, pooling = model.network.encoder, model.network.resampler.pooling
        views = views.to(model.device)
        paint = views.float().mean((0, 1, 2)).round().to(torch.uint8)
        with autocast(model.device, model.precision):
            original = encoder(views[None])
            chunks = [pooling(original).float()]
            for start in range(0, len(self.centers), _CHUNK):
                discs = self.centers[start : start + _CHUNK]
                masks = torch.from_numpy(disc_masks(self.rays, discs, RADIUS)).to(model.device)
                disc, view = masks.any((2, 3)).nonzero(as_tuple=True)  # others stay as they are
                painted = torch.where(masks[disc, view, ..., None], paint, views[view])
                grids = original.repeat(len(discs), 1, 1, 1, 1)
                grids[disc, view] = encoder(painted[:, None])[:, 0].to(grids.dtype)
                chunks.append(pooling(grids).float())
        return torch.cat(chunks)
