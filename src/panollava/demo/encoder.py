"""The demo's encoder: SigLIP's architecture and SigLIP's loss (Zhai et al., Sigmoid Loss for
Language Image Pre-Training, 2023), over captions of what a view holds and over regions and their
names (as in Zhong et al., RegionCLIP, 2022).

Its text tower is thrown away, as PanoLLaVA throws SigLIP's away."""

import json
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

from panollava.demo.scenes import COLORS, KINDS, SHAPES, Scene, make_scene, render
from panollava.demo.settings import VIEWS, DemoSettings
from panollava.geometry import sphere, views
from panollava.model.encoder import pool_tokens

log = logging.getLogger(__name__)

_PLACES = ("left", "middle", "right")
_WORDS = ["<pad>", *KINDS, *COLORS, *SHAPES, *_PLACES]
_LENGTH = 10  # words of a caption: the kind, and three objects of three words
_PATCH = 8
_POOL = 2
MEAN = STD = [0.5, 0.5, 0.5]

Caption = tuple[str, ...]
Seen = list[tuple[int, int, int, int]]  # row and column of a patch, color, shape


def make_encoder(settings: DemoSettings, folder: Path) -> None:
    """Pretrain the encoder, and save it as `from_pretrained` reads it, with what a linear probe
    finds in it."""
    own = settings.encoder
    torch.set_num_threads(own.threads)
    torch.manual_seed(settings.seed)
    pixels, captions, seen = _see(settings, "encoder", own.scenes)
    model = _model()
    random = np.random.default_rng(settings.stream("encoder"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=own.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, own.lr, total_steps=own.steps, pct_start=0.1
    )
    bar = tqdm(range(own.steps), desc="encoder")
    for step in bar:
        chosen = random.integers(len(pixels), size=own.batch_size)
        loss = _loss(
            model,
            pixels[chosen],
            [captions[i] for i in chosen],
            _regions([seen[i] for i in chosen]),
            random,
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    report = {"loss": round(loss.item(), 4), **probe(model.vision_model.eval(), settings)}
    log.info("linear probe: %s", report)
    model.vision_model.save_pretrained(folder)
    processor = {"image_mean": MEAN, "image_std": STD, "size": {"height": 64, "width": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def _model() -> SiglipModel:
    tower = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    text = {
        **tower,
        "num_hidden_layers": 2,
        "vocab_size": len(_WORDS),
        "max_position_embeddings": _LENGTH,
        "projection_size": 128,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vision = {**tower, "image_size": VIEWS.size, "patch_size": _PATCH}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    # The paper's start, where most pairs are no match; transformers starts both at 0.
    torch.nn.init.constant_(model.logit_scale, math.log(10))
    torch.nn.init.constant_(model.logit_bias, -10)
    return model


def _see(
    settings: DemoSettings, stream: str, count: int
) -> tuple[NDArray[np.uint8], list[Caption], list[Seen]]:
    """All views of `count` scenes, their captions, and the patches at the objects' centers."""
    layout = views.layout(VIEWS)
    sampler = views.Sampler(layout, VIEWS.size)
    pixels, captions, seen = [], [], []
    for index in tqdm(range(count), desc=f"views, {stream}"):
        scene = make_scene(settings.stream(stream), index)
        pixels.append(sampler.sample(render(scene, settings.height)))
        for projection in layout.projections:
            caption, objects = _describe(scene, projection)
            captions.append(caption)
            seen.append(objects)
    return np.concatenate(pixels), captions, seen


def _describe(scene: Scene, projection: sphere.Projection) -> tuple[Caption, Seen]:
    """What a view holds, from left to right: objects whose center it sees."""
    found = []
    for item in scene.objects:
        yaw, distance = math.radians(item.yaw), item.distance
        drop = math.atan2(item.size / 2 - 1.2, distance)
        ray = sphere.rays_from_angles(np.array(yaw), np.array(drop))
        (x, y), inside = projection.position(ray)
        if inside and 0.04 < x < 0.96:
            found.append((float(x), float(y), item))
    words: list[str] = [scene.kind]
    seen: Seen = []
    grid = VIEWS.size // _PATCH
    for x, y, item in sorted(found, key=lambda entry: entry[0]):
        words += [item.color, item.shape, _PLACES[min(2, int(3 * x))]]
        place = (int(y * grid), int(x * grid))
        seen.append((*place, list(COLORS).index(item.color), SHAPES.index(item.shape)))
    return tuple(words[:_LENGTH]), seen


def _loss(
    model: SiglipModel,
    pixels: NDArray[np.uint8],
    captions: list[Caption],
    regions: Tensor,
    random: np.random.Generator,
) -> Tensor:
    """SigLIP's loss of views against captions, where each caption has a twin that is wrong in one
    word, and of regions against names. Equal texts are one text."""
    seen = model.vision_model(normalize(pixels))
    texts = list(dict.fromkeys([*captions, *(_spoil(c, random) for c in captions)]))
    index = {text: i for i, text in enumerate(texts)}
    loss = _sigmoid_loss(model, seen.pooler_output, texts, [index[c] for c in captions])
    tokens = _pooled(seen.last_hidden_state)[regions[:, 0], regions[:, 1], regions[:, 2]]
    names = (regions[:, 3] * len(SHAPES) + regions[:, 4]).tolist()
    return loss + _sigmoid_loss(model, tokens, [*product(COLORS, SHAPES)], names)


def _sigmoid_loss(
    model: SiglipModel, features: Tensor, texts: Sequence[Caption], own: list[int]
) -> Tensor:
    """`features`: (samples, width); `own`: the index of each sample's text."""
    ids = torch.tensor(
        [[_WORDS.index(w) for w in text] + [0] * (_LENGTH - len(text)) for text in texts]
    )
    image = functional.normalize(features, dim=-1)
    text = functional.normalize(model.text_model(ids).pooler_output, dim=-1)
    logits = image @ text.T * model.logit_scale.exp() + model.logit_bias
    sign = -torch.ones_like(logits)
    sign[torch.arange(len(own)), torch.tensor(own)] = 1
    return -functional.logsigmoid(sign * logits).sum() / len(own)


def _pooled(hidden: Tensor) -> Tensor:
    """(views, tokens, width) -> (views, grid, grid, width), pooled as PanoLLaVA pools tokens."""
    side = VIEWS.size // _PATCH
    return pool_tokens(hidden.unflatten(1, (side, side)), _POOL)


def _regions(seen: list[Seen]) -> Tensor:
    """(objects, 5) int64: view, row and column of the pooled token at its center, color, shape."""
    return torch.tensor(
        [
            (view, row // _POOL, column // _POOL, color, shape)
            for view, own in enumerate(seen)
            for row, column, color, shape in own
        ]
    )


def _spoil(caption: Caption, random: np.random.Generator) -> Caption:
    """Exchange one word for another of its sort."""
    at = int(random.integers(len(caption)))
    sorts = (tuple(KINDS), tuple(COLORS), SHAPES, _PLACES)
    sort = next(sort for sort in sorts if caption[at] in sort)
    others = [word for word in sort if word != caption[at]]
    return (*caption[:at], str(random.choice(others)), *caption[at + 1 :])


def normalize(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 (views, height, width, 3) -> what the tower takes."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


@torch.inference_mode()
def probe(tower: torch.nn.Module, settings: DemoSettings, scenes: int = 150) -> dict[str, float]:
    """How often a linear classifier on the pooled token at an object's center names its color and
    its shape, on scenes that it wasn't fitted on."""
    pixels, _, seen = _see(settings, "probe", scenes)
    tokens = _pooled(tower(normalize(pixels)).last_hidden_state)
    index = _regions(seen)
    x = tokens[index[:, 0], index[:, 1], index[:, 2]].double()
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    half = len(x) * 2 // 3
    report = {}
    for name, column, classes in (("color", 3, len(COLORS)), ("shape", 4, len(SHAPES))):
        wanted = functional.one_hot(index[:, column], classes).double()
        ridge = x[:half].T @ x[:half] + 1e-2 * torch.eye(x.shape[1])
        weights = torch.linalg.solve(ridge, x[:half].T @ wanted[:half])
        right = (x[half:] @ weights).argmax(1) == index[half:, column]
        report[f"probe_{name}"] = round(float(right.double().mean()), 4)
    return report
