"""`transformer_engine.common`: the recipe that Megatron subclasses; nothing here can be used."""

from types import SimpleNamespace


class DelayedScaling:
    def __init__(self, *_, **__):
        raise RuntimeError("this stand-in for Transformer Engine has no FP8")


recipe = SimpleNamespace(DelayedScaling=DelayedScaling)
