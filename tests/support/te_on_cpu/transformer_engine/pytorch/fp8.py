"""Names that Megatron imports; there is no FP8."""

import contextlib


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled():
        return False


def _none(*_, enabled=False, **__):
    if enabled:
        raise RuntimeError("this stand-in for Transformer Engine has no FP8")
    return contextlib.nullcontext()


fp8_autocast = fp8_model_init = _none
