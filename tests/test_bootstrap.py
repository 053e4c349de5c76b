"""Promises about intervals: they are over panoramas, and as wide as chance makes them."""

import numpy as np
import pytest

from panollava.evaluation.confidence import interval_of_mean


def test_queries_of_a_panorama_are_no_independent_cases() -> None:
    right = np.random.default_rng(0).random(100) < 0.7
    one_each = {(panorama, "q"): float(own) for panorama, own in enumerate(right)}
    nine_each = {
        (panorama, f"q{query}"): float(own)
        for panorama, own in enumerate(right)
        for query in range(9)
    }
    found = interval_of_mean(one_each)
    assert interval_of_mean(nine_each) == pytest.approx(found)
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 100)
    assert found["low"] == pytest.approx(right.mean() - half, abs=0.02)
    assert found["high"] == pytest.approx(right.mean() + half, abs=0.02)


def test_one_panorama_is_its_own_interval() -> None:
    assert interval_of_mean({(1, "q"): 0.5}) == {"low": 0.5, "high": 0.5}
