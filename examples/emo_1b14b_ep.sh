#!/usr/bin/env bash
# Pretrains the 1B/14B model with 128 routed experts, so that they can be split over ranks (EP).
#
#   DATA_PATH=data/text_document TOKENIZER=allenai/dolma2-tokenizer CHECKPOINT=runs/emo_1b14b_ep \
#       NPROC=8 NNODES=16 NODE_RANK=0 MASTER_ADDR=node0 examples/emo_1b14b_ep.sh [flags that win]
#
#   EP   ranks that share one set of experts: any power of two up to 128                      (8)
#
# One deviation from the paper, on top of those that emo_1b14b.sh lists: 128 experts are routed and
# the shared one comes on top (the paper has 128 with it), so pools are drawn from 8..128. It is
# 0.1B parameters more; a token still uses 7 routed experts and the shared one. Everything else,
# and the other variables, are emo_1b14b.sh's.
set -euo pipefail

export LAYOUT="${LAYOUT:---expert-model-parallel-size ${EP:-8}}"

exec bash "$(dirname "${BASH_SOURCE[0]}")/emo_1b14b.sh" --num-experts 128 --pool-max 128 "$@"
