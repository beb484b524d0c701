# Qwen3-30B-A3B.
#
# yanring/Megatron-MoE-ModelZoo, model_configs/benchmarking/Qwen3-30B-A3B.yaml (17070963) with the row of this model in
# runtime_configs/benchmarking/runtime.conf (30631ea5): parallel sizes, dispatcher, batch.
flags=(
    --num-layers 48
    --hidden-size 2048
    --ffn-hidden-size 6144
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm
    --norm-epsilon 1e-06
    --untie-embeddings-and-output-weights
    --seq-length 4096
    --max-position-embeddings 40960
    --make-vocab-size-divisible-by 1187
    --init-method-std 0.02
    --attention-dropout 0.0
    --hidden-dropout 0.0

    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 4
    --kv-channels 128
    --qk-layernorm
    --position-embedding-type rope
    --rotary-percent 1.0
    --rotary-base 1000000
    --rotary-seq-len-interpolation-factor 1
    --use-flash-attn

    --num-experts 128
    --moe-ffn-hidden-size 768
    --moe-router-topk 8
    --moe-router-dtype fp32
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-3
    --moe-grouped-gemm
    --moe-permute-fusion
    --moe-token-dispatcher-type alltoall

    --use-mcore-models
    --transformer-impl transformer_engine
    --micro-batch-size 1
    --global-batch-size 256
    --bf16
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --expert-model-parallel-size 8
    --context-parallel-size 1
    --expert-tensor-parallel-size 1
    --sequence-parallel
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
