# Qwen3-235B-A22B in MXFP8.
#
# yanring/Megatron-MoE-ModelZoo, model_configs/benchmarking/Qwen3-235B-A22B.yaml (1ed4179f) with the MXFP8 line of
# best_practice/qwen3/run_gb200_235b.sh (020b8136) as sbatch_benchmarking.sh (38ce2ed2) spells its variables.
#
# Megatron-Core 0.19.2 says --cuda-graph-modules for the line's --cuda-graph-scope, and refuses --cross-entropy-fusion-impl
# te: native here. Left out of that line: --moe-router-force-load-balancing (random logits, for benchmarks) and the
# offloading of activations, which the line calls a feature to come.
flags=(
    --num-layers 94
    --hidden-size 4096
    --ffn-hidden-size 12288
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
    --cross-entropy-loss-fusion
    --cross-entropy-fusion-impl native

    --num-attention-heads 64
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
    --moe-ffn-hidden-size 1536
    --moe-router-topk 8
    --moe-router-dtype fp32
    --moe-router-fusion
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-3
    --moe-grouped-gemm
    --moe-permute-fusion
    --moe-token-dispatcher-type flex
    --moe-flex-dispatcher-backend hybridep
    --moe-hybridep-num-sms 32

    --use-mcore-models
    --enable-experimental
    --transformer-impl transformer_engine
    --micro-batch-size 3
    --global-batch-size 3072
    --bf16
    --fp8-recipe mxfp8
    --fp8-format e4m3
    --fp8-param-gather
    --reuse-grad-buf-for-mxfp8-param-ag
    --moe-router-padding-for-quantization
    --use-precision-aware-optimizer
    --main-grads-dtype fp32
    --main-params-dtype fp32
    --exp-avg-dtype bf16
    --exp-avg-sq-dtype bf16
    --recompute-granularity selective
    --recompute-modules moe_act layernorm
    --cuda-graph-impl transformer_engine
    --cuda-graph-modules attn moe_router moe_preprocess
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 4
    --num-virtual-stages-per-pipeline-rank 6
    --account-for-embedding-in-pipeline-split
    --account-for-loss-in-pipeline-split
    --expert-model-parallel-size 64
    --context-parallel-size 1
    --expert-tensor-parallel-size 1
    --sequence-parallel
    --overlap-moe-expert-parallel-comm
    --delay-wgrad-compute
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
