"""The model and its packed loss, on small real towers."""

import dataclasses
from pathlib import Path

import pytest
import torch

from helpers import ROWS, packed_loss, random_views, separate_losses, settings_for
from panollava.data.dialogue import Dialogue
from panollava.errors import UserError
from panollava.model.network import Network, build_model


@pytest.fixture(scope="module")
def built(towers: Path) -> tuple[Network, Dialogue]:
    settings = settings_for(towers)
    model, tokenizer = build_model(settings.model, settings.views, seed=0)
    return model.eval(), Dialogue(tokenizer, 64)


def test_packed_rows_have_the_loss_of_separate_rows(built) -> None:
    model, dialogue = built
    views = random_views(2)
    with torch.no_grad():
        packed = float(packed_loss(model, dialogue, views, ROWS))
        separate = separate_losses(model, dialogue, views)
        single = [float(packed_loss(model, dialogue, views[:1], [[row]])) for row in ROWS[0]]
    assert packed == pytest.approx(sum(separate), abs=1e-5 * len(separate))
    assert single == pytest.approx(separate[:3], abs=1e-5)


def test_packed_rows_have_the_gradient_of_separate_rows(built) -> None:
    model, dialogue = built
    views = random_views(2)
    parameter = model.projector.weight
    packed = torch.autograd.grad(packed_loss(model, dialogue, views, ROWS), parameter)[0]
    separate = sum(
        torch.autograd.grad(packed_loss(model, dialogue, views[i : i + 1], [[row]]), parameter)[0]
        for i, rows in enumerate(ROWS)
        for row in rows
    )
    assert torch.allclose(packed, separate, atol=1e-5)


def test_a_panorama_does_not_depend_on_the_others_in_the_batch(built) -> None:
    model, _ = built
    views = random_views(3)
    with torch.no_grad():
        together = model.vision_tokens(model.features(views))
        single = model.vision_tokens(model.features(views[1:2]))
    assert torch.allclose(together[1:2], single, atol=1e-5)


def test_rolling_the_views_by_one_stride_only_shifts_their_directions(built) -> None:
    """The same view, one stride further, differs only by its direction."""
    model, _ = built
    features = model.features(random_views(1))
    rolled = torch.roll(features, 1, dims=1)
    plain, shifted = model.resampler(features), model.resampler(rolled)
    view = plain.shape[1] // 8  # tokens
    assert not torch.allclose(plain.roll(view, 1), shifted, atol=1e-3)
    directions = model.resampler.directions
    model.resampler.directions = torch.roll(directions, 1, dims=0)
    try:
        assert torch.allclose(
            plain.view(1, 8, -1).roll(1, 1).flatten(), model.resampler(rolled).flatten(), atol=1e-5
        )
    finally:
        model.resampler.directions = directions


@pytest.mark.parametrize("position", ["view", "none"])
def test_positions_view_and_none(towers: Path, position: str) -> None:
    """view distinguishes views by a learned vector; none does not distinguish them."""
    settings = settings_for(towers)
    resampler = dataclasses.replace(settings.model.resampler, position=position)  # type: ignore[arg-type]
    model_settings = dataclasses.replace(settings.model, resampler=resampler)
    model, _ = build_model(model_settings, settings.views, seed=0)
    features = model.features(random_views(1))
    plain, shifted = model.resampler(features), model.resampler(features.roll(1, dims=1))
    view = plain.shape[1] // 8  # tokens
    assert torch.allclose(plain.roll(view, 1), shifted, atol=1e-5) == (position == "none")
    learned = [name for name, _ in model.resampler.named_parameters() if "directions" in name]
    assert learned == (["directions"] if position == "view" else [])


def test_vision_tokens_start_at_the_scale_of_the_text_embeddings(built) -> None:
    model, _ = built
    with torch.no_grad():
        embeddings = model.language_model.get_input_embeddings().weight
        # Of any scale, because the features are normalized.
        for scale in (0.01, 1.0, 100.0):
            features = scale * torch.randn(4, 8, 2, 2, model.encoder.width)
            tokens = model.vision_tokens(features)
            assert float(tokens.std() / embeddings.std()) == pytest.approx(1, abs=0.25)
            assert float(tokens.mean() / embeddings.std()) == pytest.approx(0, abs=0.25)


def test_initial_weights_depend_on_the_seed_only(towers: Path) -> None:
    settings = settings_for(towers)

    def weights(seed: int) -> torch.Tensor:
        torch.rand(seed + 3)  # other random numbers drawn before
        return build_model(settings.model, settings.views, seed)[0].projector.get_parameter(
            "weight"
        )

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_views_of_a_size_that_the_encoder_does_not_take_are_an_error(towers: Path) -> None:
    settings = settings_for(towers)
    views = dataclasses.replace(settings.views, size=224)
    with pytest.raises(UserError, match=r"views.size is 224.*32 x 32"):
        build_model(settings.model, views)


def test_a_tower_that_cannot_be_loaded_is_an_error(towers: Path) -> None:
    settings = settings_for(towers)
    nowhere = dataclasses.replace(settings.model.encoder, path="data/nowhere/encoder")
    with pytest.raises(UserError, match="cannot load 'data/nowhere/encoder'"):
        build_model(dataclasses.replace(settings.model, encoder=nowhere), settings.views)
