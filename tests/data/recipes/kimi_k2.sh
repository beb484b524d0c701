# Kimi-K2 (1T).
#
# NVIDIA-NeMo/Megatron-Bridge, kimi_k2_pretrain_config in src/megatron/bridge/recipes/kimi/kimi_k2.py (0350b4ef), its
# fields spelt as flags; its layout of 61 layers over 16 stages as Megatron's --pipeline-model-parallel-layout. Left out:
# beta_fast and beta_slow of the rotary embedding, for which Megatron-Core 0.19.2 has no flags with latent attention.
# --cross-entropy-fusion-impl is te there, which 0.19.2 refuses.
flags=(
    --num-layers 61
    --hidden-size 7168
    --ffn-hidden-size 18432
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --untie-embeddings-and-output-weights
    --seq-length 4096
    --max-position-embeddings 4096
    --make-vocab-size-divisible-by 1280
    --init-method-std 0.006
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --cross-entropy-loss-fusion
    --cross-entropy-fusion-impl native

    --num-attention-heads 64
    --kv-channels 64
    --multi-latent-attention
    --q-lora-rank 1536
    --kv-lora-rank 512
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --qk-layernorm
    --position-embedding-type rope
    --rotary-base 50000
    --rotary-scaling-factor 32
    --mscale 1.0
    --mscale-all-dim 1.0

    --num-experts 384
    --moe-layer-freq '([0]*1+[1]*60)'
    --moe-ffn-hidden-size 2048
    --moe-shared-expert-intermediate-size 2048
    --moe-shared-expert-overlap
    --moe-router-topk 8
    --moe-router-num-groups 1
    --moe-router-group-topk 1
    --moe-router-score-function sigmoid
    --moe-router-pre-softmax
    --moe-router-enable-expert-bias
    --moe-router-bias-update-rate 1e-3
    --moe-router-topk-scaling-factor 2.827
    --moe-router-dtype fp32
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 1e-3
    --moe-grouped-gemm
    --moe-permute-fusion
    --moe-token-dispatcher-type alltoall

    --transformer-impl transformer_engine
    --micro-batch-size 1
    --global-batch-size 4096
    --bf16
    --recompute-granularity selective
    --tensor-model-parallel-size 2
    --pipeline-model-parallel-size 16
    --pipeline-model-parallel-layout 'Et*4|(t*4|)*14tL'
    --expert-model-parallel-size 32
    --expert-tensor-parallel-size 1
    --sequence-parallel
    --overlap-grad-reduce
)
