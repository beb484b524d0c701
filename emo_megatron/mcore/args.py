"""The method's flags in Megatron's parser, and the check of everything asked for before anything is built."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
import warnings
from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from emo_megatron.config import PoolConfig, flag
from emo_megatron.mcore.compat import repair_help
from emo_megatron.mcore.refusals import (
    SCRIPT_REFUSALS,
    Refusal,
    problems_of,
    problems_with_config,
)


def add_pool_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add one flag for every PoolConfig field, documented by that field (Megatron's extra_args_provider)."""
    repair_help(parser)
    group = parser.add_argument_group(
        "document pools",
        "EMO: every token of a document chooses its experts inside one pool. Off without --pool-min.",
    )
    types_of = typing.get_type_hints(PoolConfig)
    documentation = _field_documentation()
    for field in dataclasses.fields(PoolConfig):
        options: dict[str, Any] = {"default": field.default, "help": documentation[field.name]}
        kind = _plain_type(types_of[field.name])
        if kind is bool:
            options["action"] = "store_true"
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options["type"] = _none_or(kind)
            options["metavar"] = kind.__name__.upper()
        group.add_argument(flag(field.name), **options)
    group.add_argument(
        "--override-pool-config",
        action="store_true",
        help="Resume a run although the pools it was trained with differ from these.",
    )
    return parser


def pool_config_from_args(args: argparse.Namespace) -> PoolConfig:
    """The PoolConfig the flags describe.

    Raises:
        ValueError: naming every problem of the flags.
    """
    return PoolConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(PoolConfig)})


def check_run(
    pool: PoolConfig,
    config: TransformerConfig,
    args: argparse.Namespace,
    *,
    refusals: Sequence[Refusal] = SCRIPT_REFUSALS,
) -> None:
    """Refuse what this package would do wrong or silently not do, all of it in one error.

    Args:
        pool: the method.
        config: Megatron's configuration of the model.
        args: Megatron's parsed flags.
        refusals: rows on the flags; by default those of `pretrain_emo.py`.

    Raises:
        ValueError: one line a problem: what must hold, what came, why.
    """
    problems = problems_with_config(pool, config) + problems_of(refusals, args, pool)
    packs_rows = args.dataloader_inter_document_masking and args.micro_batch_size > 1
    if packs_rows and args.virtual_pipeline_model_parallel_size is not None:
        problems.append(
            "--micro-batch-size must be 1 with an interleaved pipeline and "
            f"--dataloader-inter-document-masking; got {args.micro_batch_size}: its schedule cannot "
            "carry packed samples"
        )
    if pool.pool_balance == "running" and not args.dataloader_inter_document_masking:
        problems.append(
            "--dataloader-inter-document-masking must be given with --pool-balance running: the step "
            "so far is kept with the documents"
        )
    if pool.is_on and args.dataloader_type != "single":
        warnings.warn(
            f"--dataloader-type {args.dataloader_type}: pool sizes will depend on the number of "
            "data-parallel ranks; with --dataloader-type single they do not",
            stacklevel=2,
        )
    if pool.is_on and not args.dataloader_inter_document_masking:
        problems.append(
            "--dataloader-inter-document-masking must be given with --pool-min: pools follow document boundaries"
        )
    if problems:
        raise ValueError("this run cannot start:\n" + "\n".join(f"  - {p}" for p in problems))


def _field_documentation() -> dict[str, str]:
    """The string under each PoolConfig field, read from the source: one text serves reader and --help."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(PoolConfig)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(text.value, ast.Constant)
            found[field.target.id] = " ".join(str(text.value.value).split()).replace("%", "%%")
    return found


def _plain_type(annotation: Any) -> Any:
    """`int` of `int | None`."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def _none_or(kind: Any) -> Any:
    """An argparse type that reads "none" as None."""

    def parse(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__
    return parse
