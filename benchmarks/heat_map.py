"""How faithful heat maps are, on the demo, after `make repro`: does the map of an answer point to
the object that was asked about, and does the answer depend on what the map marks?

Questions name a direction ("what is behind?") or none ("which object is the largest?"). Maps are
those of the words for the object's color and shape, in the model's own answer, where it is right.

    pointing  share of maps whose maximum is within 20 degrees (great circle) of the object's center
    deletion  nats of log-likelihood that these words lose when the tenth of the directions that the
              map marks most is painted over, less what a random tenth costs (mean of ten draws)
    control   Spearman correlation with the map of another panorama, for any question of the kind
              and for the same question, and with the map of the same answer by a model whose
              resampler and projector are random

The method was chosen on --split valid. Intervals (95%) are a cluster bootstrap over panoramas."""

import argparse
import copy
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from measure import ROOT
from panollava import paths
from panollava.config import load_settings
from panollava.data.packing import Packed, Row, pack
from panollava.data.shards import Shards
from panollava.demo.questions import QUERIES
from panollava.demo.scenes import DIRECTIONS, EYE, Object, Scene, make_scene
from panollava.demo.settings import load_demo_settings
from panollava.evaluation.confidence import interval_of_mean
from panollava.geometry.discs import map_discs, seen
from panollava.geometry.projections import panorama_rays
from panollava.geometry.sphere import cell_centers, rays_from_angles
from panollava.geometry.views import token_rays
from panollava.model.heat_map import HEIGHT, SMOOTHING, HeatMaps
from panollava.model.network import build_model
from panollava.model.panollava import PanoLLaVA

WITHIN = 20  # degrees
DRAWS = 10
BLOCKS = 16  # along a view's side, over which gradients are averaged
OURS = "occlusion (ours)"
Map = NDArray[np.floating]


class Question(NamedTuple):
    """A question about an object, and the model's answer, where `words` name the object."""

    panorama: int
    topic: str
    target: Object
    answer: str
    words: slice

    @property
    def kind(self) -> str:
        return "largest" if self.topic == "largest" else "names a direction"


class Measured(NamedTuple):
    angle: float  # degrees from the map's maximum to the object's center
    lost: float  # nats more than a random tenth
    values: Map  # at the directions of the tokens


class Gradients:
    """The usual methods: gradients at the views' pixels, and attention of the last layers."""

    def __init__(self, model: PanoLLaVA) -> None:
        self.model = model
        self.rays = token_rays(model.sampler.layout, cell_centers(BLOCKS)).reshape(-1, 3)

    def maps(self, views: NDArray, row: Row, words: list[int]) -> dict[str, Map]:
        pixels = torch.from_numpy(views).float()[None].requires_grad_()
        with torch.enable_grad():
            _likelihood(self.model, pixels, row, words).sum().backward()
        gradient = pixels.grad
        assert gradient is not None
        by_input = gradient * (pixels.detach() - pixels.detach().mean((0, 1, 2, 3)))
        return {
            "gradient": self._map(gradient.norm(dim=-1)[0]),
            "gradient x input": self._map(by_input.sum(-1)[0]),
            "attention (last half of the layers)": self._attention(pixels.detach(), row, words),
        }

    def _map(self, values: Tensor) -> Map:
        """(views, size, size) -> a map: mean over blocks of pixels, without its sign."""
        side = values.shape[1] // BLOCKS
        blocks = values.unflatten(2, (BLOCKS, side)).unflatten(1, (BLOCKS, side)).mean((2, 4))
        projections = self.model.sampler.layout.projections
        return map_discs(blocks.abs().flatten().numpy(), self.rays, projections, 8, HEIGHT)

    def _attention(self, pixels: Tensor, row: Row, words: list[int]) -> Map:
        network, dialogue = self.model.network, self.model.dialogue
        layers = [m for name, m in network.named_modules() if name.endswith("self_attn")]
        layers = [m for m in layers if m in [*network.language_model.modules()]]
        kept: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _m, _i, output: kept.append(output[1]))
            for layer in layers[len(layers) // 2 :]
        ]
        network.language_model.set_attn_implementation("eager")
        with torch.no_grad():
            _likelihood(self.model, pixels, row, words)
        network.language_model.set_attn_implementation("sdpa")
        for hook in hooks:
            hook.remove()
        rays = network.resampler.pooling.rays.reshape(-1, 3)
        if network.resampler.tokens != len(rays):
            sys.exit("attention has no map here: a token of this resampler has no direction")
        prefix = len(dialogue.text_prefix)
        first = prefix + len(rays) + len(row.query) - 1  # predicts the answer's first token
        asking = [first + word for word in words]
        weights = torch.stack([each[0][:, asking].mean((0, 1)) for each in kept]).mean(0)
        values = weights[prefix : prefix + len(rays)].numpy()
        return map_discs(values, rays, self.model.sampler.layout.projections, SMOOTHING, HEIGHT)


def main() -> None:
    options = _options()
    os.chdir(ROOT if options.project is None else options.project)
    torch.set_num_threads(options.threads)
    model = PanoLLaVA.from_pretrained("runs/vlm_finetune", accelerator="cpu")
    random = _with_random_resampler(model)
    views = Shards(paths.PREPARED / options.split / paths.PANORAMAS)
    gradients = Gradients(model)
    measured: dict[tuple[str, str], dict[tuple[int, str], Measured]] = defaultdict(dict)
    likewise: dict[str, dict[tuple[int, str], float]] = defaultdict(dict)
    count = min(options.panoramas or len(views), len(views))
    for panorama in tqdm(range(count), disable=None):
        scene = make_scene(
            load_demo_settings(Path("data/demo/params.yaml")).stream(options.split), panorama
        )
        pixels = np.array(views[panorama])
        questions = _ask(model, pixels, panorama, scene)
        if not questions:
            continue
        maps = HeatMaps(model, pixels)
        maps.compute([(QUERIES[each.topic], each.answer) for each in questions])
        of_random = copy.copy(maps)
        of_random.model, of_random._losses = random, {}
        for question in questions:
            asked = QUERIES[question.topic], question.answer, question.words
            row = model.dialogue.row(*asked[:2], truncate=False)
            words = maps.tokens(row.answer[:-1], question.answer, question.words)
            each = {OURS: maps.heat_map(*asked)}
            if not options.only_ours:
                each |= gradients.maps(pixels, row, words)
            results = _measure(model, pixels, question, row, words, each)
            for method, result in results.items():
                measured[question.kind, method][panorama, question.topic] = result
            if OURS in results:
                values = _at_tokens(model, of_random.heat_map(*asked))
                key = (panorama, question.topic)
                likewise[question.kind][key] = _spearman(results[OURS].values, values)
    sys.stdout.write(_table(measured, likewise) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--panoramas", type=int, help="only the first ones")
    parser.add_argument("--only-ours", action="store_true", help="leave the other methods out")
    parser.add_argument("--project", help="folder of the trained project; default: this one")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _ask(model: PanoLLaVA, pixels: NDArray, panorama: int, scene: Scene) -> list[Question]:
    targets = {d: item for d in DIRECTIONS if scene.is_clear(d) and (item := scene.at(d))}
    if scene.largest.direction is not None:
        targets["largest"] = scene.largest
    if not targets:
        return []
    features = model.features_of_views(pixels[None])
    (answers,) = model.answer_features(features, [[QUERIES[topic] for topic in targets]])
    questions = []
    for (topic, target), answer in zip(targets.items(), answers, strict=True):
        name = f"{target.color} {target.shape}"
        if (at := answer.text.find(name)) >= 0:
            words = slice(at, at + len(name))
            questions.append(Question(panorama, topic, target, answer.text, words))
    return questions


def _measure(
    model: PanoLLaVA,
    pixels: NDArray,
    question: Question,
    row: Row,
    words: list[int],
    maps: dict[str, Map],
) -> dict[str, Measured]:
    item = question.target
    pitch = np.arctan((item.size / 2 - EYE) / item.distance)
    target = rays_from_angles(np.radians(item.yaw), pitch)
    rays = panorama_rays(HEIGHT, 2 * HEIGHT)
    generator = np.random.default_rng((question.panorama, [*QUERIES].index(question.topic)))
    maps = {
        **maps,
        "chance": generator.random((HEIGHT, 2 * HEIGHT))
        * seen(model.sampler.layout.projections, rays),
    }
    values = {name: _at_tokens(model, each) for name, each in maps.items()}
    tenth = round(len(values[OURS]) / 10)
    tops = [np.argsort(-each)[:tenth] for each in values.values()]
    tops += [generator.permutation(len(values[OURS]))[:tenth] for _ in range(DRAWS)]
    left = _likelihood(model, _paint(model, pixels, tops), row, words).numpy()
    random = left[len(maps) :].mean()
    angles = {
        name: np.degrees(np.arccos(np.clip(rays.reshape(-1, 3)[each.argmax()] @ target, -1, 1)))
        for name, each in maps.items()
    }
    return {
        name: Measured(angles[name], float(random - lost), values[name])
        for name, lost in zip(maps, left, strict=False)
    }


def _at_tokens(model: PanoLLaVA, heat_map: Map) -> NDArray:
    """The mean of a map over the directions, among those that views show, nearest to each token."""
    rays = panorama_rays(HEIGHT, 2 * HEIGHT)
    nearest = _nearest(model, rays).ravel()
    area = np.hypot(rays[..., 0], rays[..., 2]) * seen(model.sampler.layout.projections, rays)
    total = np.bincount(nearest, (area * heat_map).ravel(), nearest.max() + 1)
    return total / np.bincount(nearest, area.ravel(), nearest.max() + 1)


def _nearest(model: PanoLLaVA, rays: NDArray) -> NDArray:
    """(..., 3) -> the token nearest to each ray, (...)."""
    return (rays @ model.network.resampler.pooling.rays.reshape(-1, 3).T).argmax(-1)


def _paint(model: PanoLLaVA, pixels: NDArray, tokens: list[NDArray]) -> Tensor:
    """The views with what is nearest to some tokens painted over, for each list of tokens."""
    nearest = _nearest(model, token_rays(model.sampler.layout, cell_centers(pixels.shape[1])))
    masks = torch.from_numpy(np.stack([np.isin(nearest, each) for each in tokens]))[..., None]
    original = torch.from_numpy(pixels).float()
    return torch.where(masks, original.mean((0, 1, 2)), original)


def _likelihood(model: PanoLLaVA, pixels: Tensor, row: Row, words: list[int]) -> Tensor:
    """Log-likelihood, in nats, of these tokens of the answer, for views (panoramas, views, size,
    size, 3): (panoramas,)."""
    network, dialogue = model.network, model.dialogue
    features = network.features(pixels)
    vision = network.resampler.tokens
    packed: Packed = pack(dialogue.text_prefix, vision, [[row]] * len(pixels), dialogue.pad)
    logits = network.answer_logits(features, packed, len(dialogue.text_prefix))
    likelihood = logits.log_softmax(-1).gather(1, packed.labels[:, None])
    return likelihood.view(len(pixels), -1)[:, words].sum(1)


def _with_random_resampler(model: PanoLLaVA) -> PanoLLaVA:
    settings = load_settings(paths.PARAMS)
    network, _ = build_model(settings.model, settings.views, seed=settings.seed + 1)
    network.encoder = model.network.encoder
    network.eval().requires_grad_(False)
    return PanoLLaVA(network, model.dialogue, model.header, model.precision)


def _spearman(first: NDArray, second: NDArray) -> float:
    ranks = [pd.Series(each).rank() for each in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1]) if np.ptp(first) and np.ptp(second) else 0.0


def _with_other_panorama(
    results: dict[tuple[int, str], Measured], same: bool
) -> dict[tuple[int, str], float]:
    """The correlation of each map with that of the next panorama: for the `same` question, or for
    any of its kind."""
    groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for panorama, topic in results:
        groups[topic if same else ""].append((panorama, topic))
    correlations = {}
    for keys in groups.values():
        for key in keys:
            later = [other for other in keys if other[0] > key[0]] or keys
            if later[0][0] != key[0]:
                correlations[key] = _spearman(results[key].values, results[later[0]].values)
    return correlations


def _table(
    measured: dict[tuple[str, str], dict[tuple[int, str], Measured]],
    likewise: dict[str, dict[tuple[int, str], float]],
) -> str:
    lines = []
    for (kind, method), results in measured.items():

        def mean(value: Callable[[Measured], float], results=results) -> str:
            return _mean({key: value(each) for key, each in results.items()})

        lines.append(
            {
                "question": f"{kind} ({len(results)})",
                "method": method,
                f"within {WITHIN} degrees": mean(lambda each: each.angle <= WITHIN),
                "median angle": f"{np.median([each.angle for each in results.values()]):.1f}",
                "deletion, nats": mean(lambda each: each.lost),
                "other panorama": _mean(_with_other_panorama(results, same=False)),
                "same question": _mean(_with_other_panorama(results, same=True)),
                "random resampler": _mean(likewise[kind]) if method == OURS else "",
            }
        )
    return tabulate(lines, headers="keys", tablefmt="pipe")


def _mean(values: dict[tuple[int, str], float]) -> str:
    if not values:
        return ""
    bounds = interval_of_mean(values)
    low, high = bounds["low"], bounds["high"]
    return f"{np.mean([*values.values()]):.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
