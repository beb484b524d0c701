"""Report of this machine's software and GPUs, and of unsupported versions: `python -m emo_megatron env`."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from typing import Any

import emo_megatron

Release = tuple[int, ...]
MISSING = "not installed"

SUPPORTED: dict[str, tuple[Release, Release | None]] = {
    "python": ((3, 12), (3, 14)),
    "torch": ((2, 11), None),
    "megatron-core": ((0, 18), (0, 20)),
    "megatron-bridge": ((0, 6), (0, 7)),
}
"""Package -> its first supported release, and the first later release that is not supported (None: no upper limit)."""

BRIDGE_INSTALL = "see docs/bridge.md, section Requirements"
"""A reference instead of a pip command, because pip cannot resolve all requirements of Megatron-Bridge."""

PACKAGES = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "transformers": "transformers",
    "transformer-engine": "transformer_engine",
    "apex": "apex",
    "nvidia-modelopt": "modelopt",
    "megatron-bridge": "megatron.bridge",
}
"""Distribution name -> the module that it installs."""


def collect_environment() -> dict[str, Any]:
    """Collect the facts about this machine for a bug report. Failures are reported in the result, never raised.

    Returns:
        Plain values, for JSON: emo_megatron; platform; versions (name -> version, supported, is_supported; an empty
        supported range means any version); backends (op backend -> why it is not available, empty if it is available);
        gpus; driver, compiler and nvcc; variables (the environment variables that begin with EMO_).
    """
    versions = {"python": _judge("python", platform.python_version())}
    for distribution, module in PACKAGES.items():
        versions[distribution] = _judge(distribution, _find_version(distribution, module))
    tools = dict.fromkeys(("driver", "compiler", "nvcc"), "not found")
    gpus: list[str] = []
    try:
        import torch
        from torch.utils import collect_env as found

        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        versions["torch"] = _judge("torch", f"{torch.__version__} ({build} build)")
        gpus = [
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
            for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
        questions = (found.get_nvidia_driver_version, found.get_gcc_version, found.get_running_cuda_version)
        for name, ask in zip(tools, questions, strict=True):
            with contextlib.suppress(Exception):
                tools[name] = ask(found.run) or "not found"  # type: ignore[no-untyped-call]
    except ModuleNotFoundError:
        pass
    except Exception as error:
        versions["torch"] = _judge("torch", f"does not load: {error!r}")
    return {
        "emo_megatron": emo_megatron.__version__,
        "platform": platform.platform(),
        "versions": versions,
        "backends": _find_backends(),
        "gpus": gpus,
        **tools,
        "variables": {name: value for name, value in os.environ.items() if name.startswith("EMO_")},
    }


def format_text(report: dict[str, Any]) -> str:
    """Format a report as text, one fact per line."""
    rows = [(name, report[name]) for name in ("emo_megatron", "platform")]
    for name, found in report["versions"].items():
        verdict = "supported" if found["is_supported"] else "NOT SUPPORTED, requires"
        rows.append((name, found["version"] + (f" ({verdict} {found['supported']})" if found["supported"] else "")))
    for name, reason in report["backends"].items():
        rows.append((f"{name} ops", f"not available: {reason}" if reason else "available"))
    rows += [("gpu", gpu) for gpu in report["gpus"] or ("none",)]
    rows += [("driver", report["driver"]), ("gcc", report["compiler"]), ("nvcc", report["nvcc"])]
    rows += sorted(report["variables"].items())
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:{width}}{value}" for name, value in rows)


def _judge(name: str, version: str) -> dict[str, Any]:
    if name not in SUPPORTED:
        return {"version": version, "supported": "", "is_supported": True}
    # Megatron-Bridge is optional
    is_fine = is_supported(name, version) or (name == "megatron-bridge" and version == MISSING)
    return {"version": version, "supported": supported_range(name), "is_supported": is_fine}


def supported_range(name: str) -> str:
    """The supported releases of a package in SUPPORTED, as text."""
    first, end = (".".join(map(str, release or ())) for release in SUPPORTED[name])
    return f">={first}" + (f", <{end}" if end else "")


def is_supported(name: str, version: str) -> bool:
    """Whether a version of a package in SUPPORTED is in the supported range."""
    first, end = SUPPORTED[name]
    # only the leading numbers: '2.11.0a0+git' is (2, 11, 0), so vendors' pre-releases are supported
    numbers = re.match(r"\d+(\.\d+)*", version)
    release = tuple(map(int, numbers.group().split("."))) if numbers else ()
    return release >= first and (end is None or release < end)


def _find_version(distribution: str, module: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pass
    except Exception as error:  # the metadata of a partly removed package is unreadable
        return f"broken metadata: {error!r}"
    try:
        is_found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        is_found = False
    return "importable, version unknown" if is_found else MISSING


def _find_backends() -> dict[str, str]:
    try:
        from emo_megatron.ops import available_backends

        return available_backends()
    except Exception as error:
        return {"reference": f"emo_megatron.ops does not load: {error!r}"}
