"""A step that the host runs again draws the same pools and counts once; dropped tokens end a run that it does not."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from megatron.core import rerun_state_machine as host
from megatron.core.transformer.moe.paged_stash import PagedStashRunner
from support import hybridep, training
from support.training import Case

from emo_megatron.mcore.context import CLOCK
from emo_megatron.mcore.metrics import install_metrics
from emo_megatron.mcore.reruns import Runs, follow_reruns, raise_over_budget
from emo_megatron.mcore.router import PoolRouter

ROUTING = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.1,
}
CASE = Case(mbs=2, accumulation=2, balance="running", config=ROUTING)


@hybridep.stand_in()
def _step(rerun):
    """What a step leaves behind: pools of every run, gradients, expert bias, what is logged."""
    flex = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"}
    case = dataclasses.replace(CASE, features=flex)
    chunks, _ = training.build(case, seed=1)
    install_metrics(training.pool_config(case), chunks[0].config, has_documents=True)
    routers = [module for module in chunks[0].modules() if isinstance(module, PoolRouter)]
    pools = []
    for router in routers:
        router.register_forward_hook(lambda router, *_: pools.append(router.scope.pools[router.layer_number]))
    logged = {}
    # the step in the middle is run again; those around it are as ever
    for step in range(3):
        CLOCK.consumed_samples = consumed = step * case.accumulation * case.mbs
        chunks[0].zero_grad_buffer()
        pools.clear()
        if step == 1:
            runs = RERUNS[rerun](case, chunks, consumed)
            seen = list(pools)
        else:
            training.forward_backward(case, chunks, consumed=consumed)
        logged[step] = training.report_metrics(case)
    CLOCK.consumed_samples = None
    gradients = {name: p.main_grad.clone() for name, p in chunks[0].named_parameters()}
    bias = [router.expert_bias.clone() for router in routers]
    training.break_cycles(chunks)
    return SimpleNamespace(runs=runs, pools=seen, gradients=gradients, bias=bias, logged=logged)


def _once(case, chunks, consumed):
    training.forward_backward(case, chunks, consumed=consumed)
    return 1


def _by_the_state_machine(case, chunks, consumed):
    """A result that the re-run state machine doubts, and finds again."""
    host.initialize_rerun_state_machine(mode=host.RerunMode.VALIDATE_RESULTS)
    machine = host.get_rerun_state_machine()
    runs = 0
    try:
        while machine.should_run_forward_backward(None):
            chunks[0].zero_grad_buffer()
            training.forward_backward(case, chunks, consumed=consumed)
            runs += 1
            machine.rerun_requested = machine.continue_requested = True
    finally:
        host.destroy_rerun_state_machine()
    return runs


def _by_the_runner(case, chunks, consumed):
    """Buffers that are too small for what HybridEP sends."""
    runs = []

    def run(**_):
        runs.append(training.forward_backward(case, chunks, consumed=consumed))

    def limit(capacity):
        # Megatron wants fused experts of Transformer Engine with it, which a CPU does not run
        config.moe_expert_rank_capacity_factor = capacity
        for layer in runner.moe_layers:
            layer.token_dispatcher._comm_manager.moe_expert_rank_capacity_factor = capacity

    config = chunks[0].config
    runner = PagedStashRunner(config, False, chunks, None, run)
    limit(0.5)
    runner(
        model=chunks,
        data_iterator=None,
        num_microbatches=case.accumulation,
        seq_length=training.SEQ,
        forward_only=False,
    )
    limit(None)
    return len(runs)


RERUNS = {"none": _once, "state machine": _by_the_state_machine, "runner": _by_the_runner}


@pytest.mark.parametrize("rerun", ["state machine", "runner"])
def test_a_step_run_again_draws_the_same_pools_and_counts_once(once, rerun):
    (want,), (found,) = once(1, _step, rerun="none"), once(1, _step, rerun=rerun)
    assert (want.runs, found.runs) == (1, 2)
    first, second = found.pools[: len(want.pools)], found.pools[len(want.pools) :]
    assert all(torch.equal(a, b) for a, b in zip(second, want.pools, strict=True))
    # dropped tokens change what later layers choose by, but not how many they choose
    assert all(torch.equal(a.sum(1), b.sum(1)) for a, b in zip(first, want.pools, strict=True))
    assert found.logged == want.logged
    assert all(torch.equal(a, b) for a, b in zip(found.bias, want.bias, strict=True))
    assert found.gradients.keys() == want.gradients.keys()
    assert all(torch.equal(found.gradients[key], want.gradients[key]) for key in want.gradients)


def _overflow(over):
    """What a rank sees if those of `over` have dropped tokens, how many layers it asked, and what it sees next time."""
    asked = []

    class Dispatcher:
        def __init__(self, is_over):
            self.is_over = torch.tensor([is_over])

        def check_over_budget(self):
            asked.append(self)
            return self.is_over

        def reset_over_budget(self):
            self.is_over.fill_(False)

    def message():
        try:
            raise_over_budget([model])
        except ValueError as error:
            return str(error)
        return None

    rank = torch.distributed.get_rank()
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    router = SimpleNamespace(training=True, runs=Runs())
    # a dispatcher that cannot drop, and a stage without any that can
    model[0].token_dispatcher = object()
    if rank == 0:
        for layer, is_over in ((1, False), (2, rank in over)):
            model[layer].token_dispatcher = Dispatcher(is_over)
            follow_reruns(model[layer].token_dispatcher, router)
    answer = message(), len(asked), message()
    # no run of the same step follows an error
    assert not router.runs.has_ended
    return answer


def test_tokens_dropped_on_one_rank_end_the_run_on_all(ranks):
    assert ranks(2).run(_overflow, over=[]) == [(None, 2, None), (None, 0, None)]
    for message, _, again in ranks(2).run(_overflow, over=[0]):
        assert "--moe-expert-rank-capacity-factor" in message
        assert again is None
