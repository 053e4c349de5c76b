"""Views of all strategies show what is in their directions, including at the seam and the poles."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from panollava import config
from panollava.data.images import roll
from panollava.errors import UserError
from panollava.geometry.projections import panorama_rays
from panollava.geometry.sphere import Array, angles_from_rays, cell_centers
from panollava.geometry.views import Sampler, layout, resampled, token_rays, view_shift

STRATEGIES: dict[str, dict[str, Any]] = {
    "e2p": {},
    "e2p, global view": {"global_view": True},
    "e2p, looking up": {"pitch": 60.0},
    "e2p, over the pole": {"pitch": -90.0},
    "cubemap": {"strategy": "cubemap"},
    "cubemap, wide": {"strategy": "cubemap", "fov": 110.0},
    "sliding_window": {"strategy": "sliding_window"},
    "resize": {"strategy": "resize"},
}
every_strategy = pytest.mark.parametrize("values", STRATEGIES.values(), ids=STRATEGIES.keys())


def settings(**values: Any) -> config.Views:
    defaults: dict[str, Any] = {
        "strategy": "e2p",
        "size": 32,
        "fov": 90.0,
        "overlap": 0.5,
        "pitch": 0.0,
        "global_view": False,
    }
    return config.Views(**(defaults | values))


def degrees_apart(one: Array, other: Array) -> Array:
    cross = np.linalg.norm(np.cross(one, other), axis=-1)
    return np.degrees(np.arctan2(cross, (one * other).sum(axis=-1)))


def directions(height: int, width: int) -> np.ndarray:
    """A panorama whose pixels hold their own directions."""
    return panorama_rays(height, width).astype(np.float32)


def test_e2p_views_are_around_the_horizon_starting_at_the_front() -> None:
    views_layout = layout(settings(fov=90.0, overlap=0.5, pitch=15.0))
    yaw, pitch = np.degrees(angles_from_rays(token_rays(views_layout, cell_centers(1))[:, 0, 0]))
    assert yaw % 360 == pytest.approx([0, 45, 90, 135, 180, 225, 270, 315])
    assert pitch == pytest.approx(15)
    assert views_layout.neighbors == tuple((i, (i + 1) % 8) for i in range(8))


@pytest.mark.parametrize(
    ("fov", "overlap", "count"),
    [(90, 0, 4), (90, 0.25, 5.333), (75, 0.2, 6), (100, 0.64, 10), (120, 0.5, 6), (144, 0.5, 5)],
)
def test_strides_that_do_not_divide_360_degrees_are_an_error(
    fov: float, overlap: float, count: float
) -> None:
    values = settings(fov=float(fov), overlap=float(overlap))
    if count == int(count):
        assert len(layout(values).projections) == count
    else:
        with pytest.raises(UserError, match=r"67\.5 degrees.*do not divide 360.*views\.overlap to"):
            layout(values)


@pytest.mark.parametrize(("fov", "overlap"), [(70.0, 0.0), (90.0, 0.25), (100.0, 0.3), (7.3, 0.1)])
def test_the_overlap_that_an_error_proposes_is_accepted(fov: float, overlap: float) -> None:
    with pytest.raises(UserError) as error:
        layout(settings(fov=fov, overlap=overlap))
    proposed = float(str(error.value).rsplit(" ", 1)[1])
    assert 0 <= proposed < 1
    assert len(layout(settings(fov=fov, overlap=proposed)).projections) > 1


def test_a_global_view_comes_last_and_has_no_neighbor() -> None:
    plain, more = layout(settings()), layout(settings(global_view=True))
    assert more.projections[:-1] == plain.projections
    assert more.neighbors == plain.neighbors
    assert token_rays(more, cell_centers(8))[-1] == pytest.approx(panorama_rays(8, 8))


def test_a_cubemap_has_six_faces_and_twelve_edges() -> None:
    views_layout = layout(settings(strategy="cubemap"))
    expected = [[0, 0, 1], [1, 0, 0], [0, 0, -1], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]
    centers = token_rays(views_layout, cell_centers(1))[:, 0, 0]
    assert centers == pytest.approx(np.array(expected))
    pairs = views_layout.neighbors
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == 12
    assert all(abs(centers[a] @ centers[b]) < 1e-9 for a, b in pairs)


def test_resize_is_one_view_of_the_whole_panorama() -> None:
    views_layout = layout(settings(strategy="resize"))
    assert views_layout.neighbors == ()
    assert token_rays(views_layout, cell_centers(6)) == pytest.approx(panorama_rays(6, 6)[None])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fov": 180.0}, r"views\.fov: strategy e2p needs fov < 180, found 180"),
        ({"strategy": "cubemap", "fov": 80.0}, r"90 <= fov < 180, found 80"),
        ({"strategy": "cubemap", "fov": 180.0}, r"90 <= fov < 180, found 180"),
        ({"strategy": "resize", "global_view": True}, r"'resize'; set views\.global_view to false"),
        ({"strategy": "cubemap", "pitch": 10.0}, r"'cubemap'; set views\.pitch to 0"),
    ],
)
def test_settings_that_do_not_fit_together_are_an_error(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        layout(settings(**values))


@every_strategy
@pytest.mark.parametrize("size", [32, 33, 1])
def test_views_show_what_is_in_their_directions(values: dict[str, Any], size: int) -> None:
    views_layout = layout(settings(size=size, **values))
    sampler = Sampler(views_layout, size)
    height = max(128, sampler.panorama_width // 2)
    views = sampler.sample(directions(height, 2 * height))
    assert views.shape == (len(views_layout.projections), size, size, 3)
    apart = degrees_apart(views.astype(float), token_rays(views_layout, cell_centers(size)))
    assert apart.max() < 0.1 * 180 / height  # a tenth of a pixel


@every_strategy
def test_panoramas_of_odd_sizes_are_sampled_correctly(values: dict[str, Any]) -> None:
    views_layout = layout(settings(**values))
    for height, width in [(127, 255), (101, 203), (256, 511), (3, 5)]:
        views = Sampler(views_layout, 32).sample(directions(height, width))
        apart = degrees_apart(views.astype(float), token_rays(views_layout, cell_centers(32)))
        # Over the poles, an odd panorama has no pixel exactly opposite.
        assert apart.max() < (0.5 * 180 / height if height > 3 else 30)


@every_strategy
def test_8_bit_panoramas_are_sampled_like_float_ones(values: dict[str, Any]) -> None:
    panorama = np.random.default_rng(0).integers(0, 256, (100, 200, 3), dtype=np.uint8)
    sampler = Sampler(layout(settings(**values)), 32)
    exact = sampler.sample(panorama.astype(np.float32))
    views = sampler.sample(panorama)
    assert views.dtype == np.uint8
    assert np.abs(views - exact).max() <= 1


@pytest.mark.parametrize("strategy", ["e2p", "sliding_window"])
def test_rolling_the_panorama_by_one_stride_shifts_the_views(strategy: str) -> None:
    panorama = np.random.default_rng(0).integers(0, 256, (128, 256, 3), dtype=np.uint8)
    sampler = Sampler(layout(settings(strategy=strategy)), 32)
    plain = sampler.sample(panorama)
    rolled = sampler.sample(np.roll(panorama, 256 // 8, axis=1))
    # Positions are rounded to 1/32 pixel, so a value between two noisy pixels may differ.
    apart = np.abs(rolled.astype(int) - np.roll(plain, 1, axis=0))
    assert apart.max() <= 256 / 32
    assert (apart > 0).mean() < 0.01
    assert np.abs(rolled.astype(int) - plain).mean() > 30


RINGS = [
    {"pitch": 0.0},
    {"pitch": 35.0},
    {"pitch": -90.0},
    {"fov": 100.0, "overlap": 0.4},
    {"strategy": "sliding_window"},
    {"strategy": "sliding_window", "fov": 60.0, "overlap": 0.0},
]


@pytest.mark.parametrize("values", RINGS, ids=str)
@pytest.mark.parametrize("strides", [0, 1, 3, -1, -2, 5])
def test_a_roll_by_strides_shows_the_same_pixels_in_other_views(
    values: dict[str, Any], strides: int
) -> None:
    views_layout = layout(settings(**values))
    count = len(views_layout.projections)
    panorama = np.random.default_rng(0).integers(0, 256, (120, 240, 3), dtype=np.uint8)
    sampler = Sampler(views_layout, 32)
    degrees = strides * 360 / count
    shift = view_shift(settings(**values), degrees)
    assert shift is not None and 0 <= shift < count
    rolled = sampler.sample(roll(panorama, degrees)).astype(int)
    apart = np.abs(rolled - np.roll(sampler.sample(panorama), shift, axis=0))
    # Positions are rounded to 1/32 pixel, so a value between two noisy pixels may differ.
    assert apart.max() <= 256 / 32 and (apart > 0).mean() < 0.01
    assert view_shift(settings(**values), degrees + 360 / count / 2) is None


@pytest.mark.parametrize("values", RINGS, ids=str)
def test_any_other_angle_shows_new_pixels(values: dict[str, Any]) -> None:
    panorama = np.random.default_rng(0).integers(0, 256, (120, 240, 3), dtype=np.uint8)
    sampler = Sampler(layout(settings(**values)), 32)
    plain, rolled = sampler.sample(panorama), sampler.sample(roll(panorama, 20)).astype(int)
    assert view_shift(settings(**values), 20) is None
    shifted = (np.abs(rolled - np.roll(plain, shift, axis=0)).mean() for shift in range(len(plain)))
    assert min(shifted) > 30


@pytest.mark.parametrize(
    ("values", "exact"),
    [
        ({}, [45.0, -45.0, 315.0, 360.0]),
        ({"strategy": "sliding_window"}, [45.0, -45.0, 315.0, 360.0]),
        ({"global_view": True}, []),
        ({"strategy": "cubemap"}, []),
        ({"strategy": "resize"}, []),
    ],
)
def test_rolls_that_only_reorder_views_are_not_sampled_again(
    values: dict[str, Any], exact: list[float]
) -> None:
    rolls = [20.0, 45.0, -45.0, 44.9, 315.0, 360.0]
    rest = [degrees for degrees in rolls if degrees not in exact]
    assert resampled(settings(**values), rolls) == rest


def test_strides_that_are_no_decimal_numbers_are_recognized() -> None:
    seven = settings(fov=90.0, overlap=1 - 360 / 7 / 90)
    assert view_shift(seven, 360 / 7) == view_shift(seven, 51.4285714) == 1
    assert view_shift(seven, -360 / 7) == 6 and view_shift(seven, 51.4) is None


def test_a_view_across_the_seam_is_like_any_other() -> None:
    """What a view shows of noise does not depend on where the panorama is cut open."""
    panorama = np.random.default_rng(0).integers(0, 256, (100, 200, 3)).astype(np.float32)
    sampler = Sampler(layout(settings(fov=120.0, overlap=0.5)), 65)
    front = sampler.sample(panorama)[0]
    back = sampler.sample(np.roll(panorama, 100, axis=1))[3]
    assert np.abs(front - back).max() <= 255 / 32


def test_a_view_straight_up_is_continuous_over_the_pole() -> None:
    """Rows at the pole alternate between the half of the panorama that a pixel belongs to."""
    height, width = 16, 32
    panorama = np.zeros((height, width, 3), np.float32)
    panorama[:, : width // 2] = 100
    view = Sampler(layout(settings(strategy="cubemap", size=257)), 257).sample(panorama)[4]
    # The view's middle row goes from the left half (100) over the pole to the right one (0).
    across = view[128, :, 0]
    assert across[0] == 100
    assert across[-1] == 0
    assert across[128] == pytest.approx(50, abs=2)
    assert np.abs(np.diff(across)).max() < 10


@pytest.mark.parametrize(
    ("values", "width"),
    [
        # As fine as the views is 1395: at its edges, a view of 90 degrees is twice as fine as in
        # its center. Any photo has one halving between 986 and twice that.
        ({"size": 224}, 986),
        ({"size": 224, "strategy": "sliding_window"}, 634),
        ({"size": 224, "strategy": "resize"}, 317),  # 224 rows over 180 degrees
        ({"size": 1}, 2),
    ],
)
def test_panoramas_are_decoded_at_about_the_resolution_of_the_views(
    values: dict[str, Any], width: int
) -> None:
    views_layout = layout(settings(**values))
    assert Sampler(views_layout, values["size"]).panorama_width == pytest.approx(width, abs=1)


def test_threads_share_a_sampler() -> None:
    generator = np.random.default_rng(0)
    sizes = [(64 + 2 * (i % 20), 128 + 4 * (i % 20), 3) for i in range(60)]  # more than are cached
    panoramas = [generator.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    views_layout = layout(settings())
    separate = [Sampler(views_layout, 32).sample(panorama) for panorama in panoramas]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(Sampler(views_layout, 32).sample, panoramas))
    assert all(np.array_equal(a, b) for a, b in zip(separate, together, strict=True))
