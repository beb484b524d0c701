"""A script on megatron.training that knows of no pools: like pretrain_gpt.py, which is in no wheel, its main in brief.

With --hybrid-layer-pattern it is like pretrain_hybrid.py. Batches and loss are those of emo_megatron.mcore.train; model
and layers are what Megatron's own flags say.
"""

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args

from emo_megatron.mcore import train

if __name__ == "__main__":
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    config_from_args = hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args
    pretrain(
        pretrain_cfg_container_from_args(args, config_from_args(args)),
        train.datasets_provider,
        ModelType.encoder_or_decoder,
        train.forward_step,
    )
