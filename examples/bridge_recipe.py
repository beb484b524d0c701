r"""Pretrain a Megatron-Bridge (NeMo) recipe with document pools, or continue training a Hugging Face MoE with pools.

    torchrun --nproc-per-node 8 examples/bridge_recipe.py model.pool_min=16 dataset.data_path=data/web_text_document
    torchrun --nproc-per-node 8 examples/bridge_recipe.py --hf allenai/OLMoE-1B-7B-0125 model.pool_min=16 \
        dataset.data_path=data/web_text_document optimizer.lr=5e-5 optimizer.min_lr=5e-6 train.train_iters=1000 \
        scheduler.lr_warmup_iters=100 scheduler.lr_decay_iters=1000

The second command starts from the weights of a model on the hub or in a folder. AutoBridge and pools must support the
model's architecture. Optimizer, learning rate, schedule, batch size and steps remain those of the OLMoE recipe for
pretraining, so set them. Checkpoints (checkpoint.save) and export to Hugging Face are Bridge's own. Without
dataset.data_path the script trains on random tokens.
"""

import argparse

from emo_megatron.mcore import cpu

cpu.activate()

from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.recipes.olmoe import olmoe_7b_pretrain_config  # noqa: E402
from megatron.bridge.training.config import ConfigContainer  # noqa: E402
from megatron.bridge.training.pretrain import pretrain  # noqa: E402
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides  # noqa: E402

from emo_megatron.bridge import apply_pools, pool_forward_step  # noqa: E402
from emo_megatron.bridge.command import pools_and_others  # noqa: E402


def main() -> None:
    """Take a recipe, apply the overrides and pools, and run Bridge's own training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hf", metavar="MODEL", help="start from this model: its name on the hub, or its folder")
    parser.add_argument(
        "overrides", metavar="FIELD=VALUE", nargs="+", help="options, such as model.pool_min=16 train.train_iters=1000"
    )
    options = parser.parse_args()

    pool, others = pools_and_others(options.overrides)
    cfg = olmoe_7b_pretrain_config()
    if options.hf:
        use_model(cfg, options.hf)
    process_config_with_overrides(cfg, cli_overrides=others)
    apply_pools(cfg, pool, pool_documents=pool.pool_documents)
    pretrain(cfg, pool_forward_step)


def use_model(cfg: ConfigContainer, name: str) -> None:
    """Replace the recipe's model by a Hugging Face model with its weights and its tokenizer."""
    model = AutoBridge.from_hf_pretrained(name).to_megatron_provider()
    model.seq_length = cfg.dataset.seq_length
    model.expert_model_parallel_size = cfg.model.expert_model_parallel_size
    cfg.model = model
    cfg.tokenizer.tokenizer_type = "HuggingFaceTokenizer"
    cfg.tokenizer.tokenizer_model = name


# processes that write checkpoints import this file
if __name__ == "__main__":
    main()
