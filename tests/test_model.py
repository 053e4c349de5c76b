"""Promises of the packed model, on small real towers."""

import dataclasses
from pathlib import Path

import pytest
import torch

from conftest import ROOT, settings_for
from panollava.config import Model, load_settings
from panollava.data.dialogue import Dialogue
from panollava.data.packing import pack
from panollava.demo.questions import QUERIES, spell
from panollava.errors import UserError
from panollava.model.generate import _RoomyLayer, answer
from panollava.model.panollava import PanoLLaVA, build_model

ROWS = [
    [("what", "the red box"), ("where", "left ."), ("what is", "a green ball")],
    [("where is the ball", "right")],
]


@pytest.fixture(scope="module")
def built(towers: Path) -> tuple[PanoLLaVA, Dialogue]:
    settings = settings_for(towers)
    model, tokenizer = build_model(settings.model, settings.views, seed=0)
    return model.eval(), Dialogue(tokenizer, 64)


def loss_of(model: PanoLLaVA, dialogue: Dialogue, views: torch.Tensor, rows: list) -> torch.Tensor:
    """Packed loss, summed."""
    tokenized = [[dialogue.row(*row) for row in own] for own in rows]
    features = model.features(views)
    tokens = model.vision_tokens(features).shape[1]
    packed = pack(dialogue.prefix, tokens, tokenized, dialogue.pad)
    return model.loss_sum(features, packed, len(dialogue.prefix))


def separate_losses(model: PanoLLaVA, dialogue: Dialogue, views: torch.Tensor) -> list[float]:
    """One row a sequence through transformers' own causal model and its own loss."""
    losses = []
    vision = model.vision_tokens(model.features(views))
    embed = model.language_model.get_input_embeddings()
    for panorama, own in enumerate(ROWS):
        for query, text in own:
            row = dialogue.row(query, text)
            before = embed(torch.tensor([dialogue.prefix]))
            after = embed(torch.tensor([row.query + row.answer]))
            embedded = torch.cat([before, vision[panorama : panorama + 1], after], dim=1)
            labels = torch.full(embedded.shape[:2], -100)
            labels[0, -len(row.answer) :] = torch.tensor(row.answer)
            output = model.language_model(inputs_embeds=embedded, labels=labels)
            losses.append(float(output.loss) * len(row.answer))
    return losses


def random_views(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 8, 32, 32, 3), dtype=torch.uint8, generator=generator)


def test_packed_rows_have_the_loss_of_separate_rows(built) -> None:
    model, dialogue = built
    views = random_views(2)
    with torch.no_grad():
        packed = float(loss_of(model, dialogue, views, ROWS))
        separate = separate_losses(model, dialogue, views)
        alone = [float(loss_of(model, dialogue, views[:1], [[row]])) for row in ROWS[0]]
    assert packed == pytest.approx(sum(separate), abs=1e-5 * len(separate))
    assert alone == pytest.approx(separate[:3], abs=1e-5)


def test_packed_rows_have_the_gradient_of_separate_rows(built) -> None:
    model, dialogue = built
    views = random_views(2)
    parameter = model.projector.weight
    together = torch.autograd.grad(loss_of(model, dialogue, views, ROWS), parameter)[0]
    apart = sum(
        torch.autograd.grad(loss_of(model, dialogue, views[i : i + 1], [[row]]), parameter)[0]
        for i, own in enumerate(ROWS)
        for row in own
    )
    assert torch.allclose(together, apart, atol=1e-5)


def test_a_panorama_does_not_depend_on_its_neighbours_in_the_batch(built) -> None:
    model, _ = built
    views = random_views(3)
    with torch.no_grad():
        together = model.vision_tokens(model.features(views))
        alone = model.vision_tokens(model.features(views[1:2]))
    assert torch.allclose(together[1:2], alone, atol=1e-5)


def test_a_roll_by_one_stride_is_a_shift_of_the_directions(built) -> None:
    """The same view seen one stride further is told from before by its direction alone."""
    model, _ = built
    features = model.features(random_views(1))
    rolled = torch.roll(features, 1, dims=1)
    plain, turned = model.resampler(features), model.resampler(rolled)
    assert not torch.allclose(plain.roll(16, 1), turned, atol=1e-3)
    directions = model.resampler.directions
    model.resampler.directions = torch.roll(directions, 1, dims=0)
    try:
        assert torch.allclose(
            plain.view(1, 8, -1).roll(1, 1).flatten(), model.resampler(rolled).flatten(), atol=1e-5
        )
    finally:
        model.resampler.directions = directions


@pytest.mark.parametrize("position", ["view", "none"])
def test_other_positions_are_there_to_be_compared_with(towers: Path, position: str) -> None:
    """A learned vector tells the views apart, and without any position nothing does."""
    settings = settings_for(towers)
    own = dataclasses.replace(settings.model.resampler, position=position)  # type: ignore[arg-type]
    model, _ = build_model(replace_model(settings.model, resampler=own), settings.views, seed=0)
    features = model.features(random_views(1))
    plain, turned = model.resampler(features), model.resampler(features.roll(1, dims=1))
    assert torch.allclose(plain.roll(4, 1), turned, atol=1e-5) == (position == "none")
    learned = [name for name, _ in model.resampler.named_parameters() if "directions" in name]
    assert learned == (["directions"] if position == "view" else [])


@pytest.mark.parametrize("room", [1, 5, 64])
def test_batched_answers_are_those_of_generate_row_by_row(
    monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Also where some end early, and the others go on without them."""
    monkeypatch.setattr(_RoomyLayer, "ROOM", room)
    monkeypatch.chdir(ROOT)
    settings = load_settings(ROOT / "params.yaml")
    model, tokenizer = build_model(settings.model, settings.views)
    dialogue = Dialogue(tokenizer)
    monkeypatch.setattr(dialogue, "decode", list)
    torch.manual_seed(0)
    features = model.eval().features(torch.randint(256, (3, 8, 64, 64, 3)).to(torch.uint8))
    asked = [spell(query) for query in QUERIES.values()]
    queries = [asked, asked[:1], asked[4:]]
    embed = model.language_model.get_input_embeddings()
    before = embed(torch.tensor([dialogue.prefix]))
    model.language_model.generation_config.eos_token_id = None
    endless = []
    for vision, own in zip(model.vision_tokens(features), queries, strict=True):
        after = [embed(torch.tensor([dialogue.query(query)])) for query in own]
        produced = [
            model.language_model.generate(  # type: ignore[operator]
                inputs_embeds=torch.cat([before, vision[None], query], dim=1),
                max_new_tokens=20,
                do_sample=False,
                pad_token_id=dialogue.pad,
            )
            for query in after
        ]
        endless.append([row.tolist() for (row,) in produced])

    def until(stop: int) -> list[list[list[int]]]:
        return [[row[: row.index(stop)] if stop in row else row for row in own] for own in endless]

    def lengths(stop: int) -> set[int]:
        return {len(row) for own in until(stop) for row in own}

    words = {word for own in endless for row in own for word in row}
    *_, one, other = sorted(words, key=lambda word: (len(lengths(word)), word))
    assert min(len(lengths(one)), len(lengths(other))) > 4, "answers of many lengths"
    for stop in (dialogue.stop, one, other):
        monkeypatch.setattr(dialogue, "ends", frozenset([stop]))
        assert answer(model, dialogue, features, queries, max_new_tokens=20) == until(stop)
    # As many queries as panoramas, and yet not one of each.
    odd = answer(model, dialogue, features, [[], asked[:1], asked[4:6]], max_new_tokens=20)
    assert odd == [[], until(other)[1], until(other)[2][:2]]


def test_the_start_is_a_function_of_the_seed(towers: Path) -> None:
    settings = settings_for(towers)

    def weights(seed: int) -> torch.Tensor:
        torch.rand(seed + 3)  # whatever was drawn before
        return build_model(settings.model, settings.views, seed)[0].projector.get_parameter(
            "weight"
        )

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def replace_model(model: Model, **changes: object) -> Model:
    return dataclasses.replace(model, **changes)  # type: ignore[arg-type]


def test_views_of_another_size_than_the_encoder_takes_are_an_error(towers: Path) -> None:
    settings = settings_for(towers)
    views = dataclasses.replace(settings.views, size=224)
    with pytest.raises(UserError, match=r"views.size is 224.*32 x 32"):
        build_model(settings.model, views)


def test_an_unknown_resampler_or_tower_is_an_error(towers: Path) -> None:
    settings = settings_for(towers)
    odd = dataclasses.replace(settings.model.resampler, type="perceiver")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"unknown resampler 'perceiver'.*mlp"):
        build_model(replace_model(settings.model, resampler=odd), settings.views)
    odd = dataclasses.replace(settings.model.resampler, position="yaw")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"resampler.position: expected ray, view or none.*'yaw'"):
        build_model(replace_model(settings.model, resampler=odd), settings.views)
    nowhere = dataclasses.replace(settings.model.encoder, path="data/nowhere/encoder")
    with pytest.raises(UserError, match="data/nowhere/encoder"):
        build_model(replace_model(settings.model, encoder=nowhere), settings.views)
