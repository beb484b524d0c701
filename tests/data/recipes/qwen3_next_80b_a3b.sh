# Qwen3-Next-80B-A3B.
#
# yanring/Megatron-MoE-ModelZoo, model_configs/benchmarking/Qwen3-Next-80B-A3B.yaml (3a2d8b5) with the row of this model in
# runtime_configs/benchmarking/runtime.conf (8e0e909): parallel sizes, batch. --linear-attention-type, --moe-enable-deepep and
# --no-weight-decay-cond-type are spelt as in Megatron-Core 0.19.2; --cross-entropy-fusion-impl is te there, which it refuses.
flags=(
    --num-layers 48
    --hidden-size 2048
    --ffn-hidden-size 5120
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm
    --apply-layernorm-1p
    --norm-epsilon 1e-06
    --untie-embeddings-and-output-weights
    --seq-length 4096
    --max-position-embeddings 262144
    --make-vocab-size-divisible-by 1187
    --init-method-std 0.02
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --cross-entropy-loss-fusion
    --cross-entropy-fusion-impl native

    --num-attention-heads 16
    --group-query-attention
    --num-query-groups 2
    --kv-channels 256
    --qk-layernorm
    --apply-wd-to-qk-layernorm
    --attention-output-gate
    --position-embedding-type rope
    --rotary-percent 0.25
    --rotary-base 10000000
    --rotary-seq-len-interpolation-factor 1
    --use-flash-attn
    --experimental-attention-variant gated_delta_net
    --linear-attention-freq 4
    --linear-conv-kernel-dim 4
    --linear-key-head-dim 128
    --linear-value-head-dim 128
    --linear-num-key-heads 16
    --linear-num-value-heads 32

    --num-experts 512
    --moe-ffn-hidden-size 512
    --moe-shared-expert-intermediate-size 512
    --moe-shared-expert-gate
    --moe-router-topk 10
    --moe-router-dtype fp32
    --moe-router-fusion
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-3
    --moe-grouped-gemm
    --moe-permute-fusion
    --moe-token-dispatcher-type flex
    --moe-flex-dispatcher-backend deepep

    --mtp-num-layers 1
    --mtp-loss-scaling-factor 0.1

    --use-mcore-models
    --transformer-impl transformer_engine
    --micro-batch-size 1
    --global-batch-size 256
    --bf16
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 4
    --num-virtual-stages-per-pipeline-rank 3
    --expert-model-parallel-size 8
    --expert-tensor-parallel-size 1
    --context-parallel-size 1
    --sequence-parallel
    --use-distributed-optimizer
    --enable-experimental
)
