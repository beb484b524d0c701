#!/usr/bin/env bash
# What needs a GPU, in stages of at most nine minutes, on a machine that has one. Nothing comes from a network.
#
#     benchmarks/gpu.sh A --wheels FOLDER            does it run, is it right, how fast are the kernels
#     benchmarks/gpu.sh B --wheels FOLDER            a layer and a model, with pools and without
#     benchmarks/gpu.sh C standard|emo|small ...     one model of the comparison of modules; --corpus FILE brings the text
#
# Looks for Python 3.12 or later with torch (PYTHON=... names one) and hands over to benchmarks/gpu/run.py; --help says more.
here=$(dirname "${BASH_SOURCE[0]}")
works='import importlib.util, sys; sys.exit(sys.version_info < (3, 12) or importlib.util.find_spec("torch") is None)'
for python in ${PYTHON:-"$here/../.venv/bin/python" python3 python python3.12 python3.13}; do
    if "$python" -c "$works" >/dev/null 2>&1; then
        exec "$python" "$here/gpu/run.py" "$@"
    fi
done
echo "error: ${PYTHON:-none of .venv, python3, python, python3.12 and python3.13} is ${PYTHON:+not }a Python of at least 3.12 with torch: install torch, or set PYTHON to one that has it" >&2
exit 2
