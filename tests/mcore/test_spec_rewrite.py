"""with_pools: of a spec only the transformer layer, the MoE layer and the router change; others' own are refused."""

from __future__ import annotations

import dataclasses
import functools
from unittest import mock

import pytest
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from support import tiny

from emo_megatron.config import PoolConfig
from emo_megatron.mcore import spec

POOLS = PoolConfig(pool_min=3)


def _walk(spec, path=""):
    """Every leaf of a spec by its path."""
    if isinstance(spec, functools.partial):
        parts = {"func": spec.func, "args": spec.args, **spec.keywords}
    elif isinstance(spec, ModuleSpec):
        parts = {"module": spec.module, "params": spec.params, "submodules": spec.submodules}
    elif dataclasses.is_dataclass(spec) and not isinstance(spec, type | PoolConfig):
        parts = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    elif isinstance(spec, dict):
        parts = spec
    elif isinstance(spec, list | tuple):
        parts = dict(enumerate(spec))
    else:
        return {path: spec}
    leaves = [_walk(part, f"{path}.{name}") for name, part in parts.items()]
    return functools.reduce(dict.__or__, leaves, {})


def _changed(before, after):
    """Paths at which two specs differ, and the names of the classes there."""
    old, new = _walk(before), _walk(after)
    changed = {}
    for path in old.keys() | new.keys():
        is_same = old.get(path) is new.get(path) or old.get(path) == new.get(path)
        # Megatron's router is a class, and ours a partial of a class and the pools
        if not is_same and not path.endswith((".router", ".router.args", ".router.pool")):
            changed[path] = getattr(new.get(path), "__name__", repr(new.get(path)))
    return changed


def _block(config):
    return get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", qk_l2_norm=config.qk_l2_norm
    )


def _config(**overrides):
    """A configuration of Transformer Engine's, whose specs keep their norms and attention."""
    config = tiny.transformer_config(**overrides)
    config.transformer_impl = "transformer_engine"
    return config


def _of_blocks(**overrides):
    tiny.setup()
    config = _config(**overrides)
    block = _block(config)
    before = _walk(block)
    with_pools = functools.partial(spec.with_pools, config=config, pool=POOLS)
    with mock.patch.object(spec, "HAVE_TE", True):
        layer = block.layer_specs[1]
        whole = ModuleSpec(module=dict, submodules=block)
        answers = [
            _changed(block, with_pools(block)),
            _changed(whole, with_pools(whole)),
            _changed(layer, with_pools(layer)),
            _changed(block, with_pools(lambda *, stage: block)(stage=1)),
        ]
    assert _walk(block) == before, "the spec that came is left as it was"
    return answers


@pytest.mark.parametrize(
    "variant",
    [{}, {"qk_layernorm": True}, {"qk_l2_norm": True}, {"multi_latent_attention": True}],
    ids=["plain", "qk-layernorm", "qk-l2-norm", "multi-latent"],
)
def test_only_layer_moe_layer_and_router_change(ranks, variant):
    of_layer = {
        ".module": "PoolTransformerLayer",
        ".submodules.mlp.func": "PoolMoELayer",
        ".submodules.mlp.submodules.router.func": "PoolRouter",
    }
    if "multi_latent_attention" in variant:
        # its down projection is column-parallel, of which Megatron's class misses gradient
        of_layer[".submodules.self_attention.module"] = "LatentAttention"
    block, whole, layer, called = ranks(1).run(_of_blocks, moe_layer_freq=[0, 1], **variant)[0]
    assert layer == of_layer
    dense = {f".layer_specs.0{p}": n for p, n in of_layer.items() if ".mlp" not in p}
    assert block == called == dense | {f".layer_specs.1{p}": n for p, n in of_layer.items()}
    assert whole == {f".submodules{path}": name for path, name in block.items()}


def _of_stack():
    tiny.setup()
    with mock.patch.object(spec, "HAVE_TE", True):
        return _changed(hybrid_stack_spec, spec.with_pools(hybrid_stack_spec, config=_config(), pool=POOLS))


def test_of_a_hybrid_stack_the_layers_with_experts_change(ranks):
    changes = ranks(1).run(_of_stack)[0]
    places = (".submodules.moe_layer", ".submodules.mtp_block_spec")
    assert all(path.startswith(places) for path in changes)
    names = {"PoolTransformerLayer", "PoolMoELayer", "PoolRouter", "PoolMTPLayer"}
    assert names <= set(changes.values())


def _refused():
    """What is said to specs of recipes' own, by what they hold."""

    class OwnRouter(TopKRouter):
        pass

    class OwnMoELayer(MoELayer):
        pass

    class OwnTransformerLayer(TransformerLayer):
        pass

    def own_experts(**_):
        return None

    tiny.setup()
    config = _config()
    block = _block(config)
    layer = block.layer_specs[0]
    moe = layer.submodules.mlp

    def of_mlp(mlp):
        return dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, mlp=mlp))

    submodules = dataclasses.replace(moe.keywords["submodules"], router=OwnRouter)
    specs = {
        "OwnRouter": of_mlp(functools.partial(moe.func, submodules=submodules)),
        "OwnMoELayer": of_mlp(functools.partial(OwnMoELayer, **moe.keywords)),
        "own_experts": of_mlp(own_experts),
        "OwnTransformerLayer": dataclasses.replace(layer, module=OwnTransformerLayer),
        "--num-experts": of_mlp(functools.partial(MLP, submodules=None)),
        "MultiTokenPredictionLayer": MultiTokenPredictionBlockSubmodules(
            layer_specs=[ModuleSpec(module=TransformerLayer)]
        ),
        "NotASpec": "NotASpec",
        "dict": ModuleSpec(module=dict),
    }
    messages = {}
    with mock.patch.object(spec, "HAVE_TE", True):
        for name, own in specs.items():
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                spec.with_pools(own, config=config, pool=POOLS)
            messages[name] = str(caught.value)
    return messages


def test_what_a_recipe_builds_of_its_own_is_refused_by_name(ranks):
    for name, message in ranks(1).run(_refused)[0].items():
        assert name in message


def _with_own_gating():
    class OwnGating(TopKRouter):
        def gating(self, input):
            return super().gating(input) * 0 + 1

    tiny.setup()
    config = _config()
    layer = _block(config).layer_specs[0]
    moe = layer.submodules.mlp
    own = dataclasses.replace(moe.keywords["submodules"], router=OwnGating)
    mlp = functools.partial(moe.func, submodules=own)
    layer = dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, mlp=mlp))
    with mock.patch.object(spec, "HAVE_TE", True):
        layer = spec.with_pools(layer, config=config, pool=POOLS)
    router = layer.submodules.mlp.keywords["submodules"].router.func
    return [cls.__name__ for cls in router.__mro__][:4]


def test_a_routers_own_projection_stays(ranks):
    assert ranks(1).run(_with_own_gating)[0] == ["PoolOwnGating", "PoolRouter", "OwnGating", "TopKRouter"]


def _with_own_constructor():
    class OwnLayer(TransformerLayer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    tiny.setup()
    config = _config(mtp_num_layers=1)
    block = _block(config)
    block.layer_specs = [dataclasses.replace(s, module=OwnLayer) for s in block.layer_specs]
    prediction = get_gpt_mtp_block_spec(config, block, use_transformer_engine=False)
    with mock.patch.object(spec, "HAVE_TE", True):
        with_pools = functools.partial(spec.with_pools, config=config, pool=POOLS)
        layers = with_pools(block).layer_specs
        for made in (with_pools(prediction), with_pools(with_pools(prediction))):
            layers.append(made.layer_specs[0].submodules.mtp_model_layer)
        empty = with_pools(dataclasses.replace(block, layer_specs=[]))
    return [[cls.__name__ for cls in s.module.__mro__][:4] for s in layers], empty.layer_specs


def test_a_layers_own_constructor_stays(ranks):
    layers, empty = ranks(1).run(_with_own_constructor)[0]
    assert layers == [["PoolOwnLayer", "PoolTransformerLayer", "OwnLayer", "TransformerLayer"]] * 4
    # the stage of a pipeline may have no layer
    assert empty == []
