"""Tokens merged on the sphere (model.tokens: sphere) against tokens pooled in each view, at the
real profile's size: a training step, the features on disk, and answers."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import real_size
from evaluation import QUERIES_PER_PANORAMA, TokenDialogue, encode
from measure import ROOT, Line, options_parser, report, time_alternately
from panollava.config import load_settings
from panollava.demo.questions import QUERIES
from panollava.model.generate import answer
from panollava.model.network import build_model
from training import Steps

MODELS = {
    tokens: dataclasses.replace(real_size.MODEL, tokens=tokens) for tokens in ("sphere", "views")
}
STEP_GOALS = {"resampler": 1.2, "finetune": 1.35}
ANSWERS_GOAL = 1.3
ANSWERED = 8  # panoramas


class Measured(NamedTuple):
    """Of one setting of `model.tokens`."""

    run: Callable[[], object]
    tokens: int  # of a panorama
    values: int  # of a panorama's features


def main() -> None:
    options = options_parser(__doc__, repeats=3).parse_args()
    lines = []
    for stage, goal in STEP_GOALS.items():
        both = [_step(stage, tokens) for tokens in MODELS]
        name = f"step of {stage}, {both[0].tokens} merged tokens for {both[1].tokens}"
        lines.append(_compare(name, both, goal, options.repeats))
    sphere, views = (each.values * 2 / 1e6 for each in both)  # float16
    lines.append(Line("features of a panorama", "MB", sphere, views, at_least=2))
    both = [_answers(tokens) for tokens in MODELS]
    name = f"answers, {ANSWERED} panoramas, {QUERIES_PER_PANORAMA} queries each"
    report([*lines, _compare(name, both, ANSWERS_GOAL, options.repeats)], options.out)


def _compare(name: str, both: list[Measured], goal: float, repeats: int) -> Line:
    sphere, views = time_alternately(*(each.run for each in both), repeats=repeats)
    return Line(name, "s", sphere, views, at_least=goal)


def _step(stage: str, tokens: str) -> Measured:
    """One optimizer step: one panorama with three rows."""
    steps = Steps(stage, settings=MODELS[tokens])
    size = steps.features.numel()
    return Measured(partial(steps.take, steps.our_loss), size // steps.features.shape[-1], size)


def _answers(tokens: str) -> Measured:
    model = real_size.build(MODELS[tokens])
    demo = load_settings(ROOT / "params.yaml")
    _, tokenizer = build_model(demo.model, demo.views)
    features = encode(model, real_size.make_example(ANSWERED).views)
    queries = [list(QUERIES.values())[:QUERIES_PER_PANORAMA]] * ANSWERED
    length = round(sum(real_size.ANSWERS) / len(real_size.ANSWERS))
    dialogue, size = TokenDialogue(tokenizer), features.numel() // ANSWERED
    run = partial(answer, model, dialogue, features, queries, length)
    return Measured(run, size // features.shape[-1], size)


if __name__ == "__main__":
    main()
