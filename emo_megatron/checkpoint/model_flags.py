"""The flags of a checkpoint that change the function of the model; all commands that build a model read them here.

A model is built from the defaults of Megatron's parser and from the checkpoint's flags in the lists of flag_lists.py.
If a list lacked a flag, another model would be built without an error. Therefore every flag of the groups that describe
models is in one of three lists, and a checkpoint with any other flag of these groups is an error. Flags that the
installed Megatron no longer has are ignored, except OLDER_NAMES.
"""

from __future__ import annotations

import argparse
import copy
from typing import TYPE_CHECKING, Any, NoReturn

from emo_megatron.checkpoint.flag_lists import AS_TRAINED, FUNCTION, NOT_THE_MODEL

if TYPE_CHECKING:
    # reader.py reads checkpoints of Bridge with the parser of this file
    from emo_megatron.checkpoint.reader import MegatronCheckpoint

MODEL_GROUPS = (
    *("transformer configuration", "network size", "tokenizer", "moe", "mla"),
    *("experimental_attention_variant", "heterogeneous architecture"),
    *("experimental", "training", "mixed precision", "Transformer-Engine"),
)
"""Groups of Megatron's parser with flags that describe the model; some flags in these groups describe the run."""

BALANCE_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
"""Values of --moe-router-load-balancing-type that are losses; other values change the choice of experts, also in
evaluation."""
KNOWN_SPECS = ("megatron.core", "emo_megatron.")
"""Packages that the layers of --spec may come from; layers of other packages may compute anything."""
OLDER_NAMES = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}
"""Names that earlier versions of Megatron stored -> present names."""


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises ValueError; argparse's own parser prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """See the class."""
        fail(message)


def fail(message: str) -> NoReturn:
    """Raise ValueError; replaces the method `error` of an existing parser."""
    raise ValueError(message)


def stored_flags(checkpoint: MegatronCheckpoint) -> argparse.Namespace:
    """The flags in a checkpoint, by their present names."""
    args = copy.copy(checkpoint.args)
    for older, name in OLDER_NAMES.items():
        if not hasattr(args, name) and hasattr(args, older):
            setattr(args, name, getattr(args, older))
    return args


def model_flags(
    checkpoint: MegatronCheckpoint, parser: argparse.ArgumentParser, *, as_trained: bool = False
) -> dict[str, Any]:
    """The flags in a checkpoint that define the model, by the names of Megatron's parser.

    With `as_trained`, the flags of AS_TRAINED are included. ValueError for a flag of models that is in no list.
    """
    stored = vars(stored_flags(checkpoint))
    known = FUNCTION | AS_TRAINED | NOT_THE_MODEL
    for action in flags_of_models(parser):
        name = action.dest
        if name not in known and stored.get(name, action.default) != action.default:
            raise ValueError(
                f"{checkpoint.path}: the run had {action.option_strings[0]} {stored[name]!r}, a Megatron flag that may "
                "change the model and that this version of emo_megatron does not support"
            )
    spec = stored.get("spec")
    if spec and not str(spec[0]).startswith(KNOWN_SPECS) and spec[0] != "local":
        raise ValueError(
            f"{checkpoint.path}: the layers of --spec must come from "
            f"{' or '.join(name.strip('.') for name in KNOWN_SPECS)}; the run had --spec {' '.join(map(str, spec))}"
        )
    wanted = FUNCTION | AS_TRAINED if as_trained else FUNCTION
    return {name: value for name, value in stored.items() if name in wanted}


def flags_of_models(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The flags of Megatron's parser in the groups that describe models."""
    return [action for group in parser._action_groups if group.title in MODEL_GROUPS for action in group._group_actions]


def megatron_parser() -> argparse.ArgumentParser:
    """Megatron's own flags."""
    from megatron.training.arguments import add_megatron_arguments

    parser: argparse.ArgumentParser = add_megatron_arguments(OneLineParser(allow_abbrev=False))
    return parser
