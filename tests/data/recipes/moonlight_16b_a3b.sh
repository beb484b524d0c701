# Moonlight-16B-A3B.
#
# NVIDIA-NeMo/Megatron-Bridge, MoonlightModelProvider16B in src/megatron/bridge/models/deepseek/deepseek_provider.py
# (066adea0) and moonlight_16b_pretrain_config in src/megatron/bridge/recipes/moonlight/moonlight_16b.py (08de997c), its
# fields spelt as flags. No --q-lora-rank: queries are not compressed. --cross-entropy-fusion-impl is te there, which
# Megatron-Core 0.19.2 refuses.
flags=(
    --num-layers 27
    --hidden-size 2048
    --ffn-hidden-size 11264
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --untie-embeddings-and-output-weights
    --seq-length 4096
    --max-position-embeddings 4096
    --make-vocab-size-divisible-by 1280
    --init-method-std 0.02
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --cross-entropy-loss-fusion
    --cross-entropy-fusion-impl native

    --num-attention-heads 16
    --kv-channels 16
    --multi-latent-attention
    --kv-lora-rank 512
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --qk-layernorm
    --position-embedding-type rope
    --rotary-percent 1.0
    --rotary-base 50000
    --rotary-scaling-factor 1.0
    --mscale 1.0
    --mscale-all-dim 1.0

    --num-experts 64
    --moe-layer-freq '([0]*1+[1]*26)'
    --moe-ffn-hidden-size 1408
    --moe-shared-expert-intermediate-size 2816
    --moe-shared-expert-overlap
    --moe-router-topk 6
    --moe-router-num-groups 1
    --moe-router-group-topk 1
    --moe-router-score-function sigmoid
    --moe-router-pre-softmax
    --moe-router-enable-expert-bias
    --moe-router-bias-update-rate 1e-3
    --moe-router-topk-scaling-factor 2.446
    --moe-router-dtype fp32
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 0.001
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
    --tensor-model-parallel-size 2
    --pipeline-model-parallel-size 1
    --expert-model-parallel-size 8
    --expert-tensor-parallel-size 1
    --sequence-parallel
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
