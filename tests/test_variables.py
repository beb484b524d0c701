"""Processes of this package inherit no other job's variables, and keep what the machine and its user say."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch.distributed
from support.other_jobs import OTHER_JOB, PYTHON

from emo_megatron.variables import ALONE, as_no_other_job, process_environment, without_other_jobs

MACHINE = {
    "NCCL_SOCKET_IFNAME": "eth0",
    "NCCL_IB_HCA": "mlx5",
    "NCCL_DEBUG": "INFO",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
    "UCX_NET_DEVICES": "mlx5_0:1",
    "CUDA_VISIBLE_DEVICES": "3",
    "CUDA_DEVICE_MAX_CONNECTIONS": "8",
    "OMP_NUM_THREADS": "4",
    "NVTE_FLASH_ATTN": "0",
    "MEGATRON_LOGGING_LEVEL": "20",
    "EMO_OPS": "reference",
    "HF_HOME": "/models",
    "PYTHONWARNINGS": "default",
}


@pytest.fixture
def around(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(OTHER_JOB | PYTHON | MACHINE))


def test_a_process_sees_nothing_of_another_job(around):
    environment = process_environment()
    others = OTHER_JOB | PYTHON
    assert [name for name, value in others.items() if environment.get(name) == value] == []
    assert environment.keys() & others.keys() == ALONE.keys()


def test_what_is_said_of_the_machine_stays(around):
    assert process_environment().items() >= MACHINE.items()


def test_no_variable_of_torch_distributed_is_undecided():
    decided = re.compile(
        # what the machine is like, how memory is used, and what is logged
        "CUDA_.*|NCCL_.*|TORCH_NCCL_.*|NVSHMEM_LIB_DIR|ROCM_PATH|ROCSHMEM_LIB_DIR|OMP_NUM_THREADS"
        "|MKL_.*|PYTORCH_NO_CUDA_MEMORY_CACHING|TORCH_SYMMMEM_.*|DCP_DISABLE_.*"
        "|TORCH_DISTRIBUTED_DEBUG|TORCH_FR_.*|FR_.*"
    )
    folder = Path(torch.distributed.__file__).parent
    read = re.compile(r"""(?:environ(?:\.get|\.setdefault)?|getenv)[\[(]\s*["']([A-Z][A-Z0-9_]+)["']""")
    names = {name for file in folder.rglob("*.py") for name in read.findall(file.read_text())}
    assert {"RANK", "LOGLEVEL", "PYTHON_EXEC"} <= names
    kept = without_other_jobs(dict.fromkeys(names, "")).keys()
    assert [name for name in kept if not decided.fullmatch(name)] == []


def test_a_group_of_this_process_alone_is_no_other_job_either(monkeypatch):
    for name, value in (OTHER_JOB | MACHINE).items():
        monkeypatch.setenv(name, value)
    with as_no_other_job():
        assert os.environ.keys() & OTHER_JOB.keys() == set()
        assert os.environ.items() >= MACHINE.items()
    assert os.environ.items() >= (OTHER_JOB | MACHINE).items()
