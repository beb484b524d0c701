"""What pool_forward_step makes of a batch."""

from __future__ import annotations

import json

PADDING = """
import json
import support.bridge_recipes
import torch
from types import SimpleNamespace
from emo_megatron.bridge.step import _num_padding

# what Megatron's dataset makes of 6, 7, 8 and 9 tokens for samples of 8 and a label more, of a filler, and of a
# document's last token inside
masks = torch.ones(6, 8)
for row, num_real in enumerate((6, 7, 8)):
    masks[row, num_real - 1 :] = 0
masks[4] = 0
masks[5, 3] = 0
plain = SimpleNamespace(eod_mask_loss=False)
print(json.dumps(_num_padding(masks, plain).tolist()))
assert _num_padding(masks, SimpleNamespace(eod_mask_loss=True)) is None
"""


def test_padding_is_told_by_the_loss(run_bridge):
    found = json.loads(run_bridge("-c", PADDING).splitlines()[-1])
    assert found == [2, 1, 0, 0, 8, 0]
