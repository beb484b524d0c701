# GLM-4.5 (355B).
#
# NVIDIA-NeMo/Megatron-Bridge, glm45_355b_pretrain_128gpu_h100_bf16_config in src/megatron/bridge/recipes/glm/h100/glm45.py
# (f97d4cd3), GLM45Bridge in src/megatron/bridge/models/glm/glm45_bridge.py (282e0ba8) and zai-org/GLM-4.5's own values in
# tests/unit_tests/models/glm/test_glm45_bridge.py (067f987d), spelt as flags.
flags=(
    --num-layers 92
    --hidden-size 5120
    --ffn-hidden-size 12288
    --swiglu
    --disable-bias-linear
    --add-qkv-bias
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --untie-embeddings-and-output-weights
    --seq-length 4096
    --max-position-embeddings 131072
    --init-method-std 0.02
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --cross-entropy-loss-fusion
    --cross-entropy-fusion-impl native

    --num-attention-heads 96
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --qk-layernorm
    --position-embedding-type rope
    --rotary-percent 0.5
    --rotary-base 1000000

    --num-experts 160
    --moe-layer-freq '([0]*3+[1]*89)'
    --moe-ffn-hidden-size 1536
    --moe-shared-expert-intermediate-size 1536
    --moe-shared-expert-overlap
    --moe-router-topk 8
    --moe-router-num-groups 1
    --moe-router-group-topk 1
    --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias
    --moe-router-bias-update-rate 0
    --moe-router-topk-scaling-factor 2.5
    --moe-router-dtype fp32
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 1e-3
    --moe-grouped-gemm
    --moe-permute-fusion
    --moe-token-dispatcher-type alltoall

    --mtp-num-layers 1
    --mtp-loss-scaling-factor 0.3

    --transformer-impl transformer_engine
    --micro-batch-size 1
    --global-batch-size 2048
    --bf16
    --recompute-granularity selective
    --tensor-model-parallel-size 2
    --pipeline-model-parallel-size 8
    --decoder-first-pipeline-num-layers 10
    --decoder-last-pipeline-num-layers 10
    --expert-model-parallel-size 16
    --expert-tensor-parallel-size 1
    --sequence-parallel
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
