"""Greedy answers to three queries per panorama: batched behind one cached prefix, against one
`generate` per row. With the demo's towers, and at the real profile's size with random weights.

Both ways start from the panorama's features."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

import real_size
from measure import ROOT, Line, options_parser, report, time_alternately
from panollava.config import load_settings
from panollava.data.dialogue import Dialogue
from panollava.demo.questions import QUERIES
from panollava.demo.render import render
from panollava.demo.scenes import make_scene
from panollava.geometry import views
from panollava.model.device import keep_freed_memory
from panollava.model.generate import answer
from panollava.model.network import Network, build_model

THREADS = 2
QUERIES_PER_PANORAMA = 3


class TokenDialogue(Dialogue):
    """Decodes answers to token numbers, because the demo's tokenizer has no text for most tokens of
    the real vocabulary."""

    def whole_characters(self, tokens: list[int]) -> list[int]:
        return tokens

    def decode(self, tokens: list[int]) -> str:
        if self.stop in tokens:
            tokens = tokens[: tokens.index(self.stop)]
        return " ".join(map(str, tokens))


def main() -> None:
    parser = options_parser(__doc__, repeats=2)
    parser.add_argument("size", choices=("demo", "real"))
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    keep_freed_memory()
    measure = {"demo": measure_demo, "real": measure_real_size}[options.size]
    report([measure(options.repeats)], options.out)


def measure_demo(repeats: int) -> Line:
    settings = load_settings(ROOT / "params.yaml")
    model, tokenizer = build_model(settings.model, settings.views)
    sampler = views.Sampler(views.layout(settings.views), settings.views.size)
    size, max_new_tokens = settings.evaluate.batch_size, settings.evaluate.max_new_tokens
    sampled = [sampler.sample(render(make_scene(9, i), 256)) for i in range(size)]
    features = encode(model, torch.from_numpy(np.stack(sampled)))
    dialogue = Dialogue(tokenizer, prompt=settings.model.prompt)
    return compare("demo", model, dialogue, features, max_new_tokens, repeats)


def measure_real_size(repeats: int, panoramas: int = 8, device: torch.device | None = None) -> Line:
    """Half of the profile's panoramas per batch, because the usual way is slow. Models with random
    weights never stop: all answers have the mean length of QuIC-360's."""
    model = real_size.build(device=device)
    settings = load_settings(ROOT / "params.yaml")
    _, tokenizer = build_model(settings.model, settings.views)
    features = encode(model, real_size.make_example(panoramas).views.to(device or "cpu"))
    length = round(sum(real_size.ANSWERS) / len(real_size.ANSWERS))
    name = "real size" if device is None else f"real size, {device.type}"
    return compare(name, model, TokenDialogue(tokenizer), features, length, repeats)


def encode(model: Network, batch: Tensor) -> Tensor:
    model.eval().requires_grad_(False)
    with torch.inference_mode():
        return model.features(batch)


def compare(
    name: str,
    model: Network,
    dialogue: Dialogue,
    features: Tensor,
    max_new_tokens: int,
    repeats: int,
) -> Line:
    texts = list(QUERIES.values())[:QUERIES_PER_PANORAMA]
    queries = [texts] * len(features)

    def ours() -> list[list[str]]:
        answers = answer(model, dialogue, features, queries, max_new_tokens)
        return [[found.text for found in texts] for texts in answers]

    usual = partial(answer_one_by_one, model, dialogue, features, queries, max_new_tokens)
    assert ours() == usual(), "the two ways answer differently"
    our_time, usual_time = time_alternately(ours, usual, repeats=repeats, warm=True)
    what = f"answers, {name}, {len(features)} panoramas, {QUERIES_PER_PANORAMA} queries each"
    return Line(what, "s", our_time, usual_time, at_least=4.0)


@torch.inference_mode()
def answer_one_by_one(
    model: Network,
    dialogue: Dialogue,
    features: Tensor,
    queries: list[list[str]],
    max_new_tokens: int,
) -> list[list[str]]:
    answers: list[list[str]] = [[] for _ in queries]
    for index, texts in enumerate(queries):
        for query in texts:
            vision = model.vision_tokens(features[[index]])
            before = model.embed(torch.tensor([dialogue.text_prefix], device=vision.device))
            after = model.embed(torch.tensor([dialogue.query(query)], device=vision.device))
            generated = model.language_model.generate(  # type: ignore[operator]
                inputs_embeds=torch.cat([before, vision, after], dim=1),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=list(dialogue.ends),
                pad_token_id=dialogue.pad,
            )
            answers[index].append(dialogue.decode(generated[0].tolist()))
    return answers


if __name__ == "__main__":
    main()
