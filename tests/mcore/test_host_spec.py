"""`--spec emo_megatron.mcore.spec pool_layer_spec` on megatron.training, as NVIDIA's pretrain_gpt.py resolves it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from support import tiny

from emo_megatron.config import PoolConfig
from emo_megatron.mcore import cpu, on_cpu
from emo_megatron.mcore.router import PoolRouter

ROOT = Path(__file__).resolve().parents[2]
FLAGS = shlex.split("""
--spec emo_megatron.mcore.spec pool_layer_spec
--num-layers 2 --hidden-size 32 --ffn-hidden-size 32 --num-attention-heads 4 --swiglu --seq-length 16
--max-position-embeddings 32 --position-embedding-type rope --normalization RMSNorm --disable-bias-linear
--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 16 --moe-shared-expert-intermediate-size 16
--moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type global_aux_loss
--moe-aux-loss-coeff 0.02 --moe-z-loss-coeff 0.001 --micro-batch-size 2 --lr 1e-3
--tokenizer-type NullTokenizer --vocab-size 64 --split 100,0,0 --mock-data
""")
DOCUMENTS = "--dataloader-inter-document-masking"


def _train(config_file, flags, pool=None):
    """Two steps of the model that Megatron's model builder makes of these flags, or the error it gives."""
    from megatron.training import global_vars
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.models import gpt

    of_megatron = gpt.mtp_block_spec
    # Megatron leaves this choice in the environment of a process, where other tests build models too
    sys.argv = ["pretrain_gpt.py", *cpu.with_cpu_flags([*flags, "--attention-backend", "auto"])]
    if config_file is not None:
        os.environ["EMO_POOL_CONFIG"] = config_file
    try:
        args = parse_args()
        validate_args(args)
        global_vars.set_args(args)
        tiny.setup()
        config = gpt_config_from_args(args)
        if pool is not None:
            from emo_megatron.mcore.spec import pool_spec_builder

            # of a build that stopped behind the decoder
            pool_spec_builder(PoolConfig(pool_min=2))(config)
            config.transformer_layer_spec = pool_spec_builder(pool)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = config.get_builder_cls()(config).build_model(groups)
    except ValueError as error:
        return str(error)
    finally:
        global_vars._GLOBAL_ARGS = None
        os.environ.pop("EMO_POOL_CONFIG", None)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        packed = tiny.packed([0, 9, 16, 32])
        loss = model(**tiny.batch(0), attention_mask=None, packed_seq_params=packed).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    # a process of the tests trains other models too
    MTPLossLoggingHelper.tracker = {}
    return {
        "routers": [(type(r) is PoolRouter, r.pool) for r in routers],
        "pools": [pool.sum(-1).tolist() for pool in packed.emo_scope.pools.values()],
        "is_megatrons": gpt.mtp_block_spec is of_megatron,
        "losses": losses,
        "metrics": getattr(get_moe_metrics_tracker(), "names", None),
    }


@pytest.fixture
def pool_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "pool.json"
        path.write_text(text)
        return str(path)

    return write


def test_the_model_builder_makes_the_pools_of_the_file(ranks, pool_file):
    path = pool_file('{"pool_min": 3, "pool_max": 4, "pool_seed": 5}')
    answer = ranks(1).run(_train, config_file=path, flags=[*FLAGS, DOCUMENTS])[0]
    assert answer["routers"] == [(True, PoolConfig(pool_min=3, pool_max=4, pool_seed=5))] * 2
    assert len(answer["pools"]) == 2
    assert all(len(sizes) == 3 and set(sizes) <= {3, 4} for sizes in answer["pools"])
    assert answer["losses"][1] < answer["losses"][0]
    assert {"pool_size", "experts_per_document"} <= set(answer["metrics"])


def test_layers_of_multi_token_prediction_have_pools_too(ranks, pool_file):
    path = pool_file('{"pool_min": 3, "pool_max": 4}')
    flags = [*FLAGS, DOCUMENTS, "--mtp-num-layers", "2"]
    answer = ranks(1).run(_train, config_file=path, flags=flags)[0]
    assert answer["routers"] == [(True, PoolConfig(pool_min=3, pool_max=4))] * 4
    assert len(answer["pools"]) == 4
    assert all(set(sizes) <= {3, 4} for sizes in answer["pools"])
    assert answer["losses"][1] < answer["losses"][0]
    assert answer["is_megatrons"], "what Megatron's builder calls is put back"


def test_a_script_of_its_own_has_pools_there_too(ranks):
    pool = PoolConfig(pool_min=3, pool_max=4)
    flags = [*FLAGS[3:], DOCUMENTS, "--mtp-num-layers", "2"]
    answer = ranks(1).run(_train, config_file=None, flags=flags, pool=pool)[0]
    assert answer["routers"] == [(True, pool)] * 4
    assert len(answer["pools"]) == 4
    assert answer["is_megatrons"]


def test_an_empty_object_is_the_standard_model(ranks, pool_file):
    answer = ranks(1).run(_train, config_file=pool_file("{}"), flags=FLAGS)[0]
    assert answer["routers"] == [(True, PoolConfig())] * 2
    assert answer["pools"] == []
    assert "pool_size" not in answer["metrics"]


@pytest.mark.parametrize(
    ("text", "flags", "named"),
    [
        (None, [DOCUMENTS], ["EMO_POOL_CONFIG"]),
        ('{"pool_max": 4}', [DOCUMENTS], ["pool.json", "--pool-min"]),
        ('{"pool_min": 9}', [DOCUMENTS], ["--num-experts"]),
        ('{"pool_min": 3}', [], [DOCUMENTS]),
        ('{"pool_min": 3, "pool_documents": "routers"}', [], ["--pool-documents"]),
        (
            '{"pool_min": 3}',
            [DOCUMENTS, "--reset-attention-mask", "--moe-router-dtype", "fp64"],
            ["--reset-attention-mask", "--moe-router-dtype"],
        ),
        ('{"pool_min": 3}', [DOCUMENTS, "--hybrid-layer-pattern", "*E*E"], ["--hybrid-layer-pattern"]),
    ],
    ids=["unset", "useless", "too large", "no documents", "routers", "flags", "hybrid"],
)
def test_what_cannot_be_is_refused(ranks, pool_file, text, flags, named):
    path = None if text is None else pool_file(text)
    message = ranks(1).run(_train, config_file=path, flags=[*FLAGS, *flags])[0]
    assert isinstance(message, str)
    assert [name for name in named if name not in message] == []


def _logged(output: str, name: str) -> list[float]:
    return [float(v) for v in re.findall(rf"\| {name}: ([\d.E+-]+)", output)]


def test_a_script_that_knows_no_pools_trains_with_them(tmp_path):
    """The CPU runner, two pipeline stages, packed micro-batches of two samples, recomputation, the log."""
    (tmp_path / "pool.json").write_text(json.dumps({"pool_min": 3, "pool_max": 5}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ["-m", "emo_megatron.mcore.on_cpu", ROOT / "tests" / "support" / "host_script.py"]
    flags = shlex.split("""
        --pipeline-model-parallel-size 2 --recompute-granularity selective --recompute-modules moe
        --global-batch-size 8 --train-iters 4 --num-workers 0 --eval-iters 0 --eval-interval 9 --log-interval 1
    """)
    done = subprocess.run(
        [sys.executable, *launcher, *script, *FLAGS, DOCUMENTS, *flags],
        env={**os.environ, "EMO_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "EMO_POOL_CONFIG": str(tmp_path / "pool.json")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    losses = _logged(done.stdout, "lm loss")
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert all(3 <= size <= 5 for size in _logged(done.stdout, "pool_size"))
    assert len(_logged(done.stdout, "pool_size")) == 4
    assert done.stdout.count("PoolConfig(pool_min=3, pool_max=5") == 1


def test_the_runner_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["on_cpu", "no_such_script.py", "--flag"])
    with pytest.raises(SystemExit, match="no_such_script"):
        on_cpu.main()
