"""Names that Megatron imports, without what they do: there are no random states and no recompute here."""


class CudaRNGStatesTracker:
    def __init__(self):
        raise RuntimeError("this stand-in for Transformer Engine has no random states")


def _missing(*_, **__):
    raise RuntimeError("this stand-in for Transformer Engine has no recompute")


activation_recompute_forward = checkpoint = is_fp8_activation_recompute_enabled = _missing
