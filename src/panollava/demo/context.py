"""Context tokens: what the demo's language model reads during pretraining in place of a panorama's
vision tokens.

A context token is a noisy sum of word embeddings that state some facts of a scene, for example
"red ball front". Tokens are in random order, facts are repeated, and some tokens state nothing."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from panollava.data.dialogue import Dialogue
from panollava.demo.scenes import CLEARANCE, DIRECTIONS, TOLERANCE, Object, Scene, offset
from panollava.demo.settings import CONTEXT, MAX_SILENT
from panollava.model.network import Network


def context_tokens(
    model: Network,
    dialogue: Dialogue,
    scenes: list[Scene],
    noise: float,
    per_object: int,
    random: np.random.Generator,
) -> Tensor:
    """(scenes, CONTEXT, width). One to `per_object` tokens describe each object; the others state
    the kind of place, or nothing. `noise`: relative to a token's norm."""
    words = [token_words(scene, per_object, random) for scene in scenes]
    vocabulary = dialogue.tokenizer.get_vocab()
    longest = max(len(token) for tokens in words for token in tokens)
    ids = torch.tensor(
        [
            # A word after a space is one token of the tokenizer.
            [
                [vocabulary[f"Ġ{w}"] for w in token] + [dialogue.pad] * (longest - len(token))
                for token in tokens
            ]
            for tokens in words
        ]
    )
    is_word = (ids != dialogue.pad).unsqueeze(-1)
    summed = (model.embed(ids) * is_word).sum(dim=2)
    normed = functional.normalize(summed, dim=-1, eps=1e-6) * summed.shape[-1] ** 0.5
    noises = torch.from_numpy(random.standard_normal(normed.shape).astype(np.float32))
    return normed + noise * noises


def token_words(scene: Scene, per_object: int, random: np.random.Generator) -> list[list[str]]:
    """The words of each context token."""
    described: list[list[str]] = [[]] * int(random.integers(0, MAX_SILENT + 1))
    order = random.permutation(CONTEXT)
    for item in scene.objects:
        words = [item.color, item.shape, *_directions(item)]
        if item is scene.largest:
            words.append("largest")
        described += [words] * int(random.integers(1, per_object + 1))
    described += [[scene.kind]] * (CONTEXT - len(described))
    return [described[i] for i in np.argsort(order)]


def _directions(item: Object) -> list[str]:
    """The object's direction, or the two directions that it is between."""
    offsets = {name: offset(item.yaw, name) for name in DIRECTIONS}
    return [name for name in DIRECTIONS if offsets[name] <= TOLERANCE] or [
        name for name in DIRECTIONS if offsets[name] < CLEARANCE
    ]
