"""Selections of one parent compose by union and by added scores; values follow the stated policy."""

from __future__ import annotations

import pytest
import torch

from emo_megatron.experts.compose import blended, compose_selections, value_of
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


def test_refusals():
    with pytest.raises(ValueError, match=r"union keeps 2 to 3 experts a layer, and 3 are asked"):
        compose_selections([ONE, TWO])
    with pytest.raises(ValueError, match="--rule score needs --keep"):
        compose_selections([ONE, TWO], rule="score", scores=SCORES)
    with pytest.raises(ValueError, match=r"--keep must lie in \[1, 6\].*got 7"):
        compose_selections([ONE, TWO], keep=7, scores=SCORES)
    with pytest.raises(ValueError, match="1 and 2 are of different parents"):
        compose_selections([ONE, _selection((1, 2), (2, 3), model="other")])
    with pytest.raises(ValueError, match="one file for each selection: 1 for 2"):
        compose_selections([ONE, TWO], scores=SCORES[:1])
    with pytest.raises(ValueError, match=r"must be \[layers, experts\] = \(2, 6\)"):
        compose_selections([ONE, TWO], scores=[SCORES[0], SCORES[1][:, :5]])
    with pytest.raises(ValueError, match="nothing to compose"):
        compose_selections([])


def test_values():
    parent = torch.zeros(2, dtype=torch.bfloat16)
    candidates = {"a": parent + 1, "b": parent + 2}

    def taken(policy, *, parent=parent):
        found = value_of(policy, candidates=candidates, parent=parent)
        assert found.value.dtype == torch.bfloat16
        return found.source, found.value.tolist()

    assert taken("parent") == ("parent", [0, 0])
    assert taken("b") == ("b", [2, 2])
    assert taken("average") == ("average", [1.5, 1.5])
    # a named module that does not hold the expert
    assert taken("c") == ("parent", [0, 0])
    with pytest.raises(ValueError, match="c does not have this weight, and there is no parent"):
        taken("c", parent=None)
    assert blended(candidates["b"], parent=parent, share=0.25).tolist() == [0.5, 0.5]
    assert blended(candidates["b"], parent=parent, share=1.0) is candidates["b"]
