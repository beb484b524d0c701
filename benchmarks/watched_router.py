"""Routers with expert bias whose choices are recorded in every step, and in which one expert is made to die."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

DEAD_LOGIT = -6.0
RECENT = 10
"""Steps over which the share is averaged, and in which an expert that is said to be in no pool was in none."""
HALF_SHARE = "half its share"
EVENTS = ("in a pool", "first token", HALF_SHARE)


class Watched:
    """What a layer's router did in the last step, and when its dead expert was first taken."""

    def __init__(self, router: Any) -> None:
        self.router = router
        self.dead = -1
        self.first: dict[str, int] = {}
        self.at_death: dict[str, Any] = {}
        self._in_pools: deque[Tensor] = deque(maxlen=RECENT)
        self._loads: deque[Tensor] = deque(maxlen=RECENT)
        self._hidden: deque[Tensor] = deque(maxlen=RECENT)
        router.register_forward_hook(self._routed)

    def _routed(self, router: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        self._hidden.append(inputs[0].detach().flatten(0, -2))
        self._loads.append(output[1].sum(dim=0))
        pool_DE = router.scope.pools.get(router.layer_number)
        if pool_DE is not None:
            self._in_pools.append(pool_DE.any(dim=0))

    def kill(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the most used expert lose every choice from now on."""
        weight_EH = self.router.weight
        self.dead = int(self._recent_load_E().argmax())
        hidden_TH = torch.cat(tuple(self._hidden))
        target_T1 = torch.full((len(hidden_TH), 1), DEAD_LOGIT)
        row_H1 = torch.linalg.lstsq(hidden_TH, target_T1, driver="gelsd").solution
        with torch.no_grad():
            weight_EH[self.dead] = row_H1[:, 0]
            self.router.expert_bias[self.dead] = 0.0
        # Adam's moments would keep changing the row for some steps
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[weight_EH][moment][self.dead] = 0.0
        self.at_death = self._state("at death")
        self._loads.clear()

    def note(self, step: int, *, even_share: float) -> None:
        """Store the step of the first occurrence of each event."""
        load = float(self._recent_load_E()[self.dead])
        happened = {
            "in a pool": bool(self._in_pools and self._in_pools[-1][self.dead]),
            "first token": load > 0,
            # mean over RECENT steps, because one batch may hold much text of one kind
            HALF_SHARE: len(self._loads) == RECENT and load >= even_share / 2,
        }
        for name, is_now in happened.items():
            if is_now:
                self.first.setdefault(name, step)

    def _recent_load_E(self) -> Tensor:
        """[E], choices per step, mean over the last steps."""
        return torch.stack(tuple(self._loads)).double().mean(dim=0)

    def row(self) -> dict[str, Any]:
        """A row of the table, without the columns for the run."""
        events = {name: self.first.get(name, "") for name in EVENTS}
        place = {"layer": self.router.layer_number, "expert": self.dead}
        return place | events | self.at_death | self._state("at end")

    def _state(self, when: str) -> dict[str, Any]:
        """The dead expert's mean gate and bias, and the number of experts in no recent pool."""
        gate_T = (self._hidden[-1] @ self.router.weight[self.dead].detach()).sigmoid()
        in_no_pool = ""
        if self._in_pools:
            in_no_pool = str(int((~torch.stack(tuple(self._in_pools)).any(dim=0)).sum()))
        return {
            f"gate {when}": round(float(gate_T.mean()), 3),
            f"bias {when}": round(float(self.router.expert_bias[self.dead]), 3),
            f"experts in no pool {when}": in_no_pool,
        }
