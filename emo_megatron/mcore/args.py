"""The method's flags in Megatron's parser, and the check of everything asked for before anything is built."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from emo_megatron.config import PoolConfig, flag
from emo_megatron.mcore.compat import repair_help
from emo_megatron.mcore.refusals import CONFIG_REFUSALS, SCRIPT_REFUSALS, Refusal


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
    return parser


def pool_config_from_args(args: argparse.Namespace) -> PoolConfig:
    """The PoolConfig the flags describe.

    Raises:
        ValueError: naming every problem of the flags.
    """
    return PoolConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(PoolConfig)})


def check_run(pool: PoolConfig, config: TransformerConfig, args: argparse.Namespace) -> None:
    """Refuse what this package would do wrong or silently not do, all of it in one error.

    Args:
        pool: the method.
        config: Megatron's configuration of the model.
        args: Megatron's parsed flags of a `pretrain_emo.py` run.

    Raises:
        ValueError: one line a problem: what must hold, what came, why.
    """
    problems = problems_with_config(pool, config) + _problems(SCRIPT_REFUSALS, args, pool)
    if pool.is_on and not getattr(args, "dataloader_inter_document_masking", False):
        problems.append(
            "--dataloader-inter-document-masking must be given with --pool-min: pools follow document boundaries"
        )
    if problems:
        raise ValueError("this run cannot start:\n" + "\n".join(f"  - {p}" for p in problems))


def problems_with_config(pool: PoolConfig, config: TransformerConfig) -> list[str]:
    """What a model of this configuration cannot do with the pool layers, one sentence each."""
    if not config.num_moe_experts:
        return ["--num-experts must be given: the pool layers are mixture-of-experts layers"]
    problems = pool.problems_with_model(
        num_experts=config.num_moe_experts, top_k=config.moe_router_topk
    )
    return problems + _problems(CONFIG_REFUSALS, config, pool)


def _problems(refusals: Sequence[Refusal], values: Any, pool: PoolConfig) -> list[str]:
    return [
        refusal.message(getattr(values, refusal.field))
        for refusal in refusals
        if hasattr(values, refusal.field)
        and (pool.is_on or not refusal.only_with_pools)
        and not refusal.allows(getattr(values, refusal.field))
    ]


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
