"""What is not finite is found wherever it lies, and told by its weight, its layer and its expert."""

from __future__ import annotations

import math

import pytest
import torch

from emo_megatron.finite import NotFiniteError, check_named_weight, check_weight, finite_number, first_bad
from emo_megatron.json_files import read_json, to_json

BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("value", BAD)
def test_one_bad_value_is_found_wherever_it_lies(dtype, value):
    for size in (1, 5, 16, 1000):
        for place in {0, size // 2, size - 1}:
            values = torch.arange(size).float() % 7
            assert first_bad(values.to(dtype)) is None
            values[place] = value
            assert first_bad(values.to(dtype)) == (place,)
    matrix = torch.zeros(3, 4)
    matrix[1, 2] = matrix[2, 0] = value
    assert first_bad(matrix.to(dtype)) == (1, 2)
    assert first_bad(matrix.to(dtype).t()) == (0, 2)
    assert first_bad(torch.tensor(value).to(dtype)) == ()


def test_what_has_no_such_value_is_finite():
    for tensor in (torch.empty(0), torch.ones(2).long(), torch.empty(2, device="meta")):
        assert first_bad(tensor) is None


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.0.mlp.experts.3.up_proj.weight", " (layer 1, expert 3)"),
        ("model.layers.11.mlp.experts.20.down_proj.weight", " (layer 12, expert 20)"),
        ("model.layers.1.mlp.gate.weight", " (layer 2, expert 1)"),
        ("model.layers.1.mlp.shared_expert.up_proj.weight", " (layer 2)"),
        ("model.layers.1.mlp.shared_expert_gate.weight", " (layer 2)"),
        ("model.layers.1.mlp.gate_proj.weight", " (layer 2)"),
        ("model.layers.0.self_attn.q_proj.weight", " (layer 1)"),
        ("model.norm.weight", ""),
        ("model.embed_tokens.weight", ""),
    ],
)
def test_names_tell_layer_and_expert(name, place):
    weight = torch.ones(2, 3)
    check_named_weight(name, weight)
    weight[1, 2] = -math.inf
    with pytest.raises(NotFiniteError) as told:
        check_named_weight(name, weight)
    assert f"{name}{place} holds -inf" in str(told.value)


def test_experts_go_by_the_numbers_they_are_given():
    weight = torch.zeros(2, 3)
    weight[1, 0] = math.nan
    with pytest.raises(NotFiniteError, match=r"w \(layer 4, expert 9\) holds nan"):
        check_weight("w", weight, layer=4, experts=[7, 9])
    with pytest.raises(NotFiniteError, match=r"w \(layer 4, expert 5\) holds nan"):
        check_weight("w", weight, layer=4, experts=5)


@pytest.mark.parametrize("value", [*BAD, None, "3.2", True, [1.0]])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ValueError, match="row 3: loss must be a finite number"):
        finite_number(value, what="row 3: loss")
    assert finite_number(3, what="x") == 3.0


def test_json_is_written_of_finite_numbers(tmp_path):
    """That no other is read: test_json_files.py."""
    for value in BAD:
        with pytest.raises(ValueError, match=r"nan|inf"):
            to_json({"found": [value]})
    path = tmp_path / "x.json"
    path.write_text(to_json({"a": [1, 0.1, None]}))
    assert read_json(path, kind="a file") == {"a": [1, 0.1, None]}
