"""Greedy answers to three queries a panorama: batched behind one cached prefix, against one
`generate` a row; with the demo's towers, and at the real profile's size with random weights.

Both start from the panorama's features."""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import real_size
from measure import Line, in_turns, write
from panollava.config import load_settings
from panollava.data.dialogue import Dialogue
from panollava.demo.questions import QUERIES, spell
from panollava.demo.render import render
from panollava.demo.scenes import make_scene
from panollava.geometry import views
from panollava.model.device import keep_freed_memory
from panollava.model.generate import answer
from panollava.model.panollava import PanoLLaVA, build_model

ROOT = Path(__file__).parents[1]
THREADS = 2
QUERIES_EACH = 3


class Numbered(Dialogue):
    """Answers as the numbers of their tokens: a small tokenizer has no words for a large
    vocabulary."""

    def decode(self, tokens: list[int]) -> str:
        if self.stop in tokens:
            tokens = tokens[: tokens.index(self.stop)]
        return " ".join(map(str, tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=("demo", "real"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    keep_freed_memory()
    of_size = {"demo": of_demo, "real": of_real_size}[options.size]
    write(options.out, [of_size(options.turns)])


def of_demo(turns: int) -> Line:
    settings = load_settings(ROOT / "params.yaml")
    model, tokenizer = build_model(settings.model, settings.views)
    sampler = views.Sampler(views.layout(settings.views), settings.views.size)
    own = settings.evaluate
    scenes = [sampler.sample(render(make_scene(9, i), 256)) for i in range(own.batch_size)]
    features = encode(model, torch.from_numpy(np.stack(scenes)))
    return compare("demo", model, Dialogue(tokenizer), features, own.max_new_tokens, turns)


def of_real_size(turns: int, panoramas: int = 8, device: torch.device | None = None) -> Line:
    """Half of the profile's panoramas at once, for the usual way takes long. Random weights never
    stop: all answers have the mean length of QuIC-360's."""
    model = real_size.build(device=device)
    settings = load_settings(ROOT / "params.yaml")
    _, tokenizer = build_model(settings.model, settings.views)
    features = encode(model, real_size.make_example(panoramas).views.to(device or "cpu"))
    length = round(sum(real_size.ANSWERS) / len(real_size.ANSWERS))
    return compare(
        "real size" if device is None else f"real size, {device.type}",
        model,
        Numbered(tokenizer),
        features,
        length,
        turns,
    )


def encode(model: PanoLLaVA, seen: Tensor) -> Tensor:
    model.eval().requires_grad_(False)
    with torch.inference_mode():
        return model.features(seen)


def compare(
    name: str,
    model: PanoLLaVA,
    dialogue: Dialogue,
    features: Tensor,
    max_new_tokens: int,
    turns: int,
) -> Line:
    asked = [spell(query) for query in list(QUERIES.values())[:QUERIES_EACH]]
    queries = [asked] * len(features)
    ours = partial(answer, model, dialogue, features, queries, max_new_tokens)
    usual = partial(one_by_one, model, dialogue, features, queries, max_new_tokens)
    assert ours() == usual(), "the two ways answer differently"
    own, other = in_turns(ours, usual, turns=turns, warm=True)
    what = f"answers, {name}, {len(features)} panoramas, {QUERIES_EACH} queries each"
    return Line(what, "s", own, other, at_least=4.0)


@torch.inference_mode()
def one_by_one(
    model: PanoLLaVA,
    dialogue: Dialogue,
    features: Tensor,
    queries: list[list[str]],
    max_new_tokens: int,
) -> list[list[str]]:
    said = []
    for index, own in enumerate(queries):
        texts = []
        for query in own:
            vision = model.vision_tokens(features[[index]])
            before = model.embed(torch.tensor([dialogue.prefix], device=vision.device))
            after = model.embed(torch.tensor([dialogue.query(query)], device=vision.device))
            produced = model.language_model.generate(  # type: ignore[operator]
                inputs_embeds=torch.cat([before, vision, after], dim=1),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=list(dialogue.ends),
                pad_token_id=dialogue.pad,
            )
            texts.append(dialogue.decode(produced[0].tolist()))
        said.append(texts)
    return said


if __name__ == "__main__":
    main()
