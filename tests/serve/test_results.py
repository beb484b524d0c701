"""The comparison of an engine with transformers sees differences; the package states what the results file states."""

from __future__ import annotations

import copy
import json

import pytest
from support.engines import ENGINES, TOLERANCE, compare
from support.serve_results import PACKAGED, RESULTS, packaged

ANSWERS = [
    {"tokens": [3, 4, 5], "log_probabilities": [[-0.5, -1.0], [-2.0, -0.25]], "generated": [1, 0]},
    {"tokens": [6, 7], "log_probabilities": [[-3.0, -0.125]], "generated": [1, 1]},
]


def changed(**fields: object) -> list[dict]:
    """The answers, with other fields in the second answer."""
    answers = copy.deepcopy(ANSWERS)
    answers[1] |= fields
    return answers


def test_equal_answers_agree() -> None:
    found = compare(ANSWERS, ANSWERS)
    assert found.is_whole
    assert (found.positions, found.max_difference, found.argmax_equal) == (3, 0.0, 3)
    assert (found.texts, found.greedy_equal) == (2, 2)


@pytest.mark.parametrize(
    ("fields", "difference", "argmax", "greedy"),
    [
        ({"log_probabilities": [[-3.0, -0.125 - 2 * TOLERANCE]]}, 2 * TOLERANCE, 3, 2),
        ({"log_probabilities": [[-3.0, float("nan")]]}, float("inf"), 3, 2),
        ({"log_probabilities": [[-0.125, -3.0]]}, 2.875, 2, 2),
        ({"generated": [1, 0]}, 0.0, 3, 1),
    ],
)
def test_a_difference_is_seen(fields: dict, difference: float, argmax: int, greedy: int) -> None:
    found = compare(changed(**fields), ANSWERS)
    assert not found.is_whole
    assert found.max_difference == pytest.approx(difference, rel=1e-3)
    assert (found.argmax_equal, found.greedy_equal) == (argmax, greedy)


def test_other_tokens_are_not_compared() -> None:
    with pytest.raises(AssertionError):
        compare(changed(tokens=[6, 8]), ANSWERS)


def test_the_package_states_the_results() -> None:
    stored = json.loads(RESULTS.read_text())
    assert json.loads(PACKAGED.read_text()) == packaged(stored)
    assert [engine["name"] for engine in stored["engines"]] == [engine.name for engine in ENGINES]
    for engine in stored["engines"]:
        assert engine["max_difference"] == max(model["max_difference"] for model in engine["models"].values())
        assert engine["max_difference"] <= TOLERANCE
        for model in engine["models"].values():
            assert model["argmax_equal"] == model["positions"] > 0
            assert model["greedy_equal"] == model["texts"] > 0
