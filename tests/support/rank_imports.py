"""What every rank imports, once, in the process that they are forked from."""

import torch

from emo_megatron.mcore import cpu

torch.set_num_threads(1)
cpu.activate()

# a run's first tokenizer would import it, and transformers with it
import megatron.core.tokenizers.text  # noqa: E402
import megatron.training  # noqa: E402, F401
from torch.utils import tensorboard  # noqa: E402, F401

from emo_megatron.mcore import metrics, resume, spec, train  # noqa: E402, F401
from emo_megatron.ops import why_not_native  # noqa: E402
from emo_megatron.runners import start  # noqa: E402, F401
from support import forked_writers  # noqa: E402, F401

# loads the compiled ops, where they are
why_not_native("cpu")
