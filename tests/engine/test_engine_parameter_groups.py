"""Parameters that bring their own optimizer options get them, and schedulers anneal them from their own start."""

import copy
import re
from functools import partial

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

import ssmvision
from ssmvision import layers as L
from ssmvision.engine.parameter_groups import separate_own_groups
from ssmvision.engine.trainer import _optimizer_and_schedule
from ssmvision.layers.s4d import MinimalKernel
from tools.train import build_parser

LAYERS = {
    "S4D": lambda: L.S4D(8),
    "S4DKernel": lambda: L.S4DKernel(8, n_ssm=2, dt_tie=False),
    "S4Kernel": lambda: L.S4Kernel(8),
    "S4Block": lambda: nn.ModuleList([L.S4Block(8, mode=mode) for mode in ("dplr", "s4d", "diag")]),
    "S4Conv": lambda: L.S4Conv(8, channels=2),
    "S4ND": lambda: L.S4ND(8, channels=2),
    "S4Stack": lambda: L.S4Stack(8, 2),
    "S5": lambda: nn.ModuleList([L.S5(8, 16), L.S5(8, 16, bidirectional=True)]),
    "S5Layer": lambda: L.S5Layer(8, d_state=8),
    "S5Encoder": lambda: L.S5Encoder(8, 2, d_state=8),
    "S5Classifier": lambda: L.S5Classifier(3, 8, 2, 2, d_state=8),
    "CompanionSSM": lambda: L.CompanionSSM(8, 8, 4),
    "ClosedLoopSSM": lambda: L.ClosedLoopSSM(8, 8, 4),
    "ShiftSSM": lambda: L.ShiftSSM(8, 8, 4),
    "Mamba": lambda: L.Mamba(8),
    "Mamba2": lambda: L.Mamba2(32, headdim=8, D_has_hdim=True),
    "Mamba3": lambda: L.Mamba3(32, headdim=8),
    "BiMamba": lambda: L.BiMamba(8),
    "TriMamba": lambda: L.TriMamba(8, nslices=2),
    "Hydra": lambda: L.Hydra(32, headdim=8, learnable_init_states=True),
    "SMambaLayer": lambda: L.SMambaLayer(8),
    "LocalMamba": lambda: L.LocalMamba(8, ("h", "w2_flip")),
    "MambaVisionMixer": lambda: L.MambaVisionMixer(8),
    "NonCausalSSD": lambda: L.NonCausalSSD(8, num_heads=2),
    "StructureAwareSSM": lambda: L.StructureAwareSSM(8),
    "SS2D": lambda: L.SS2D(8),
    "AtrousSS2D": lambda: L.AtrousSS2D(8),
    "LocalSS2D": lambda: L.LocalSS2D(8, ("h", "w2_flip")),
    "MultiScaleSS2D": lambda: L.MultiScaleSS2D(8),
    "ScalarSS2D": lambda: L.ScalarSS2D(8, dt_rank=4),
    "GroupedSS2D": lambda: L.GroupedSS2D(32),
    "ModulatedGroupMamba": lambda: L.ModulatedGroupMamba(32),
    "Chimera": lambda: L.Chimera(8, d_state=2),
    "SSM2D": lambda: nn.ModuleList([L.SSM2D(8, 5), L.SSM2D(8, 5, complex_ssm=True)]),
    "ConvS5": lambda: L.ConvS5(32, 16),
    "FSCILNeck": lambda: L.FSCILNeck(8, 8, d_state=4),
    "MambaStack": lambda: L.MambaStack(8, 2),
    "Level": lambda: L.Level(L.MambaStack(8, 1), 3, 8),
    "Hierarchical": lambda: L.Hierarchical(L.Level(L.S4Stack(8, 1), 3, 8), L.Level(L.MambaStack(8, 1), 8, 8), 4),
    "ImportanceOrder": lambda: L.ImportanceOrder(8, L.BiMamba(8)),
    "HierarchicalTemporalMamba": lambda: L.HierarchicalTemporalMamba(8, 2),
    "BidirectionalSpatialMamba": lambda: L.BidirectionalSpatialMamba(8),
    "MotionMambaUNet": lambda: L.MotionMambaUNet(8, 16, 3),
}
STATELESS = {
    "ChannelAttention", "ConvLSTM", "ETFHead", "GatedConv", "MambaLikeLinearAttention", "TiedProjection",
    "constrain_input_output",
}  # fmt: skip
MODELS = {name: partial(ssmvision.create_model, name) for name in ssmvision.list_models("test_*")}
STATELESS_MODELS = {"test_convlstm", "test_mlla", "test_video_transformer"}  # beside the twins that end in "_nossm"
# State matrices, step sizes, initial states and skips under all their names, and vectors that several routes stack; C,
# which reads a state, may be decayed.
STATE = re.compile(
    r"(.*\.)?(A(_[bs])?_log|A_logs|Ds?|D_[bs]|dt_bias|dt_projs_bias|dt_proj(_[bs])?\.bias|couplings|Lambda_(re|im)|B"
    r"|log_step|(log_)?A_(real|imag)|P|inv_dt|log_dt|A(_angle|_radius)?\.A_[1-4]|B_[12]|omega|skip|[abk]|init_states"
    r"|[BC]_bias|conv_bias|out_norm_(weight|bias))"
)
COPIES = {
    "as built": lambda model: model,
    "deepcopy": copy.deepcopy,
    "to_empty": lambda model: copy.deepcopy(model).to("meta").to_empty(device="cpu"),
    "loaded": lambda model: _loaded(copy.deepcopy(model), model.state_dict()),
}


def _loaded(model, weights):
    model.load_state_dict(weights, assign=True)
    return model


def slow_parameters(model):
    """The dynamics of S4 and S5, which have a learning rate of their own."""
    kernels = [m for m in model.modules() if isinstance(m, (L.S4Kernel, L.S4DKernel, MinimalKernel, L.S5))]
    return {p for m in kernels for name, p in m.named_parameters() if name not in ("C", "C1", "C2", "D")}


def assert_states_are_spared(model, has_states):
    """With the optimizer that ssmvision-train makes."""
    args = build_parser().parse_args(["--data-dir", "pictures", "--lr", "0.1", "--weight-decay", "0.05"])
    optimizer, _ = _optimizer_and_schedule(args, model, batches=4)
    options = {p: (g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(options) == sum(len(g["params"]) for g in optimizer.param_groups) == len(trained)
    assert any(map(STATE.fullmatch, trained)) == has_states
    slow = slow_parameters(model)
    for name, p in trained.items():
        lr, decay = options[p]
        assert decay == 0 or not STATE.fullmatch(name), name
        assert lr == (1e-3 if p in slow else 0.1), name
    assert any(decay for _, decay in options.values())


def test_every_layer_is_looked_at():
    assert {*LAYERS} | STATELESS == {*L.__all__}
    assert not {*LAYERS} & STATELESS


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", [*LAYERS, *MODELS])
def test_states_are_not_decayed(name, copied):
    model = {**LAYERS, **MODELS}[name]()
    has_states = name not in STATELESS_MODELS and not name.endswith("_nossm")
    assert_states_are_spared(COPIES[copied](model), has_states)


def optimized(model, opt="adamw"):
    optimizer = create_optimizer_v2(model, opt, lr=0.1, weight_decay=0.05)
    separate_own_groups(optimizer, model)
    return optimizer


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lookahead_adamw"])
def test_own_options_hold(opt):
    model = nn.Sequential(nn.Linear(4, 4), L.S5Encoder(4, 2, d_state=8))
    optimizer = optimized(model, opt)
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
    optimizer = optimized(L.S5Encoder(4, 1, d_state=8))
    CosineLRScheduler(optimizer, t_initial=10).step(5)
    assert sorted({round(g["lr"], 6) for g in optimizer.param_groups}) == [5e-4, 0.05]


def test_layers_may_leave_the_learning_rate_to_the_optimizer():
    assert {g["lr"] for g in optimized(L.S5(4, 8, lr=None)).param_groups} == {0.1}


def test_groups_without_options_stay():
    for model in (nn.Linear(3, 2), ssmvision.create_model("test_vmamba")):
        optimizer = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05)
        before = [dict(g) for g in optimizer.param_groups]
        separate_own_groups(optimizer, model)
        assert optimizer.param_groups == before


def test_marks_of_the_official_codes_count():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    model[0].weight._optim = {"lr": 1e-3, "weight_decay": 0.0}
    model[0].bias._no_weight_decay = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.05)
    separate_own_groups(optimizer, model)
    assert [(g["lr"], g["weight_decay"], g["params"]) for g in optimizer.param_groups] == [
        (1e-3, 0.0, [model[0].weight]), (0.1, 0.0, [model[0].bias]), (0.1, 0.05, [model[1].weight]),
    ]  # fmt: skip


def test_the_outer_of_two_declarations_holds_also_for_shared_parameters():
    inner = L.S4D(4)
    model = nn.Sequential(inner, nn.Sequential(inner))
    model.own_options = {"1.0.D": {"lr": 0.01, "weight_decay": 0.05}}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.05)
    separate_own_groups(optimizer, model)
    (group,) = [g for g in optimizer.param_groups if any(p is inner.D for p in g["params"])]
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.01, 0.05, 1)
