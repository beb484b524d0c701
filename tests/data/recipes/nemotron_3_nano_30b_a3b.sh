# Nemotron-3-Nano-30B-A3B.
#
# NVIDIA/Megatron-LM, examples/post_training/modelopt/conf/nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.sh (core_v0.19.0,
# 83e7466c), with precision, recomputation and layout of nemotron_3_nano_pretrain_8gpu_h100_bf16_config in
# NVIDIA-NeMo/Megatron-Bridge, src/megatron/bridge/recipes/nemotronh/h100/nemotron_3_nano.py (bcd2d134), spelt as flags.
flags=(
    --hybrid-layer-pattern 'MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME'
    --hidden-size 2688
    --ffn-hidden-size 1856
    --squared-relu
    --use-fused-weighted-squared-relu
    --disable-bias-linear
    --normalization RMSNorm
    --untie-embeddings-and-output-weights
    --seq-length 8192
    --max-position-embeddings 8192
    --init-method-std 0.0173
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --cross-entropy-loss-fusion
    --cross-entropy-fusion-impl native

    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 2
    --kv-channels 128
    --position-embedding-type none
    --attention-backend flash
    --mamba-num-heads 64
    --mamba-head-dim 64

    --num-experts 128
    --moe-shared-expert-intermediate-size 3712
    --moe-router-topk 6
    --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias
    --moe-router-topk-scaling-factor 2.5
    --moe-router-dtype fp32
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 1e-4
    --moe-grouped-gemm
    --moe-permute-fusion
    --moe-token-dispatcher-type flex
    --moe-flex-dispatcher-backend hybridep
    --moe-hybridep-num-sms 16

    --use-mcore-models
    --transformer-impl transformer_engine
    --cuda-graph-impl transformer_engine
    --cuda-graph-modules attn mamba
    --micro-batch-size 1
    --global-batch-size 1024
    --bf16
    --recompute-granularity selective
    --recompute-modules moe layernorm
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --expert-model-parallel-size 8
    --expert-tensor-parallel-size 1
    --context-parallel-size 1
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --enable-experimental
)
