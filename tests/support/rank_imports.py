"""What every rank imports, once, in the process that they are forked from."""

import torch

from emo_megatron.mcore import cpu

torch.set_num_threads(1)
cpu.activate()

import megatron.training  # noqa: E402, F401

import emo_megatron.mcore.metrics  # noqa: E402
import emo_megatron.mcore.spec  # noqa: E402, F401
