#!/usr/bin/env bash
# Fine-tunes a module on documents of its domain. `merge` can then copy the module into its parent.
#
#   MODULE=runs/perl OUTPUT=runs/perl_tuned DATA_PATH=data/perl_document TOKENIZER=runs/tokenizer \
#       examples/finetune_module.sh $MODEL_FLAGS --num-experts 16
#   python -m emo_megatron merge --parent runs/emo --modules runs/perl_tuned --output runs/emo_perl
#
# Trains by examples/pretrain_emo.py, so all parallel layouts of Megatron work. Run the same command
# again to resume an interrupted run. selection.json of the module is copied to OUTPUT.
#
# The arguments are the model flags of the parent's training (docs/update.md, "The model flags") and
# the module's number of routed experts. Variables:
#
#   MODULE       folder written by `extract` or `compose`
#   OUTPUT       folder for checkpoints; if it holds a checkpoint, training resumes from there
#   TRAIN_ONLY   experts: the routed experts; experts+router: also their rows of the router;
#                all: all weights (merge uses all of them only with --weights all)  (experts)
#   STEPS        optimizer steps                                                    (100)
#   LR           learning rate, falling linearly to a tenth                         (1e-3)
#
# DATA_PATH, TOKENIZER, NPROC, NNODES, ...: see pretrain_emo.sh. A module is a standard MoE without
# pools. The parent's flags also set the load balancing; flags at the end override earlier flags.
set -euo pipefail

module="${MODULE:?must be the folder of a module}"
output="${OUTPUT:?must be the folder for checkpoints}"
mkdir -p "$output"
cp "$module/selection.json" "$output/"

source="$module"
start=(--finetune)
if [[ -e "$output/latest_checkpointed_iteration.txt" ]]; then
    source="$output"
    start=()
fi

CHECKPOINT="" exec bash "$(dirname "${BASH_SOURCE[0]}")/pretrain_emo.sh" \
    --load "$source" --save "$output" --save-interval "${STEPS:-100}" "${start[@]}" \
    --train-only "${TRAIN_ONLY:-experts}" --train-iters "${STEPS:-100}" \
    --lr "${LR:-1e-3}" --min-lr "$(awk "BEGIN { print ${LR:-1e-3} / 10 }")" --lr-decay-style linear \
    "$@"
