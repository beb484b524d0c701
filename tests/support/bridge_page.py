"""What docs/bridge.md tells to type, done; training itself is left out.

    python -m support.bridge_page FOLDER

Prints JSON: of each Python block what it printed and what the page says it prints, and of each command line what it
would train. Files go into FOLDER.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from support import bridge_recipes  # noqa: F401, imports Bridge
from support.bridge_stand_ins import stand_ins

with stand_ins():
    import megatron.bridge.perf_recipes.qwen.h100.qwen3_moe
    import megatron.bridge.recipes.olmoe
    import megatron.bridge.training.pretrain
    from megatron.bridge import AutoBridge

from torch.distributed.run import parse_args

from emo_megatron import cli
from emo_megatron.bridge import command

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "bridge.md").read_text()
README = (ROOT / "README.md").read_text()


def run_blocks(trained: list[Any]) -> list[dict[str, str]]:
    """Run the page's Python, which may read the run_config.yaml of what it trained before."""
    seen = []
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        if block.startswith("# not tested"):
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(block, {"__name__": "__main__"})
        printed = [line for line in said.getvalue().splitlines() if "emo_megatron:" not in line]
        seen.append({"printed": "\n".join(printed), "page": _comments_at_the_end(block)})
        if trained and not Path("run_config.yaml").exists():
            trained[0].to_yaml("run_config.yaml")
    return seen


def _comments_at_the_end(block: str) -> str:
    told = re.search(r"((?:^# .*\n)*)\Z", block, flags=re.MULTILINE)
    assert told is not None
    return told[1].replace("# ", "").strip()


def run_lines() -> list[dict[str, Any]]:
    """What each command of the page, and of the README for Bridge, would train, by the overrides that reach Bridge."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    blocks += [b for b in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) if "emo_megatron bridge" in b]
    lines = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [_run_line(words) for words in lines]


def _run_line(words: list[str]) -> dict[str, Any]:
    launcher, *rest = words
    if launcher == "torchrun":
        options = parse_args(rest)
        script, arguments = options.training_script, options.training_script_args
    else:
        script, arguments = rest[rest.index("-m") + 1], rest[rest.index("-m") + 2 :]
    seen: dict[str, Any] = {"script": script}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if script == "emo_megatron":
            seen |= _as_command(arguments)
        else:
            seen |= _as_example(ROOT / script, arguments)
    return seen | {"lines": len(said.getvalue().splitlines())}


def _as_command(arguments: list[str]) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def run(recipe: str, overrides: list[str], *, strict: bool) -> None:
        seen["pool_min"] = command.pools_and_others(overrides)[0].pool_min
        seen["recipe"] = command.find_recipe(recipe).__name__
        # others ask a hub
        if recipe.startswith("olmoe"):
            cfg = command.prepare(recipe, overrides, strict=strict)
            seen.update(steps=cfg.train.train_iters, data=cfg.dataset.data_path)
            seen.update(save=cfg.checkpoint.save, load=cfg.checkpoint.load)
            seen["balance"] = [cfg.model.moe_router_load_balancing_type, cfg.model.moe_aux_loss_coeff]

    kept, command.run = command.run, run
    try:
        seen["status"] = cli.main(arguments)
    finally:
        command.run = kept
    return seen


def _as_example(path: Path, arguments: list[str]) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def from_hub(name: str) -> None:
        seen["model"] = name
        raise InterruptedError

    AutoBridge.from_hf_pretrained = from_hub
    seen["pool_min"] = command.pools_and_others([word for word in arguments if "=" in word])[0].pool_min
    sys.argv = [str(path), *arguments]
    with contextlib.suppress(InterruptedError):
        runpy.run_path(str(path), run_name=path.stem)["main"]()
    return seen


def main() -> None:
    """Run all of the page."""
    os.chdir(sys.argv[1])
    trained: list[Any] = []
    megatron.bridge.training.pretrain.pretrain = lambda cfg, step: trained.append(cfg)
    lines = run_lines()
    # support.bridge_example exports a trained model
    exported: list[list[str]] = []
    AutoBridge.from_hf_pretrained = lambda name: mock.Mock(export_ckpt=lambda *to: exported.append([name, *to]))
    blocks = run_blocks(trained)
    providers = [type(cfg.model).__name__ for cfg in trained]
    files = {path.name: path.read_text() for path in Path().glob("*run_config.yaml")}
    print(json.dumps({"blocks": blocks, "lines": lines, "trained": providers, "files": files, "exported": exported}))


if __name__ == "__main__":
    main()
