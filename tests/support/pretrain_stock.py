"""pretrain_emo.py with nothing of ours in its layers but the attention and norm that Megatron lacks on a CPU.

Stock TopKRouter, MoELayer and TransformerLayer: what the pool layers must equal with pools off, and what must load
their checkpoints.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from emo_megatron.mcore import cpu  # noqa: E402

cpu.activate()

from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402

from emo_megatron.mcore import layer, router, spec_rewrite  # noqa: E402


class _StockRouter(TopKRouter):
    def __init__(self, *args, pool, **kwargs):
        super().__init__(*args, **kwargs)


def _no_layer_of_ours(*args, **kwargs):
    raise AssertionError("stock layers were wanted")


assert spec_rewrite.PoolMoELayer is layer.PoolMoELayer
assert spec_rewrite.PoolRouter is router.PoolRouter
spec_rewrite.PoolMoELayer = MoELayer
spec_rewrite.PoolTransformerLayer = TransformerLayer
spec_rewrite.PoolRouter = _StockRouter
for ours in (layer.PoolMoELayer, layer.PoolTransformerLayer, router.PoolRouter):
    ours.__init__ = _no_layer_of_ours
script = ROOT / "examples" / "pretrain_emo.py"
sys.argv[0] = str(script)
runpy.run_path(str(script), run_name="__main__")
