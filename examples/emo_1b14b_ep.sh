#!/usr/bin/env bash
# Pretrains the 1B/14B model with 128 routed experts, which can be split over ranks (EP).
#
#   DATA_PATH=data/text_document TOKENIZER=allenai/dolma2-tokenizer CHECKPOINT=runs/emo_1b14b_ep \
#       NPROC=8 NNODES=16 NODE_RANK=0 MASTER_ADDR=node0 examples/emo_1b14b_ep.sh [more flags]
#
#   EP   ranks that share one set of experts: a power of two up to 128 that divides the number of
#        GPUs. Not read if LAYOUT is set: LAYOUT then holds --expert-model-parallel-size      (8)
#
# emo_1b14b.sh lists the differences from the paper. This variant adds one: it has 128 routed
# experts and one shared expert (the paper has 128 experts including the shared expert), so pools
# are drawn from 8..128. The model has 0.1B more parameters. Each token still uses 7 routed experts
# and the shared expert. All other settings and variables are those of emo_1b14b.sh. The matched
# standard MoE: append --pool-min none.
set -euo pipefail

export LAYOUT="${LAYOUT:---expert-model-parallel-size ${EP:-8}}"

exec bash "$(dirname "${BASH_SOURCE[0]}")/emo_1b14b.sh" --num-experts 128 "$@"
