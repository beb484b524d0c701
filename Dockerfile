# emo_megatron on NVIDIA's PyTorch image, with the torch, Transformer Engine and Apex of that image.
#
#   docker build -t emo_megatron .
#   docker run --gpus all --rm emo_megatron python -m emo_megatron env
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/emo_megatron

# installed only if the image has no megatron.core
ARG MEGATRON_CORE=megatron-core==0.19.2
RUN python -c "import importlib.util as u; assert u.find_spec('megatron.core')" 2>/dev/null \
    || pip install --no-cache-dir --no-deps "${MEGATRON_CORE}"

# requirements of the demo and the tests, except the packages of the image
COPY pyproject.toml .
RUN <<'SCRIPT'
python - >requirements.txt <<'PYTHON'
import re, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
wanted = [*project["dependencies"], *(w for e in ("megatron", "hf", "report", "dev") for w in extras[e])]
owned = {"torch", "numpy", "megatron-core"}
print(*(line for line in wanted if re.match(r"[\w-]+", line).group() not in owned), sep="\n")
PYTHON
pip install --no-cache-dir --requirement requirements.txt
rm requirements.txt
SCRIPT

COPY . .
# compiles csrc/ for GPUs of compute capability 8.0 to 10.0 and later; the building machine needs no GPU
RUN EMO_CUDA=1 pip install --no-cache-dir --no-deps --no-build-isolation --editable .

RUN python -m emo_megatron env && EMO_DEVICE=cpu python -m pytest -m "not slow and not gpu"
