# Mixtral 8x7B.
#
# NVIDIA/Megatron-LM d98e8a64, examples/mixtral/train_mixtral_8x7b_distributed.sh. Its router keeps Megatron's default
# dtype, so pools need --moe-router-dtype fp32 on top.
flags=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm
    --untie-embeddings-and-output-weights
    --seq-length 4096
    --max-position-embeddings 32768
    --init-method-std 0.01
    --attention-dropout 0.0
    --hidden-dropout 0.0

    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --position-embedding-type rope
    --rotary-base 1000000
    --no-position-embedding
    --no-masked-softmax-fusion

    --num-experts 8
    --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-2
    --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall

    --use-mcore-models
    --micro-batch-size 1
    --global-batch-size 256
    --bf16
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 4
    --expert-model-parallel-size 8
    --sequence-parallel
    --use-distributed-optimizer
    --overlap-param-gather
    --overlap-grad-reduce
)
