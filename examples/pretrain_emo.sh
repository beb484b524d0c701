#!/usr/bin/env bash
# Starts examples/pretrain_emo.py under torchrun, on one node or several.
#
#   DATA_PATH=data/text_document TOKENIZER=allenai/dolma2-tokenizer CHECKPOINT=runs/emo \
#       examples/pretrain_emo.sh --num-layers 16 --hidden-size 2048 --num-experts 128 ...
#
# Flags are Megatron's plus the --pool-* group. emo_1b14b.sh is one whole model's worth of them.
#
#   DATA_PATH    prefix of a .bin/.idx pair, or "weight prefix weight prefix ..."
#   TOKENIZER    Hugging Face name or folder; its end-of-text token marks where documents end
#   CHECKPOINT   folder to save to, and to resume from once it holds a checkpoint
#   NPROC        processes on this node, one a GPU                               (1)
#   NNODES       nodes; with several, each also needs NODE_RANK and MASTER_ADDR  (1)
#   MASTER_PORT  port of the first node, with several nodes                      (29500)
#   PYTHON       interpreter                                                     (python)
set -euo pipefail

inputs=()
if [[ -n "${DATA_PATH:-}" ]]; then
    read -ra prefixes <<<"$DATA_PATH"
    inputs+=(--data-path "${prefixes[@]}")
fi
if [[ -n "${TOKENIZER:-}" ]]; then
    inputs+=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER")
fi
if [[ -n "${CHECKPOINT:-}" ]]; then
    inputs+=(--save "$CHECKPOINT" --load "$CHECKPOINT")
fi

nodes=(--standalone)
if ((${NNODES:-1} > 1)); then
    nodes=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?must say which node this is, 0 being the first}")
    nodes+=(--master-addr "${MASTER_ADDR:?must name the first node}")
    nodes+=(--master-port "${MASTER_PORT:-29500}")
fi

# Megatron asserts this with tensor or context parallelism before Blackwell; its FSDP wants more.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

exec "${PYTHON:-python}" -m torch.distributed.run --nproc-per-node "${NPROC:-1}" "${nodes[@]}" \
    "$(dirname "${BASH_SOURCE[0]}")/pretrain_emo.py" "${inputs[@]}" "$@"
