"""--log-straggler: Megatron's detector times the batch and the forward pass of every micro-batch."""

from __future__ import annotations

from typing import Any


def _timed() -> list[str]:
    """What happens in two micro-batches, in order, once the detector is on."""
    from unittest import mock

    import torch
    from megatron.core.utils import StragglerDetector

    from emo_megatron.mcore import batches, train

    seen: list[str] = []
    detector: Any = train._STRAGGLERS
    # another detector is the same object, which is off until Megatron configures it
    assert detector is StragglerDetector()

    def start() -> None:
        seen.append("data" if detector.bdata else "forward")
        detector.bdata = False

    def get_batch(*_: Any) -> dict[str, Any]:
        seen.append("get_batch")
        keys = ("tokens", "position_ids", "labels", "loss_mask")
        return dict.fromkeys(batches.BATCH_KEYS) | dict.fromkeys(keys, torch.ones(1))

    def model(*_: Any, **__: Any) -> torch.Tensor:
        seen.append("model")
        return torch.ones(1)

    with (
        mock.patch.multiple(detector, start=start, stop=lambda: seen.append("stop")),
        mock.patch.multiple(
            train,
            get_batch=get_batch,
            get_timers=mock.MagicMock(),
            get_attr_wrapped_model=mock.Mock(),
            get_model_config=mock.Mock(),
        ),
    ):
        for _ in range(2):
            train.forward_step(None, model)
    return seen


def test_batch_and_forward_pass_are_timed(ranks):
    micro_batch = ["data", "get_batch", "stop", "forward", "model", "stop"]
    assert ranks(1).run(_timed)[0] == 2 * micro_batch
