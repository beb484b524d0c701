"""Selections of one parent compose by union and by added scores."""

from __future__ import annotations

import pytest
import torch

from emo_megatron.experts.compose import compose_selections
from emo_megatron.experts.selection import Selection


def _selection(*experts, **changes):
    fields = {"num_experts": 6, "layers": (1, 2), "method": "mean_prob", "seed": None, "model": "m"}
    return Selection(experts=experts, **fields | changes)


ONE = _selection((0, 1), (2, 3))
TWO = _selection((1, 2), (2, 3))
# rows sum to 1 and to 2: a domain's weight must not depend on the scale of its scores
SCORES = (
    torch.tensor([[0.6, 0.2, 0.1, 0.1, 0.0, 0.0], [0.0, 0.1, 0.4, 0.3, 0.2, 0.0]]),
    2 * torch.tensor([[0.0, 0.2, 0.6, 0.1, 0.1, 0.0], [0.1, 0.0, 0.3, 0.3, 0.0, 0.3]]),
)


def test_union():
    composed = compose_selections([ONE, TWO], scores=SCORES)
    # the second layer is filled by score up to the first's three: 4 has .2, 5 has .3
    assert composed.experts == ((0, 1, 2), (2, 3, 5))
    assert composed.method == "compose_union"
    assert composed.data["union"] == [3, 2]
    assert [part["kept"] for part in composed.data["of"]] == [[2, 2], [2, 2]]


def test_scores_decide_when_the_union_is_too_large():
    # layer 1: .6 + 0, .2 + .2, .1 + .6 of the normalised scores
    assert compose_selections([ONE, TWO], keep=2, scores=SCORES).experts == ((0, 2), (2, 3))


def test_rule_score_looks_beyond_the_union():
    far = _selection((4, 5), (4, 5))
    by_score = compose_selections([far, far], keep=2, scores=SCORES, rule="score")
    assert by_score.experts == ((0, 2), (2, 3))
    assert compose_selections([far, far]).experts == far.experts


@pytest.mark.parametrize(
    ("selections", "options", "what"),
    [
        ((ONE, TWO), {}, "--stats"),
        ((ONE, TWO), {"rule": "score", "scores": SCORES}, "--rule score needs --keep"),
        ((ONE, TWO), {"keep": 7, "scores": SCORES}, "--keep .*7"),
        ((ONE, TWO), {"scores": SCORES[:1]}, "--stats"),
        ((ONE, TWO), {"scores": [SCORES[0], SCORES[1][:, :5]]}, r"\(2, 6\)"),
        ((ONE, _selection((1, 2), (2, 3), model="other")), {}, "1 and 2 .* parent"),
        ((), {}, "at least one"),
    ],
)
def test_refusals(selections, options, what):
    with pytest.raises(ValueError, match=what):
        compose_selections(selections, **options)
