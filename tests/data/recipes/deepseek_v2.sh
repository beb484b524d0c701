# DeepSeek-V2 (236B).
#
# NVIDIA-NeMo/Megatron-Bridge, DeepSeekV2ModelProvider in src/megatron/bridge/models/deepseek/deepseek_provider.py
# (066adea0) and deepseek_v2_pretrain_config in src/megatron/bridge/recipes/deepseek/deepseek_v2.py (05d003fb), its
# fields spelt as flags. --moe-router-num-groups and --moe-router-group-topk are what --moe-router-topk-limited-devices,
# which Megatron-Core 0.19.2 marks as deprecated, was: each of the 8 groups lies on one device, a token goes to 3.
# --cross-entropy-fusion-impl is te there, which 0.19.2 refuses.
flags=(
    --num-layers 60
    --hidden-size 5120
    --ffn-hidden-size 12288
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --untie-embeddings-and-output-weights
    --seq-length 4096
    --max-position-embeddings 4096
    --make-vocab-size-divisible-by 3200
    --init-method-std 0.006
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --cross-entropy-loss-fusion
    --cross-entropy-fusion-impl native

    --num-attention-heads 128
    --kv-channels 128
    --multi-latent-attention
    --q-lora-rank 1536
    --kv-lora-rank 512
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --qk-layernorm
    --position-embedding-type rope
    --rope-type yarn
    --rotary-base 10000
    --rotary-scaling-factor 40
    --mscale 0.707
    --mscale-all-dim 0.707

    --num-experts 160
    --moe-layer-freq '([0]*1+[1]*59)'
    --moe-ffn-hidden-size 1536
    --moe-shared-expert-intermediate-size 3072
    --moe-shared-expert-overlap
    --moe-router-topk 6
    --moe-router-num-groups 8
    --moe-router-group-topk 3
    --moe-router-pre-softmax
    --moe-router-topk-scaling-factor 16.0
    --moe-router-dtype fp32
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 1e-3
    --moe-grouped-gemm
    --moe-permute-fusion
    --moe-token-dispatcher-type alltoall

    --transformer-impl transformer_engine
    --micro-batch-size 1
    --global-batch-size 512
    --bf16
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 4
    --expert-model-parallel-size 32
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
