"""Ours against the usual way, in one process, in turns: `make bench` prints one table.

The usual way is written out here in its plain form. Each pair is checked to give the same thing
before it is timed. Times are medians; on a shared machine the ratios say more than they do."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from panollava import config, sphere, views  # noqa: E402
from panollava.config import load_settings  # noqa: E402
from panollava.demo.questions import QUERIES, rows, spell  # noqa: E402
from panollava.demo.scenes import make_scene, render  # noqa: E402
from panollava.dialogue import Dialogue, pack  # noqa: E402
from panollava.generate import answer  # noqa: E402
from panollava.logs import table  # noqa: E402
from panollava.model import PanoLLaVA, build_model  # noqa: E402
from panollava.pictures import read_panorama  # noqa: E402

Pair = tuple[str, Callable[[], object], Callable[[], object]]
PANORAMAS, ROWS = 4, 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5, help="how often each is timed (5)")
    parser.add_argument(
        "--pictures", type=Path, help="a folder of large panoramas, to time views at 224 pixels"
    )
    options = parser.parse_args()
    torch.set_num_threads(2)
    cv2.setNumThreads(1)
    lines = [
        measure(pair, options.turns)
        for pair in (*pictures(options.pictures), *training(), *evaluation())
    ]
    print(table(lines, ("what", "ours, ms", "the usual way, ms", "ratio")))  # noqa: T201


def measure(pair: Pair, turns: int) -> tuple[str, str, str, str]:
    name, *both = pair
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for function, own in zip(both, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:  # the first warms up
                own.append(time.perf_counter() - start)
    ours, theirs = map(statistics.median, times)
    return name, f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", f"{theirs / ours:.2f}"


def pictures(folder: Path | None) -> list[Pair]:
    """Eight 224-pixel views of a photo: scaled decoding and cached maps, against full decoding
    and each view by itself with a map of its own."""
    layout = views.layout(config.Views("e2p", 224, 90.0, 0.5, 0.0, False))
    sampler = views.Sampler(layout, 224)

    def ours(path: Path) -> np.ndarray:
        return sampler.sample(read_panorama(path, sampler.panorama_width))

    def usual(path: Path) -> np.ndarray:
        with Image.open(path) as picture:
            panorama = np.asarray(picture.convert("RGB"))
        height, width = panorama.shape[:2]
        seen = []
        for projection in layout.projections:
            x, y = np.moveaxis(sphere.panorama_position(projection.rays(224, 224)), -1, 0)
            x = (x * width - 0.5).astype(np.float32)
            y = (y * height - 0.5).astype(np.float32)
            seen.append(cv2.remap(panorama, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP))
        return np.stack(seen)

    pairs: list[Pair] = []
    for path in sorted(folder.glob("*.jpg")) if folder else []:
        with Image.open(path) as picture:
            name = f"views of {picture.width} x {picture.height}"
        difference = np.abs(ours(path).astype(float) - usual(path)).mean()
        assert difference < 10, f"{path}: the two ways differ by {difference:.1f} of 255"
        pairs.append((name, partial(ours, path), partial(usual, path)))
    return pairs


def demo() -> tuple[PanoLLaVA, Dialogue, torch.Tensor, list[list[tuple[str, str]]]]:
    settings = load_settings(ROOT / "params.yaml")
    model, tokenizer = build_model(settings.model, settings.views, seed=0)
    sampler = views.Sampler(views.layout(settings.views), settings.views.size)
    scenes = [make_scene(9, index) for index in range(PANORAMAS)]
    seen = torch.from_numpy(np.stack([sampler.sample(render(scene, 256)) for scene in scenes]))
    said = [[(query, text) for _, query, text in rows(scene, "", 1, 0)] for scene in scenes]
    return model.eval(), Dialogue(tokenizer, 99), seen, said


def training() -> list[Pair]:
    """Forward and backward of a step: nine rows a panorama packed behind one prefix, against a
    sequence a row with its own picture and logits at every position."""
    model, dialogue, seen, said = demo()
    model.language_model.requires_grad_(False)
    packed_rows = [[dialogue.row(*row) for row in own] for own in said]
    tokens = 8 * 16
    prefix = len(dialogue.prefix)
    packed = pack(dialogue.prefix, tokens, packed_rows, dialogue.pad)

    def ours() -> float:
        loss = model.loss_sum(model.features(seen), packed, prefix) / len(packed.labels)
        loss.backward()
        return loss.item()

    def usual() -> float:
        each = [(index, row) for index, own in enumerate(packed_rows) for row in own]
        vision = model.vision_tokens(model.features(seen[[index for index, _ in each]]))
        longest = max(len(row) for _, row in each)
        ids = torch.full((len(each), longest), dialogue.pad)
        labels = torch.full((len(each), prefix + tokens + longest), -100)
        mask = torch.zeros_like(labels)
        for number, (_, row) in enumerate(each):
            ids[number, : len(row)] = torch.tensor(row.query + row.answer)
            start = prefix + tokens + len(row.query)
            labels[number, start : start + len(row.answer)] = torch.tensor(row.answer)
            mask[number, : prefix + tokens + len(row)] = 1
        before = model.embed(torch.tensor(dialogue.prefix)).expand(len(each), -1, -1)
        embedded = torch.cat([before, vision, model.embed(ids)], dim=1)
        output = model.language_model(inputs_embeds=embedded, attention_mask=mask, labels=labels)
        output.loss.backward()
        return output.loss.item()

    one, other = ours(), usual()
    assert abs(one - other) < 1e-5 * other, (one, other)
    return [(f"training step, demo, {PANORAMAS} panoramas of {ROWS} rows", ours, usual)]


def evaluation() -> list[Pair]:
    """Greedy answers to nine queries a panorama: batched behind one cached prefix, against one
    `generate` a row."""
    model, dialogue, seen, _ = demo()
    queries = [[spell(query) for query in QUERIES.values()] for _ in range(PANORAMAS)]
    with torch.no_grad():
        features = model.features(seen)

    def ours() -> list[list[str]]:
        return answer(model, dialogue, features, queries, 24)

    @torch.no_grad()
    def usual() -> list[list[str]]:
        said = []
        for index, own in enumerate(queries):
            texts = []
            for query in own:
                vision = model.vision_tokens(features[[index]])
                before = model.embed(torch.tensor([dialogue.prefix]))
                after = model.embed(torch.tensor([dialogue.query(query)]))
                produced = model.language_model.generate(  # type: ignore[operator]
                    inputs_embeds=torch.cat([before, vision, after], dim=1),
                    max_new_tokens=24,
                    do_sample=False,
                    eos_token_id=dialogue.stop,
                    pad_token_id=dialogue.pad,
                )
                texts.append(dialogue.decode(produced[0].tolist()))
            said.append(texts)
        return said

    assert ours() == usual()
    return [(f"answers, demo, {PANORAMAS} panoramas of {ROWS} queries", ours, usual)]


if __name__ == "__main__":
    main()
