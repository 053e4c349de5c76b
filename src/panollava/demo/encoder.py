"""Pretraining of the demo's vision encoder: SigLIP's architecture, with the sigmoid loss (Zhai et
al., Sigmoid Loss for Language Image Pre-Training, 2023) over captions of views, and over image
regions and their names (as in RegionCLIP, Zhong et al., 2022).

Only the vision tower is kept."""

import logging
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import SiglipConfig, SiglipModel

from panollava.demo.pretraining import TOWER, fit
from panollava.demo.render import render
from panollava.demo.scenes import COLORS, EYE, KINDS, SHAPES, Scene, make_scene
from panollava.demo.settings import VIEWS, DemoSettings
from panollava.files import write_json
from panollava.geometry import projections, sphere, views
from panollava.model.resampler import pool_tokens

log = logging.getLogger(__name__)

_POSITIONS = ("left", "middle", "right")
_WORDS = ["<pad>", *KINDS, *COLORS, *SHAPES, *_POSITIONS]
_CAPTION_LENGTH = 10  # words: the kind of place, and three objects of three words each
_PATCH = 8
_POOL = 2
_MEAN = _STD = 0.5

Caption = tuple[str, ...]
Regions = list[tuple[int, int, int, int]]  # of a view: token row, token column, color, shape


def make_encoder(settings: DemoSettings, folder: Path = Path("towers/encoder")) -> None:
    """Pretrain the encoder, and save it in `from_pretrained` format with a report of its loss and
    its linear probe accuracy."""
    parameters = settings.encoder
    torch.set_num_threads(parameters.threads)
    torch.manual_seed(settings.seed)
    pixels, captions, regions = _make_examples(settings, "encoder", parameters.scenes)
    model = _build_model()
    random = np.random.default_rng(settings.stream("encoder"))

    def loss_of_step(step: int) -> Tensor:
        batch = random.integers(len(pixels), size=parameters.batch_size)
        batch_regions = _region_index([regions[i] for i in batch])
        return _loss(model, pixels[batch], [captions[i] for i in batch], batch_regions, random)

    loss = fit(model, loss_of_step, range(parameters.steps), parameters.lr, 0.999, "encoder")
    report = {"loss": round(loss, 4), **probe(model.vision_model.eval(), settings)}
    log.info("linear probe: %s", report)
    model.vision_model.save_pretrained(folder)
    size = {"height": VIEWS.size, "width": VIEWS.size}
    processor = {"image_mean": [_MEAN] * 3, "image_std": [_STD] * 3, "size": size}
    write_json(folder / "preprocessor_config.json", processor)
    write_json(folder / "report.json", report)


def _build_model() -> SiglipModel:
    tower = {**TOWER, "num_attention_heads": 4}
    words = {"vocab_size": len(_WORDS), "max_position_embeddings": _CAPTION_LENGTH}
    special = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos")}
    text = {**tower, **words, **special, "num_hidden_layers": 2}
    vision = {**tower, "image_size": VIEWS.size, "patch_size": _PATCH}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    # Initial values of the paper, since most pairs do not match; transformers sets both to 0.
    torch.nn.init.constant_(model.logit_scale, math.log(10))
    torch.nn.init.constant_(model.logit_bias, -10)
    return model


def _make_examples(
    settings: DemoSettings, stream: str, count: int
) -> tuple[NDArray[np.uint8], list[Caption], list[Regions]]:
    """All views of `count` scenes: pixels (views, height, width, 3), captions and regions."""
    layout = views.layout(VIEWS)
    sampler = views.Sampler(layout, VIEWS.size)
    scenes = [make_scene(settings.stream(stream), index) for index in range(count)]
    described = [_describe_view(scene, view) for scene in scenes for view in layout.projections]
    pixels = [
        sampler.sample(render(scene, settings.height))
        for scene in tqdm(scenes, desc=f"views, {stream}")
    ]
    captions, regions = map(list, zip(*described, strict=True))
    return np.concatenate(pixels), captions, regions


def _describe_view(scene: Scene, projection: projections.Projection) -> tuple[Caption, Regions]:
    """Caption and regions of the objects whose centers are in the view, from left to right."""
    visible = []
    for item in scene.objects:
        pitch = math.atan2(item.size / 2 - EYE, item.distance)
        ray = sphere.rays_from_angles(np.array(math.radians(item.yaw)), np.array(pitch))
        (x, y), inside = projection.position(ray)
        if inside and 0.04 < x < 0.96:
            visible.append((float(x), float(y), item))
    words: list[str] = [scene.kind]
    regions: Regions = []
    grid = VIEWS.size // _PATCH
    for x, y, item in sorted(visible, key=lambda entry: entry[0]):
        words += [item.color, item.shape, _POSITIONS[min(2, int(3 * x))]]
        token = (int(y * grid) // _POOL, int(x * grid) // _POOL)
        regions.append((*token, list(COLORS).index(item.color), SHAPES.index(item.shape)))
    return tuple(words[:_CAPTION_LENGTH]), regions


def _loss(
    model: SiglipModel,
    pixels: NDArray[np.uint8],
    captions: list[Caption],
    regions: Tensor,
    random: np.random.Generator,
) -> Tensor:
    """Sigmoid loss of views against captions, plus that of regions against names. The negatives of
    a caption include a copy with one wrong word. Equal captions count as one text."""
    output = model.vision_model(_normalize(pixels))
    texts = list(dict.fromkeys([*captions, *(_corrupt(c, random) for c in captions)]))
    index = {text: i for i, text in enumerate(texts)}
    loss = _sigmoid_loss(model, output.pooler_output, texts, [index[c] for c in captions])
    tokens = _tokens_at(output.last_hidden_state, regions)
    names = (regions[:, 3] * len(SHAPES) + regions[:, 4]).tolist()
    return loss + _sigmoid_loss(model, tokens, [*product(COLORS, SHAPES)], names)


def _sigmoid_loss(
    model: SiglipModel, features: Tensor, texts: Sequence[Caption], matches: list[int]
) -> Tensor:
    """`features`: (samples, width); `matches`: the index of each sample's text."""
    ids = torch.tensor(
        [[_WORDS.index(w) for w in text] + [0] * (_CAPTION_LENGTH - len(text)) for text in texts]
    )
    image = functional.normalize(features, dim=-1)
    text = functional.normalize(model.text_model(ids).pooler_output, dim=-1)
    logits = image @ text.T * model.logit_scale.exp() + model.logit_bias
    sign = 2 * functional.one_hot(torch.tensor(matches), len(texts)) - 1
    return -functional.logsigmoid(sign * logits).sum() / len(matches)


def _normalize(pixels: NDArray[np.uint8]) -> Tensor:
    """(views, height, width, 3) -> (views, 3, height, width). `model.encoder.Encoder` does the
    same, but without the pooled output that the loss needs."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD


def _tokens_at(hidden: Tensor, regions: Tensor) -> Tensor:
    """(views, tokens, width) -> (objects, width): the tokens at the objects' centers, pooled as in
    Network. `regions`: see `_region_index`."""
    side = VIEWS.size // _PATCH
    pooled = pool_tokens(hidden.unflatten(1, (side, side)), _POOL)
    return pooled[regions[:, 0], regions[:, 1], regions[:, 2]]


def _region_index(regions: list[Regions]) -> Tensor:
    """(objects, 5) int64: view, row and column of the pooled token at the object's center, color,
    shape."""
    return torch.tensor([(view, *at) for view, objects in enumerate(regions) for at in objects])


def _corrupt(caption: Caption, random: np.random.Generator) -> Caption:
    """Replace one word by another of the same category."""
    at = int(random.integers(len(caption)))
    categories = (tuple(KINDS), tuple(COLORS), SHAPES, _POSITIONS)
    category = next(words for words in categories if caption[at] in words)
    others = [word for word in category if word != caption[at]]
    return (*caption[:at], str(random.choice(others)), *caption[at + 1 :])


@torch.inference_mode()
def probe(tower: torch.nn.Module, settings: DemoSettings, scenes: int = 150) -> dict[str, float]:
    """Linear probe: accuracy of ridge regression from the pooled token at an object's center to its
    color and its shape. Fitted on the first two thirds of the objects, measured on the rest."""
    pixels, _, regions = _make_examples(settings, "probe", scenes)
    index = _region_index(regions)
    x = _tokens_at(tower(_normalize(pixels)).last_hidden_state, index).double()
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    split = len(x) * 2 // 3
    report = {}
    for name, column, classes in (("color", 3, len(COLORS)), ("shape", 4, len(SHAPES))):
        targets = functional.one_hot(index[:, column], classes).double()
        ridge = x[:split].T @ x[:split] + 1e-2 * torch.eye(x.shape[1])
        weights = torch.linalg.solve(ridge, x[:split].T @ targets[:split])
        correct = (x[split:] @ weights).argmax(1) == index[split:, column]
        report[f"probe_{name}"] = round(float(correct.double().mean()), 4)
    return report
