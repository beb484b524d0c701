# OLMoE-1B-7B.
#
# NVIDIA-NeMo/Megatron-Bridge, OlMoEModelProvider in src/megatron/bridge/models/olmoe/olmoe_provider.py (217dc581) and
# olmoe_7b_pretrain_config in src/megatron/bridge/recipes/olmoe/olmoe_7b.py (12e1f6b3), its fields spelt as flags; the
# coefficient of the z loss is that of allenai/OLMoE, configs/olmoe-8x1b-newhp-newds-cx5-fine1-normreorder.yml (525672c3).
# The model normalises queries and keys over all heads at once, for which Bridge has an attention class of its own;
# Megatron's --qk-layernorm does it head by head.
flags=(
    --num-layers 16
    --hidden-size 2048
    --ffn-hidden-size 1024
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --untie-embeddings-and-output-weights
    --seq-length 4096
    --max-position-embeddings 4096
    --init-method-std 0.02
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --cross-entropy-loss-fusion
    --cross-entropy-fusion-impl native

    --num-attention-heads 16
    --kv-channels 128
    --qk-layernorm
    --position-embedding-type rope
    --rotary-base 10000
    --no-rope-fusion

    --num-experts 64
    --moe-ffn-hidden-size 1024
    --moe-router-topk 8
    --moe-router-score-function softmax
    --moe-router-pre-softmax
    --moe-router-dtype fp32
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 1e-2
    --moe-z-loss-coeff 1e-3
    --moe-grouped-gemm
    --moe-permute-fusion
    --moe-token-dispatcher-type alltoall

    --transformer-impl transformer_engine
    --micro-batch-size 1
    --global-batch-size 2048
    --bf16
    --use-precision-aware-optimizer
    --main-params-dtype fp32
    --main-grads-dtype bf16
    --exp-avg-dtype bf16
    --exp-avg-sq-dtype bf16
    --recompute-granularity selective
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --expert-model-parallel-size 8
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
