"""Stand-ins that let Megatron-Bridge be imported where Transformer Engine, ModelOpt and other GPU packages are missing.

They answer Bridge alone and only while the block runs: Megatron-Core, transformers and others go on seeing that those
packages are not there. Whatever of them is called, not just named, is an error.
"""

from __future__ import annotations

import abc
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

PACKAGES = (
    *("transformer_engine", "transformer_engine_torch", "modelopt", "nvidia_resiliency_ext"),
    *("nvdlfw_inspect", "flashinfer", "fla", "fast_hadamard_transform", "megatron.energon"),
    *("diffusers", "webdataset", "torchvision", "qwen_vl_utils", "mistral_common", "timm"),
    *("open_clip", "wandb", "mlflow", "comet_ml", "nemo_run", "librosa", "imageio", "av"),
    *("decord", "soundfile", "easydict", "ftfy", "einops", "datasets", "peft", "accelerate"),
)
ASKED_FOR_POLITELY = "nvidia_resiliency_ext.checkpointing"
"""Bridge goes on without it."""


class _Named(abc.ABCMeta):
    """The class of stand-ins: they have every attribute, decorate anything and can be bases."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return _Named(name, (StandIn,), {"__module__": cls.__module__})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and callable(args[0]) and not isinstance(args[0], _Named):
            return args[0]
        if kwargs and not args:
            return lambda decorated: decorated
        return super().__call__(*args, **kwargs)


class StandIn(metaclass=_Named):
    """What stands for every class and function of a missing package."""

    def __class_getitem__(cls, _: Any) -> Any:
        return cls

    def __init__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError(f"{type(self).__name__} is of a package that is not installed")


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        value = _Named(name, (StandIn,), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _no(*_: Any, **__: Any) -> bool:
    return False


class _NoState:
    has_state_for_mode_type = is_converted = staticmethod(_no)


CALLED = {
    "modelopt.torch.distill.plugins.megatron": {"get_tensor_shapes_adjust_fn_for_distillation": _nothing},
    "modelopt.torch.opt.plugins": dict.fromkeys(
        (
            "save_modelopt_state",
            "save_sharded_modelopt_state",
            "restore_modelopt_state",
            "restore_sharded_modelopt_state",
        ),
        _nothing,
    ),
    "modelopt.torch.opt": {"ModeloptStateManager": _NoState},
    "modelopt.torch.quantization.utils": {"is_quantized": _no},
    "modelopt.torch.utils": {"unwrap_model": lambda model, *_, **__: model},
}
"""What Bridge calls in every run; without ModelOpt there is nothing to do."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages
        self.given: set[str] = set()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        is_missing = any(fullname == p or fullname.startswith(p + ".") for p in self.packages)
        if not is_missing or fullname.startswith(ASKED_FOR_POLITELY):
            return None
        asking = _asking_module()
        if not asking.startswith("megatron.bridge") and asking not in self.given:
            return None
        self.given.add(fullname)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> Any:
        return _Module(spec.name)

    def exec_module(self, module: Any) -> None:
        module.__path__ = []
        vars(module).update(CALLED.get(module.__name__, {}))


def _asking_module() -> str:
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("importlib", "_frozen_importlib", __name__)):
            return str(name)
        frame = frame.f_back
    return ""


def _is_missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except (ImportError, ValueError):
        return True


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Let this process import Bridge in the block."""
    # Megatron-Core looks at import whether Transformer Engine is there
    import megatron.core.extensions.transformer_engine  # noqa: F401

    finder = _Finder(tuple(filter(_is_missing, PACKAGES)))
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.given:
            sys.modules.pop(name, None)
