"""The watcher sees every scan, says where it ran, and can run it once more."""

import pytest
import torch
from torch import nn

from ssmvision import create_model
from ssmvision.engine.inspection.scans import watch_scans
from ssmvision.layers import Mamba2


def test_calls_are_named_in_their_order():
    model = create_model("test_mambavision").eval()
    calls = watch_scans(model, torch.randn(1, 3, 64, 64))
    assert [call.layer for call in calls] == ["stages.2.blocks.0.mixer", "stages.2.blocks.1.mixer",
                                              "stages.3.blocks.0.mixer"]  # fmt: skip
    assert all(model.get_submodule(call.layer) is call.module for call in calls)
    assert {call.operator for call in calls} == {"selective_scan"}


def test_the_watched_layer_itself_has_no_name():
    (call,) = watch_scans(Mamba2(8, d_state=4, headdim=4), torch.randn(1, 6, 8))
    assert (call.operator, call.layer) == ("ssd_scan", "")
    assert [*call.arguments] == ["x", "step", "A", "B", "C", "initial_state", "reset", "backend"]


def test_routes_apart_add_up_to_the_scan():
    torch.manual_seed(0)
    for call in watch_scans(create_model("test_vmamba").eval(), torch.randn(1, 3, 64, 64)):
        apart, skip = call.again(D=None, merge=False), call.arguments["D"].sum(0)[:, None] * call.arguments["u"]
        torch.testing.assert_close(apart.sum(1, keepdim=True) + skip, call.again(), rtol=1e-4, atol=1e-5)


class Interrupted(nn.Module):
    def forward(self, x):
        raise KeyboardInterrupt


def test_nothing_stays_behind_what_fails():
    hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    with pytest.raises(KeyboardInterrupt):
        watch_scans(nn.Sequential(Interrupted()), torch.ones(1))
    assert not any(hooks)
    assert nn.Identity()(torch.ones(1)) == 1
