"""The command env: what a bug report needs to know of this machine."""

from __future__ import annotations

from dataclasses import dataclass

from emo_megatron.environment import collect_environment, format_text
from emo_megatron.files import say
from emo_megatron.json_files import to_json


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print versions, op backends, GPUs and what is supported: paste it into a bug report."""

    json: bool = False
    """Print JSON instead of text."""


def run(options: Options) -> None:
    """Print the report."""
    report = collect_environment()
    say(to_json(report, indent=2) if options.json else format_text(report))
