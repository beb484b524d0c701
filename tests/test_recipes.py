"""Flags of published mixture-of-experts models (data/recipes), shrunk and given pools, train two steps on a CPU."""

from __future__ import annotations

import ast
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from support.forks import run_script
from support.pretraining import ROOT, logged

from emo_megatron.variables import process_environment

RECIPES = ROOT / "tests" / "data" / "recipes"
SCRIPT = ROOT / "tests" / "support" / "pretrain_seen.py"
HYBRID_SCRIPT = ROOT / "tests" / "support" / "host_script.py"
QUICK = ("deepseek_v2", "kimi_k2")
SLOW = (
    *("deepseek_v3", "glm_45", "nemotron_3_nano_30b_a3b", "nemotron_35_lightning_30b_a3b"),
    *("gpt_oss_20b", "mixtral_8x7b", "moonlight_16b_a3b", "olmoe_1b_7b"),
    *("qwen3_30b_a3b", "qwen3_235b_a22b"),
)
REFUSED = {"qwen3_next_80b_a3b": "--experimental-attention-variant"}
"""A recipe whose layers Megatron builds of Transformer Engine's modules alone -> the flag that asks for them."""
Flags = dict[str, list[str]]
"""Flag -> its values."""

PADDING = "--moe-router-padding-for-quantization"
SWITCHED_OFF = {
    "--transformer-impl transformer_engine": ("TE", "not installed"),
    "--use-precision-aware-optimizer": ("TE", "its Adam"),
    "--apply-layernorm-1p": ("TE", "its norms"),
    "--main-params-dtype": ("TE", "of that Adam"),
    "--main-grads-dtype": ("TE", "of that Adam"),
    "--exp-avg-dtype": ("TE", "of that Adam"),
    "--exp-avg-sq-dtype": ("TE", "of that Adam"),
    "--moe-permute-fusion": ("fused kernel", "in TE"),
    "--fp8-recipe": ("fp8/fp4", "in TE"),
    "--fp8-format": ("fp8/fp4", "in TE"),
    "--fp8-param-gather": ("fp8/fp4", "in TE"),
    "--reuse-grad-buf-for-mxfp8-param-ag": ("fp8/fp4", "in TE"),
    PADDING: ("fp8/fp4", "pads the rows of an expert once they are chosen, and is refused without either"),
    "--cuda-graph-impl": ("graph", "no CUDA"),
    "--cuda-graph-modules": ("graph", "no CUDA"),
    "--moe-token-dispatcher-type flex": ("DeepEP", "PROCESS has Megatron's other one"),
    "--moe-flex-dispatcher-backend": ("DeepEP", "or HybridEP"),
    "--moe-hybridep-num-sms": ("DeepEP", "or HybridEP"),
}
"""What a CPU cannot do, and nothing else: a flag, or a flag with this value -> category, why."""
CATEGORIES = {"TE", "fp8/fp4", "fused kernel", "graph", "DeepEP"}

ESSENTIAL = re.compile(
    r"router|topk|top-k|balanc|aux-loss|z-loss|score|num-groups|group-topk|bias|shared-expert|latent|mtp|multi-token"
    r"|attention(?!-backend)|group-query|query-groups|lora|qk-|head-dim|window|softmax-type|position|rotary|rope-type"
    r"|mscale|yarn|glu|clamp|pool"
)
"""Flags that are the recipe: not to be switched off, and in the model as published, or as SHRINK has them."""


def _number(recipe: Flags, flag: str) -> int:
    return int(recipe[flag][0])


def _num_dense(recipe: Flags) -> int:
    if "--moe-layer-freq" not in recipe:
        return 1
    (dense,) = re.fullmatch(r"\(\[0\]\*(\d)\+\[1\]\*\d+\)", recipe["--moe-layer-freq"][0]).groups()
    return int(dense)


def _query_groups(recipe: Flags) -> int:
    heads = _number(recipe, "--num-attention-heads")
    return max(1, 8 * _number(recipe, "--num-query-groups") // heads)


def _kv_channels(recipe: Flags) -> int:
    """Heads together as wide against the hidden size as published, in multiples of 8."""
    heads, hidden = _number(recipe, "--num-attention-heads"), _number(recipe, "--hidden-size")
    return 8 * max(1, round(_number(recipe, "--kv-channels") * heads / hidden))


def _recomputed(recipe: Flags) -> list[str] | None:
    """The modules whose recomputation does not ask for Transformer Engine's fp8 state."""
    asking = {"layernorm", "mla_up_proj", "moe_act"}
    return [module for module in recipe["--recompute-modules"] if module not in asking] or None


def _sixteenth(flag: str) -> Any:
    return lambda recipe: _number(recipe, flag) // 16


def _hybrid_pattern(recipe: Flags) -> str:
    """The first layers, and each depth of multi-token prediction, with attention in the place of Mamba layers.

    A Mamba layer needs Transformer Engine, and mamba-ssm's kernels.
    """
    main, *depths = recipe["--hybrid-layer-pattern"][0].split("/")
    return "/".join([main[: main.index("*") + 2].replace("M", "*"), *depths])


SHRINK: dict[str, Any] = {
    "--hybrid-layer-pattern": _hybrid_pattern,
    "--num-layers": lambda recipe: _num_dense(recipe) + 2,
    "--moe-layer-freq": lambda recipe: f"([0]*{_num_dense(recipe)}+[1]*2)",
    "--hidden-size": 64,
    "--ffn-hidden-size": 64,
    "--moe-ffn-hidden-size": 32,
    "--moe-shared-expert-intermediate-size": 32,
    # enough for every published number of experts a token, of groups, and of groups a token
    "--num-experts": lambda recipe: min(32, _number(recipe, "--num-experts")),
    "--num-attention-heads": 8,
    "--num-query-groups": _query_groups,
    "--kv-channels": _kv_channels,
    "--q-lora-rank": _sixteenth("--q-lora-rank"),
    "--kv-lora-rank": _sixteenth("--kv-lora-rank"),
    "--qk-head-dim": _sixteenth("--qk-head-dim"),
    "--qk-pos-emb-head-dim": _sixteenth("--qk-pos-emb-head-dim"),
    "--v-head-dim": _sixteenth("--v-head-dim"),
    "--window-size": "15,0",
    "--seq-length": 64,
    "--max-position-embeddings": 64,
    "--make-vocab-size-divisible-by": 128,
    "--padded-vocab-size": None,
    "--micro-batch-size": 2,
    "--global-batch-size": 4,
    "--tensor-model-parallel-size": 1,
    "--pipeline-model-parallel-size": 1,
    "--expert-model-parallel-size": 1,
    "--expert-tensor-parallel-size": 1,
    "--context-parallel-size": 1,
    "--pipeline-model-parallel-layout": None,
    "--decoder-first-pipeline-num-layers": None,
    "--decoder-last-pipeline-num-layers": None,
    "--num-virtual-stages-per-pipeline-rank": None,
    "--cp-comm-type": None,
    "--account-for-embedding-in-pipeline-split": None,
    "--account-for-loss-in-pipeline-split": None,
    "--overlap-moe-expert-parallel-comm": None,
    "--delay-wgrad-compute": None,
    "--recompute-modules": _recomputed,
}
"""Sizes for one process on a CPU: flag -> value, or a function of the recipe. None: one process has no use for it."""

BALANCE = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}
"""Type of balance loss -> its name in the log."""

# a recipe's own flags come after these, and win
PROCESS = shlex.split("""
--train-iters 2 --lr 1e-3 --min-lr 1e-4 --seed 7 --mock-data --tokenizer-type NullTokenizer --vocab-size 512
--split 100,0,0 --num-workers 0 --eval-iters 0 --eval-interval 1000 --log-interval 1
--moe-token-dispatcher-type alltoall
""")
POOLS = ["--dataloader-inter-document-masking", "--moe-router-dtype", "fp32"]


def published(name: str) -> Flags:
    """The flags of data/recipes/NAME.sh, in their order."""
    first, *words, last = shlex.split((RECIPES / f"{name}.sh").read_text(), comments=True)
    assert (first, last) == ("flags=(", ")")
    flags: Flags = {}
    for word in words:
        if word.startswith("--"):
            assert word not in flags, word
            flags[word] = []
        else:
            flags[list(flags)[-1]].append(word)
    return flags


def switched_off(flag: str, values: list[str]) -> bool:
    return flag in SWITCHED_OFF or shlex.join([flag, *values]) in SWITCHED_OFF


def shrunk(recipe: Flags) -> Flags:
    """What of the recipe runs in one process on a CPU."""
    small = {}
    for flag, values in recipe.items():
        rule = SHRINK.get(flag, values)
        rule = rule(recipe) if callable(rule) else rule
        if rule is not None and not switched_off(flag, values):
            small[flag] = rule if isinstance(rule, list) else [str(rule)]
    return small


def train(flags: Flags, folder: Path, *, expect_failure: bool = False) -> str:
    """What two steps with pools print; of a hybrid model under a script that knows of none."""
    words = [word for flag, values in flags.items() for word in (flag, *values)]
    (top_k,) = flags["--moe-router-topk"]
    variables = {"EMO_DEVICE": "cpu"}
    if "--hybrid-layer-pattern" in flags:
        (folder / "pool.json").write_text(json.dumps({"pool_min": int(top_k)}))
        variables["EMO_POOL_CONFIG"] = str(folder / "pool.json")
        spec = ("--spec", "emo_megatron.mcore.spec", "pool_hybrid_layer_spec")
        start: list[Any] = [HYBRID_SCRIPT, *PROCESS, *POOLS, *spec]
    else:
        start = [*PROCESS, *POOLS, "--pool-min", top_k]
    arguments = [*map(str, start), *words]
    code, output = run_script(SCRIPT, arguments, processes=1, environment=process_environment() | variables)
    assert (code != 0) == expect_failure, output[-4000:]
    return output


def expected(flag: str, values: list[str]) -> tuple[str, Any]:
    """Megatron's name of what a flag sets, and the value."""
    name = flag.removeprefix("--").replace("-", "_")
    if not values:
        switches = {"disable_bias_linear": "add_bias_linear", "no_position_embedding": "add_position_embedding"}
        name = switches.get(name, name)
        is_on = name.removeprefix("no_") == name and name not in switches.values()
        return name.removeprefix("no_"), is_on
    try:
        found = [ast.literal_eval(value) for value in values]
    except (ValueError, SyntaxError):
        found = values
    return name, found[0] if len(found) == 1 else found


def plain(value: Any) -> Any:
    """A tuple as JSON has it, and a list of one item as that item: Megatron takes either for a balance type."""
    value = list(value) if isinstance(value, tuple) else value
    return value[0] if isinstance(value, list) and len(value) == 1 else value


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_published_recipe_trains_with_pools(name, tmp_path):
    flags = shrunk(published(name))
    check_training(train(flags, tmp_path), flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_transformer_engine_is_named_and_the_rest_trains(name, tmp_path):
    flags = shrunk(published(name))
    output = train(flags, tmp_path, expect_failure=True)
    (problem,) = re.findall(r"  - (--\S+) must not be given with --transformer-impl local", output)
    assert problem == REFUSED[name]
    rest = {f: v for f, v in flags.items() if f != problem and not f.startswith("--linear-")}
    check_training(train(rest, tmp_path), rest)


def check_training(output: str, flags: Flags) -> None:
    """Losses, metrics of the pools, and the flags that Megatron says it goes by."""
    losses = logged(output)
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    for depth in range(1, int(flags.get("--mtp-num-layers", [0])[0]) + 1):
        further = logged(output, f"mtp_{depth} loss")
        assert len(further) == 2
        assert all(map(math.isfinite, further))
    sizes = logged(output, "pool_size")
    assert len(sizes) == 2
    top_k, experts = (_number(flags, flag) for flag in ("--moe-router-topk", "--num-experts"))
    assert all(top_k <= size <= experts for size in sizes)
    assert min(sizes) < experts
    assert logged(output, "nonfinite_tokens") == [0.0, 0.0]
    assert all(0 < used <= size for used, size in zip(logged(output, "experts_per_document"), sizes, strict=True))
    if float(flags["--moe-aux-loss-coeff"][0]) > 0:
        (kind,) = flags["--moe-router-load-balancing-type"]
        balance = logged(output, BALANCE[kind])
        assert len(balance) == 2
        assert all(loss > 0 for loss in balance)
    (seen,) = (json.loads(line.removeprefix("SEEN ")) for line in output.splitlines() if line.startswith("SEEN "))
    wanted = dict(expected(flag, values) for flag, values in flags.items() if ESSENTIAL.search(flag))
    assert {name: plain(seen[name]) for name in wanted} == {n: plain(v) for n, v in wanted.items()}


def test_every_recipe_is_tried():
    assert {path.stem for path in RECIPES.glob("*.sh")} == {*QUICK, *SLOW, *REFUSED}


def test_only_what_a_cpu_lacks_is_switched_off():
    assert {category for category, _ in SWITCHED_OFF.values()} == CATEGORIES
    assert [row for row in SWITCHED_OFF if ESSENTIAL.search(row.split()[0])] == [PADDING]
    everything = [(flag, values) for name in (*QUICK, *SLOW, *REFUSED) for flag, values in published(name).items()]
    used = {row for flag, values in everything for row in (flag, shlex.join([flag, *values]))}
    assert SWITCHED_OFF.keys() <= used, "rows that no recipe needs"
    # sizes, and what needs more than one process, may change; no switch of the router or of the attention
    changed = {flag for flag in SHRINK if ESSENTIAL.search(flag)}
    assert all(re.search(r"-(size|rank|dim|heads|groups|embeddings)$", flag) for flag in changed)
    assert SHRINK.keys() <= {flag for flag, _ in everything}, "rules that no recipe needs"
