"""The command env: print what a bug report must say about this machine."""

from __future__ import annotations

from dataclasses import dataclass

from emo_megatron.environment import collect_environment, format_text
from emo_megatron.files import say
from emo_megatron.json_files import to_json


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print versions, the backends of the ops, GPUs and what is supported. Paste the output into a bug report."""

    json: bool = False
    """Print JSON instead of text."""


def run(options: Options) -> None:
    """Print the report."""
    report = collect_environment()
    say(to_json(report, indent=2) if options.json else format_text(report))
