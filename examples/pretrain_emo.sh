#!/usr/bin/env bash
# Starts examples/pretrain_emo.py under torchrun, on one node or several.
#
#   DATA_PATH=data/text_document TOKENIZER=allenai/dolma2-tokenizer CHECKPOINT=runs/emo \
#       examples/pretrain_emo.sh --num-layers 16 --hidden-size 2048 --num-experts 128 ...
#
# All flags of Megatron and the --pool-* flags work. emo_1b14b.sh has all flags of one model.
# Environment variables, with defaults in parentheses:
#
#   DATA_PATH    prefix of a .bin/.idx pair, or "weight prefix weight prefix ..."
#   TOKENIZER    Hugging Face name or folder
#   CHECKPOINT   folder for checkpoints, on storage that all nodes share; if it holds a checkpoint,
#                training resumes from there
#   NPROC        processes on this node, one per GPU                             (1)
#   NNODES       nodes; with several, each also needs NODE_RANK and MASTER_ADDR  (1)
#   MASTER_PORT  port of the first node, with several nodes                      (29500)
#   PYTHON       interpreter                                                     (python)
#
# A document is one document of the .idx file; no token marks its end. Run the script once on every
# node, each with its own NODE_RANK. DATA_PATH must be readable on every node. With Slurm (not run):
#
#   export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
#   srun --ntasks-per-node 1 bash -c 'NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID NPROC=8 \
#       examples/pretrain_emo.sh --num-layers 16 ...'
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
    nodes=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?must be the index of this node, from 0}")
    nodes+=(--master-addr "${MASTER_ADDR:?must be the address of the first node}")
    nodes+=(--master-port "${MASTER_PORT:-29500}")
fi

# Megatron asserts the value 1 with tensor or context parallelism before Blackwell. Its FSDP needs a
# larger value.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

exec "${PYTHON:-python}" -m torch.distributed.run --nproc-per-node "${NPROC:-1}" "${nodes[@]}" \
    "$(dirname "${BASH_SOURCE[0]}")/pretrain_emo.py" "${inputs[@]}" "$@"
