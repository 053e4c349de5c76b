"""The real profile's model, SigLIP-base-patch16-224 and Qwen2.5-0.5B, with random weights, and
panoramas with three rows each; the loss in our way and in the usual way."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from panollava import config
from panollava.data.packing import Packed, Row, pack
from panollava.geometry import views
from panollava.model.encoder import Encoder
from panollava.model.network import Network, make_resampler
from panollava.model.resampler import Pooling

PROFILE = Path(__file__).parents[1] / "presets/quic360.yaml"
MODEL, VIEWS = (getattr(config.load_settings(PROFILE), name) for name in ("model", "views"))
SIZE, PATCH = VIEWS.size, 16
LAYOUT = views.layout(VIEWS)
VOCABULARY = 151_936
# Tokens of Qwen's chat template before the image, and of rows like QuIC-360's: a query of one word
# with the template around it, and answers of 20 words on average with the stop token.
PREFIX = 14
QUERY, ANSWERS = 10, (20, 28, 40)


def language_config() -> Qwen2Config:
    """Qwen2.5-0.5B's."""
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )


def build(
    settings: config.Model = MODEL,
    view_settings: config.Views = VIEWS,
    device: torch.device | None = None,
) -> Network:
    torch.manual_seed(0)
    with device or torch.device("cpu"):
        tower = SiglipVisionModel(SiglipVisionConfig(vision_use_head=False))
        language = Qwen2ForCausalLM(language_config())
    encoder = Encoder(tower, -1, [0.5] * 3, [0.5] * 3)
    resampler = make_resampler(settings, view_settings, encoder)
    model = Network(encoder, resampler, nn.Linear(resampler.width, 896), language)
    model.language_model.requires_grad_(False).eval()
    return model.to(device)


@dataclass
class Example:
    """Panoramas, and the rows of each."""

    views: Tensor  # uint8 (panoramas, views, size, size, 3)
    prefix: list[int]
    rows: list[list[Row]]
    packed: Packed

    @property
    def answers(self) -> int:
        return len(self.packed.labels)

    def to(self, device: torch.device) -> "Example":
        packed = Packed(*(tensor.to(device) for tensor in self.packed))
        return Example(self.views.to(device), self.prefix, self.rows, packed)


def make_example(
    panoramas: int = 1,
    rows: int = len(ANSWERS),
    settings: config.Model = MODEL,
    view_settings: config.Views = VIEWS,
) -> Example:
    torch.manual_seed(1)
    view_count = len(views.layout(view_settings).projections)
    sampled = torch.randint(256, (panoramas, view_count, SIZE, SIZE, 3))

    def tokens(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,)).tolist()

    prefix = tokens(PREFIX)
    row_tokens = [
        [Row(tokens(QUERY), tokens(ANSWERS[row % len(ANSWERS)])) for row in range(rows)]
        for _ in range(panoramas)
    ]
    vision = math.prod(Pooling(settings, view_settings, PATCH).shape)
    packed = pack(prefix, vision, row_tokens, pad=0)
    return Example(sampled.to(torch.uint8), prefix, row_tokens, packed)


def our_loss(model: Network, features: Tensor, example: Example) -> Tensor:
    return model.loss_sum(features, example.packed, len(example.prefix)) / example.answers


def usual_loss(model: Network, features: Tensor, example: Example) -> Tensor:
    """One sequence per row, padded to the longest, with transformers' loss over logits at every
    position. `features`: those of each row's panorama, (rows, ...)."""
    rows = [row for of_panorama in example.rows for row in of_panorama]
    vision, device = model.vision_tokens(features), features.device
    start, longest = len(example.prefix) + vision.shape[1], max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), start + longest), -100)
    mask = torch.zeros_like(labels)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row.query + row.answer)
        at = start + len(row.query)
        labels[number, at : at + len(row.answer)] = torch.tensor(row.answer)
        mask[number, : start + len(row)] = 1
    ids, labels, mask = ids.to(device), labels.to(device), mask.to(device)
    before = model.embed(torch.tensor(example.prefix, device=device)).expand(len(rows), -1, -1)
    embedded = torch.cat([before, vision, model.embed(ids)], dim=1)
    output = model.language_model(inputs_embeds=embedded, attention_mask=mask, labels=labels)
    return output.loss
