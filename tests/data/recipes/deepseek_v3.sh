# DeepSeek-V3 (671B).
#
# yanring/Megatron-MoE-ModelZoo, model_configs/benchmarking/DeepSeek-V3.yaml (1b93710) with the run of 256 H100 and 4k
# tokens in best_practice/deepseek-v3/run_deepseek_v3_h100.sh (38ce2ed) and what sbatch_benchmarking.sh (1ed4179) makes of
# it: multi-token prediction, layout, recomputation, fp8, dispatcher. --moe-router-padding-for-fp8 is spelt as in
# Megatron-Core 0.19.2.
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
    --make-vocab-size-divisible-by 3232
    --init-method-std 0.02
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
    --rotary-base 10000
    --rotary-scaling-factor 40
    --mscale 1.0
    --mscale-all-dim 1.0
    --use-flash-attn

    --num-experts 256
    --moe-layer-freq '([0]*3+[1]*58)'
    --moe-ffn-hidden-size 2048
    --moe-shared-expert-intermediate-size 2048
    --moe-router-topk 8
    --moe-router-num-groups 8
    --moe-router-group-topk 4
    --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias
    --moe-router-bias-update-rate 1e-3
    --moe-router-topk-scaling-factor 2.5
    --moe-router-dtype fp32
    --moe-router-fusion
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 1e-4
    --moe-grouped-gemm
    --moe-permute-fusion
    --moe-router-padding-for-quantization
    --moe-token-dispatcher-type flex
    --moe-flex-dispatcher-backend deepep

    --mtp-num-layers 1
    --mtp-loss-scaling-factor 0.1

    --use-mcore-models
    --transformer-impl transformer_engine
    --micro-batch-size 1
    --global-batch-size 8192
    --bf16
    --fp8-recipe blockwise
    --fp8-format e4m3
    --use-precision-aware-optimizer
    --main-grads-dtype fp32
    --main-params-dtype fp32
    --exp-avg-dtype bf16
    --exp-avg-sq-dtype bf16
    --recompute-granularity selective
    --recompute-modules mla_up_proj moe mlp layernorm
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 8
    --pipeline-model-parallel-layout 'Et*2|(tt|)*22t|(tt|)*7mL'
    --expert-model-parallel-size 32
    --expert-tensor-parallel-size 1
    --context-parallel-size 1
    --sequence-parallel
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --enable-experimental
)
