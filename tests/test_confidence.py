"""Promises about confidence intervals: panoramas are resampled, and the width is right."""

import numpy as np
import pytest

from panollava.evaluation.confidence import interval_of_mean


def test_queries_of_one_panorama_are_not_independent_samples() -> None:
    correct = np.random.default_rng(0).random(100) < 0.7
    one_each = {(panorama, "q"): float(value) for panorama, value in enumerate(correct)}
    nine_each = {
        (panorama, f"q{query}"): float(value)
        for panorama, value in enumerate(correct)
        for query in range(9)
    }
    result = interval_of_mean(one_each)
    assert interval_of_mean(nine_each) == pytest.approx(result)
    half = 1.96 * np.sqrt(correct.mean() * (1 - correct.mean()) / 100)
    assert result["low"] == pytest.approx(correct.mean() - half, abs=0.02)
    assert result["high"] == pytest.approx(correct.mean() + half, abs=0.02)


def test_the_interval_of_one_panorama_is_its_value() -> None:
    assert interval_of_mean({(1, "q"): 0.5}) == {"low": 0.5, "high": 0.5}
