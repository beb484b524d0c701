"""Pretrain EMO: the flags of Megatron's pretrain_gpt.py, plus the group "document pools" (see --help).

    torchrun --nproc-per-node 8 examples/pretrain_emo.py \
        --pool-min 8 --dataloader-inter-document-masking <Megatron's flags>

Without --pool-min the script trains the matched standard MoE. --train-only freezes a part of the model (see
finetune_module.sh). On a machine without a GPU, the script uses gloo and adds the flags that select Megatron's plain
PyTorch modules.
"""

import multiprocessing
import sys
from typing import Any

# Each rank starts a process that holds the results of its checkpoint writers. That process imports this file again but
# uses nothing from it; without the import of Megatron it starts seconds sooner.
if not multiprocessing.current_process().name.startswith("SyncManager"):
    from emo_megatron.mcore import cpu

    cpu.activate()

    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from emo_megatron.mcore import resume, train
    from emo_megatron.mcore.args import add_pool_args, check_run, pool_config_from_args
    from emo_megatron.mcore.compat import require_megatron, use_compiled_index_builder
    from emo_megatron.mcore.metrics import install_metrics
    from emo_megatron.mcore.spec import pool_spec_builder
    from emo_megatron.runners.start import add_start_args, start_hooks


def main() -> None:
    """Parse and check the flags, and run Megatron's training."""
    require_megatron()
    use_compiled_index_builder()
    sys.argv[1:] = cpu.with_cpu_flags(sys.argv[1:])
    resume.run(prepare, start)


def prepare() -> tuple[Any, ...]:
    """The flags, the pools and the model configuration; raises an error if the run is not possible."""
    args = parse_and_validate_args(
        extra_args_provider=lambda parser: add_start_args(add_pool_args(parser)),
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
    )
    train.pack_conversations(args)
    pool = pool_config_from_args(args)
    model = gpt_config_from_args(args)
    check_run(pool, model.transformer, args)
    resume.check_resume(pool, args)
    model.transformer_layer_spec = pool_spec_builder(pool)
    train.let_lengths_vary(args, model.transformer)
    train.prepare_prediction(args)
    model.pre_wrap_hooks += start_hooks(args)
    return args, pool, model


def start(args: Any, pool: Any, model: Any, **restarts: Any) -> None:
    """Train; with --inprocess-restart, called again after a failure."""
    install_metrics(pool, model.transformer, has_documents=train.has_documents(args))
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        train.datasets_provider,
        ModelType.encoder_or_decoder,
        train.forward_step,
        get_embedding_ranks=train.embedding_ranks(
            model.transformer, is_tied=not args.untie_embeddings_and_output_weights
        ),
        **restarts,
    )


if __name__ == "__main__":
    main()
