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
    assert result["low"] == pytest.approx(correct.mean() - half, abs=0.01)
    assert result["high"] == pytest.approx(correct.mean() + half, abs=0.01)


def test_the_interval_of_one_panorama_is_its_value() -> None:
    assert interval_of_mean({(1, "q"): 0.5}) == {"low": 0.5, "high": 0.5}


def test_a_panorama_counts_by_its_number_of_queries() -> None:
    """Nine correct answers about each of five panoramas, and a wrong one about each of five more:
    0.9 of the answers are correct, about half of the panoramas."""
    values = {(panorama, f"q{query}"): 1.0 for panorama in range(5) for query in range(9)}
    values |= {(panorama, "q"): 0.0 for panorama in range(5, 10)}
    result = interval_of_mean(values)
    assert result["low"] is not None and result["low"] > 0.6 and result == interval_of_mean(values)
