"""Parameters that bring their own optimizer options get them, and schedulers anneal them from their own start."""

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

from ssmvision.engine.parameter_groups import separate_own_groups
from ssmvision.layers import S5Encoder


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lookahead_adamw"])
def test_own_options_hold(opt):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), S5Encoder(4, 2, d_state=8))
    optimizer = create_optimizer_v2(model, opt, lr=0.1, weight_decay=0.05)
    separate_own_groups(optimizer)
    options = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(options) == sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        own = name.rpartition(".")[2] in ("Lambda_re", "Lambda_im", "B", "log_step")
        assert options[id(p)] == ((1e-3, 0.0) if own else (0.1, 0.0 if p.ndim <= 1 else 0.05)), name

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(2, 5, 4)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_schedules_start_from_each_learning_rate():
    model = S5Encoder(4, 1, d_state=8)
    optimizer = create_optimizer_v2(model, "adamw", lr=0.1)
    separate_own_groups(optimizer)
    CosineLRScheduler(optimizer, t_initial=10).step(5)
    assert sorted({round(g["lr"], 6) for g in optimizer.param_groups}) == [5e-4, 0.05]


def test_groups_without_options_stay():
    optimizer = create_optimizer_v2(torch.nn.Linear(3, 2), "adamw", lr=0.1, weight_decay=0.05)
    before = [dict(g) for g in optimizer.param_groups]
    separate_own_groups(optimizer)
    assert optimizer.param_groups == before
