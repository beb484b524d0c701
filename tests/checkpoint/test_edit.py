"""Whose value a weight gets under a policy."""

from __future__ import annotations

import torch

from emo_megatron.checkpoint.edit import blended, value_of


def test_values():
    parent = torch.zeros(2, dtype=torch.bfloat16)
    candidates = {"a": parent + 1, "b": parent + 2}

    def taken(policy):
        value, source = value_of(policy, candidates=candidates, parent=parent)
        assert value.dtype == torch.bfloat16
        return source, value.tolist()

    assert taken("parent") == ("parent", [0, 0])
    assert taken("b") == ("b", [2, 2])
    assert taken("average") == ("average", [1.5, 1.5])
    # a named module that does not hold the expert
    assert taken("c") == ("parent", [0, 0])
    assert blended(candidates["b"], parent=parent, share=0.25).tolist() == [0.5, 0.5]
    assert blended(candidates["b"], parent=parent, share=1.0) is candidates["b"]
