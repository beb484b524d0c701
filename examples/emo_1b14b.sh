#!/usr/bin/env bash
# Pretrains the EMO paper's 1B/14B model: 13.6B parameters, 127 routed experts, one shared expert.
#
#   DATA_PATH=data/text_document TOKENIZER=allenai/dolma2-tokenizer CHECKPOINT=runs/emo_1b14b \
#       NPROC=8 NNODES=16 NODE_RANK=0 MASTER_ADDR=node0 examples/emo_1b14b.sh [more flags]
#
# Run the script once on every node, with that node's NODE_RANK; pretrain_emo.sh has a line for Slurm.
# Flags at the end override those of this file. The matched standard MoE: append --pool-min none.
# Environment variables, with defaults in parentheses:
#
#   TRAIN_ITERS   238419 is 1T tokens (the released model); 30995 is the paper's 130B     (238419)
#   MICRO_BATCH   sequences per rank and micro-batch                                       (4)
#   LAYOUT        parallel layout, as flags                             (2 pipeline stages, below)
#   DATA_PATH, TOKENIZER, CHECKPOINT, NPROC, NNODES, ...: see pretrain_emo.sh
#
# 127 is prime, so experts cannot be split over ranks (EP=1); emo_1b14b_ep.sh is a variant with
# expert parallelism. Weights and gradients (6 bytes per parameter) are 81 GB, so the default has
# two pipeline stages and recomputes the experts. The optimizer adds 12 bytes per parameter (163 GB),
# divided over the data-parallel ranks: 64 ranks with 2 stages and 128 GPUs. This is arithmetic for
# 80 GB GPUs, without activations, not a measurement.
#
# The load-balancing loss covers one micro-batch of all data-parallel ranks: MICRO_BATCH times the
# number of ranks. The paper has 512 sequences (128 GPUs without pipeline stages, 4 sequences each).
# With the default layout, 128 GPUs are 64 data-parallel ranks and give 256 sequences: MICRO_BATCH=8
# gives 512 and needs more memory. Both coefficients are the paper's (0.1 and 1e-3) divided by its 16
# layers, as in the authors' code. Megatron does not divide by the number of layers.
#
# Differences from the paper, because Megatron has no flag for them:
#   - weights start from a plain normal distribution, not one cut at 3 standard deviations; the
#     attention and expert output projections start at 0.02 / sqrt(2 * 16) instead of 0.02
#   - no z-loss over the vocabulary (1e-5 in the paper)
#   - weight decay also applies to the embedding (not in the paper)
#   - no filter for sequences that repeat an n-gram 32 times or more (loss-masked in the paper)
#   - no anneal: the released model trains 50B more tokens, with a learning rate that falls linearly
#     from 4e-4 to 0 and with the optimizer state kept. Megatron cannot resume with another --lr or
#     --min-lr, because it finds the saved optimizer's parameter groups by these two values
# Differences because pools here count routed experts and use the documents of the attention:
#   - pool sizes are uniform on 8..127, so 1 size in 120 means all experts; the paper's 8..128 has
#     two sizes that mean all experts, 2 in 121
#   - an end-of-text token belongs to the document that it ends; the authors' pools count it to the
#     next document, like --pool-eos-starts-document
set -euo pipefail

model=(
    --num-layers 16
    --hidden-size 2048
    --num-attention-heads 16
    --ffn-hidden-size 1024
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --position-embedding-type rope
    --rotary-base 500000
    --seq-length 4096
    --max-position-embeddings 4096
    --untie-embeddings-and-output-weights
    --make-vocab-size-divisible-by 128
    --attention-dropout 0
    --hidden-dropout 0
    --init-method-std 0.02
)

experts=(
    --num-experts 127
    --moe-ffn-hidden-size 1024
    --moe-shared-expert-intermediate-size 1024
    --moe-router-topk 7
    --moe-router-pre-softmax
    --moe-router-dtype fp32
    --moe-router-load-balancing-type global_aux_loss
    --moe-aux-loss-coeff 0.00625
    --moe-z-loss-coeff 6.25e-5
    --moe-token-dispatcher-type alltoall
    --moe-grouped-gemm
)

# Evaluation uses no pools, like exported models; the authors' in-loop evaluation uses pools of 32.
pools=(
    --pool-min 8
    --pool-eval none
    --pool-seed 12536
    --pool-balance micro
    --pool-mask logits
)

training=(
    --micro-batch-size "${MICRO_BATCH:-4}"
    --global-batch-size 1024
    --train-iters "${TRAIN_ITERS:-238419}"
    --lr 4e-3
    --min-lr 4e-4
    --lr-decay-style cosine
    --lr-warmup-iters 2000
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.95
    --adam-eps 1e-8
    --weight-decay 0.1
    --clip-grad 1.0
    --bf16
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --seed 12536
)

data=(
    --dataloader-inter-document-masking
    --split 999,1,0
    --eval-interval 2500
    --eval-iters 8
    --save-interval 2500
    --log-interval 10
)

default_layout="--pipeline-model-parallel-size 2 --recompute-granularity selective --recompute-modules moe"
read -ra layout <<<"${LAYOUT:-$default_layout}"

exec bash "$(dirname "${BASH_SOURCE[0]}")/pretrain_emo.sh" "${model[@]}" "${experts[@]}" \
    "${pools[@]}" "${training[@]}" "${data[@]}" "${layout[@]}" "$@"
