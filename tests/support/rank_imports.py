"""What every rank imports, once, in the process that they are forked from."""

import functools

import torch

from emo_megatron.mcore import cpu

torch.set_num_threads(1)
cpu.activate()

# imports transformers, at a run's first tokenizer
import megatron.core.tokenizers.text  # noqa: E402
import megatron.training  # noqa: E402, F401
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from torch.utils import tensorboard  # noqa: E402, F401

from emo_megatron.mcore import metrics, resume, spec, train  # noqa: E402, F401
from emo_megatron.runners import start  # noqa: E402, F401

# writers of checkpoints are forks too: a new process would import torch
filesystem_async.get_write_results_queue = functools.partial(filesystem_async.get_write_results_queue, "fork")
