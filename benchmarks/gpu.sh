#!/usr/bin/env bash
# Everything that needs a GPU, in one command on a machine that has one. Nothing comes from a network.
#
#     benchmarks/gpu.sh [RESULTS]          default: benchmarks/results
#
# Builds the compiled ops and a wheel from source, runs every test marked gpu and the tests of the ops and their
# benchmarks on the GPU, and records the kernels' registers and, where ncu, nsys or compute-sanitizer exist, what they say.
# Files are named after the GPU; gpu-NAME.md has one line a step: ok, FAILED, or "not run" with the reason.
#
#     PYTHON      interpreter with torch (default python3, at least 3.12)
#     WHEELS      folder of wheels that this Python lacks, megatron-core's for instance (default benchmarks/wheels);
#                 they are unpacked beside the results, nothing is installed
#     STEP_LIMIT  seconds a step may take (default 600)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

RESULTS=${1:-benchmarks/results}
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-benchmarks/wheels}
STEP_LIMIT=${STEP_LIMIT:-600}
FAILED=0

stop() { echo "error: $1" >&2; exit 2; }
have() { command -v "$1" >/dev/null 2>&1; }

have nvidia-smi || stop "not run: there is no nvidia-smi, so no GPU; this script measures one"
GPU=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
[ -n "$GPU" ] || stop "not run: nvidia-smi lists no GPU"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 12))' || stop "PYTHON=$PYTHON is older than Python 3.12 or missing"
"$PYTHON" -c 'import torch' 2>/dev/null || stop "PYTHON=$PYTHON has no torch: name one that has"

NAME=$(echo "$GPU" | tr '[:upper:]' '[:lower:]' | sed -E 's/[^a-z0-9]+/-/g; s/^-|-$//g')
mkdir -p "$RESULTS" || exit
RESULTS=$(cd "$RESULTS" && pwd)
SUMMARY=$RESULTS/gpu-$NAME.md
LOGS=$RESULTS/gpu-$NAME-logs
SITE=$LOGS/site
rm -rf "$LOGS"
mkdir -p "$LOGS" "$SITE"

export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" EMO_CUDA=1 EMO_DEVICE=cuda PYTHONWARNINGS=ignore
# machine code of this GPU, and what ptxas says of registers and spills
EMO_CUDA_ARCHS=${EMO_CUDA_ARCHS:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)}
export EMO_CUDA_ARCHS NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} -Xptxas -v"

# where setup.py looks for nvcc, in its order: CUDA_HOME/bin, the PATH, /usr/local/cuda/bin. What lies beside it
# (cuobjdump, ncu, nsys, compute-sanitizer) is found too
PATH=${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin

row() { echo "| $1 | $2 | $3 |" | tee -a "$SUMMARY"; }
not_run() { row "$1" "not run" "$2"; }
# step NAME COMMAND...: run it, its output in a log of that name; the last line of the output is the result
step() {
    local name=$1 log start status
    shift
    log=$LOGS/${name// /-}.log
    start=$SECONDS
    timeout "$STEP_LIMIT" "$@" >"$log" 2>&1
    status=$?
    if [ $status -eq 0 ]; then
        row "$name" ok "$((SECONDS - start)) s: $(tail -n 1 "$log" | tr '|' '/' | cut -c 1-160)"
    else
        FAILED=1
        row "$name" FAILED "exit status $status after $((SECONDS - start)) s; see ${log#"$RESULTS"/}"
    fi
    return $status
}
registers() {
    echo "cuobjdump of emo_megatron/_native.so, registers and stack a kernel"
    cuobjdump --dump-resource-usage emo_megatron/_native.so
}
ptxas_registers() { c++filt <"$LOGS/build.log" | grep -E 'Compiling entry|registers|spill' && grep -c registers "$LOGS/build.log"; }
# timeout cannot run a function: a bash that inherits it can
export LOGS
export -f registers ptxas_registers

{
    echo "# $GPU"
    echo
    echo "$(date -u +'%Y-%m-%d %H:%M UTC'), commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo ', with local changes or outside a checkout')"
    echo
    echo "| step | status | |"
    echo "| --- | --- | --- |"
} >"$SUMMARY"

if compgen -G "$WHEELS/*.whl" >/dev/null; then
    step "unpack wheels" "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$SITE" "$WHEELS"/*.whl
else
    not_run "unpack wheels" "no wheels in $WHEELS"
fi
if have nvcc; then
    step build "$PYTHON" setup.py build_ext --inplace --force
    step wheel "$PYTHON" -m pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir "$LOGS" .
elif [ -f emo_megatron/_native.so ]; then
    not_run build "no nvcc; the library that is here is used"
else
    not_run build "no nvcc in CUDA_HOME/bin, on the PATH or in /usr/local/cuda/bin"
fi
step environment "$PYTHON" -m emo_megatron env

if "$PYTHON" -c 'import pytest, hypothesis' 2>/dev/null; then
    step "gpu tests" "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider
    step "routing tests" "$PYTHON" -m pytest -q tests/ops tests/test_balance.py -p no:cacheprovider
else
    not_run "gpu tests" "pytest or hypothesis is not installed; put their wheels into $WHEELS"
    not_run "routing tests" "as above"
fi
step "routing benchmark" "$PYTHON" benchmarks/bench_routing.py --device cuda --output "$RESULTS"
step "permutation benchmark" "$PYTHON" benchmarks/bench_permute.py --device cuda --output "$RESULTS"
step "layer benchmark" "$PYTHON" benchmarks/bench_layer.py --device cuda --output "$RESULTS"

if have cuobjdump; then
    step registers bash -c registers
elif have c++filt && [ -f "$LOGS/build.log" ]; then
    step registers bash -c ptxas_registers
else
    not_run registers "neither cuobjdump nor c++filt here; build.log has what ptxas says"
fi
QUICK=("$PYTHON" benchmarks/bench_routing.py --device cuda --quick --seconds 0.1 --output "$LOGS")
if have ncu; then
    step "ncu profile" ncu --set basic --kernel-name 'regex:document_scores|select_pool|pool_topk' --launch-count 24 --csv --log-file "$LOGS/ncu.csv" "${QUICK[@]}"
else
    not_run "ncu profile" "no ncu"
fi
if have nsys; then
    step "nsys profile" nsys profile --force-overwrite true --stats true --output "$LOGS/nsys" "${QUICK[@]}"
else
    not_run "nsys profile" "no nsys"
fi
if have compute-sanitizer && "$PYTHON" -c 'import pytest' 2>/dev/null; then
    step "memory check" compute-sanitizer --error-exitcode 3 "$PYTHON" -m pytest -q -m gpu tests/ops -p no:cacheprovider
else
    not_run "memory check" "no compute-sanitizer or no pytest"
fi
rm -rf "$SITE"

echo
echo "$SUMMARY"
exit $FAILED
