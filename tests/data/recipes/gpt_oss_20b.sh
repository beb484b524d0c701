# gpt-oss-20b.
#
# NVIDIA/Megatron-LM d98e8a64, examples/post_training/modelopt/conf/openai/gpt-oss-20b.sh; dispatcher, grouped experts and
# parallel sizes of NVIDIA-NeMo/Megatron-Bridge, src/megatron/bridge/models/gpt_oss/gpt_oss_provider.py (12bc34a8) and
# src/megatron/bridge/recipes/gpt_oss/gpt_oss.py (07b4a583).
#
# --enable-gpt-oss belongs to Megatron-LM's post-training scripts and sets YaRN; here are Megatron-Core 0.19.2's flags for
# it, with the numbers of the model's config.json (rope_scaling). --export-force-local-attention is of those scripts too.
flags=(
    --num-layers 24
    --hidden-size 2880
    --ffn-hidden-size 2880
    --quick-geglu
    --glu-linear-offset 1.0
    --activation-func-clamp-value 7.0
    --normalization RMSNorm
    --untie-embeddings-and-output-weights
    --seq-length 4096
    --max-position-embeddings 40960
    --make-vocab-size-divisible-by 128
    --padded-vocab-size 201088
    --attention-dropout 0.0
    --hidden-dropout 0.0

    --num-attention-heads 64
    --group-query-attention
    --num-query-groups 8
    --kv-channels 64
    --window-size 127,0
    --window-attn-skip-freq 2
    --softmax-type learnable
    --position-embedding-type yarn
    --rotary-percent 1.0
    --rotary-base 150000
    --rotary-scaling-factor 32
    --yarn-original-max-position-embeddings 4096
    --yarn-beta-fast 32
    --yarn-beta-slow 1
    --no-yarn-correction-range-round-to-int
    --mscale 1.0
    --mscale-all-dim 0.0
    --no-masked-softmax-fusion
    --no-rope-fusion
    --no-bias-gelu-fusion
    --no-bias-dropout-fusion

    --num-experts 32
    --moe-ffn-hidden-size 2880
    --moe-router-topk 4
    --moe-router-score-function softmax
    --moe-router-dtype fp32
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.0
    --moe-grouped-gemm
    --moe-permute-fusion
    --moe-token-dispatcher-type alltoall

    --use-mcore-models
    --micro-batch-size 1
    --global-batch-size 512
    --bf16
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 4
    --expert-model-parallel-size 2
    --expert-tensor-parallel-size 1
    --sequence-parallel
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
