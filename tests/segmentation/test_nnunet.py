"""nnU-Net itself builds, trains and switches our networks from a plans file."""

import json
from copy import deepcopy

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

ARCHITECTURE = {
    "network_class_name": "ssmvision.segmentation.nnunet.umamba_bot",
    "arch_kwargs": {
        "n_stages": 3,
        "features_per_stage": [8, 16, 32],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_blocks_per_stage": [1, 3, 4],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}
PATCH = [4, 16, 8]


def _build(name: str, deep_supervision: bool = True, **changed) -> nn.Module:
    """Through what nnU-Net's trainer calls, from a configuration as it is read from plans.json."""
    architecture = deepcopy(ARCHITECTURE)
    architecture["network_class_name"] = f"ssmvision.segmentation.nnunet.{name}"
    architecture["arch_kwargs"].update(changed)
    plans = json.loads(json.dumps({"patch_size": PATCH, "architecture": architecture}))
    configuration = ConfigurationManager(plans)
    return nnUNetTrainer.build_network_architecture(None, configuration, 2, 3, deep_supervision)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("umamba_bot", {}),
        ("umamba_bot", {"mixer": "none"}),
        ("umamba_enc", {"patch_size": PATCH}),
        ("lkm_unet", {"n_blocks_per_stage": [1, 1, 1], "conv_bias": False}),
    ],
)
def test_one_step_with_deep_supervision_then_without(name, changed):
    torch.manual_seed(0)
    network = _build(name, **changed)
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DeepSupervisionWrapper(DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss), [0.7, 0.3])
    x = torch.randn(2, 2, *PATCH)
    targets = [torch.randint(3, (2, 1, *PATCH)), torch.randint(3, (2, 1, 4, 8, 4))]
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.99, nesterov=True)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(network(x), targets)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]

    network.eval()
    assert [tuple(output.shape[2:]) for output in network(x)] == [tuple(PATCH), (4, 8, 4)]
    network.decoder.deep_supervision = False
    assert network(x).shape == (2, 3, *PATCH)


def test_memory_is_told_to_the_planner():
    network = _build("umamba_bot", n_blocks_per_stage=[1, 1, 1])
    voxels = [4 * 16 * 8, 4 * 8 * 4, 2 * 4 * 2]
    encoder = 3 * (2 * 8 * voxels[0] + 16 * voxels[1] + 32 * voxels[2])  # the stem is a block of its own
    decoder = (1 + 3) * (16 * voxels[1] + 8 * voxels[0]) + 3 * (voxels[0] + voxels[1])
    assert network.compute_conv_feature_map_size(PATCH) == encoder + decoder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}, "InstanceNorm3d"),
        ({"dropout_op": "torch.nn.Dropout3d"}, "dropout_op=None"),
        ({"conv_op": "torch.nn.modules.conv.Conv1d"}, "Conv2d or Conv3d"),
        ({"n_stages": 4}, "n_stages=4"),
        ({"n_blocks_per_stage": None}, "n_blocks_per_stage or n_conv_per_stage"),
        ({"squeeze": True}, "no squeeze"),
    ],
)
def test_what_a_plan_cannot_have(changed, message):
    with pytest.raises(ValueError, match=message):
        _build("umamba_bot", **changed)


def test_enc_needs_the_patch_size():
    with pytest.raises(ValueError, match="planned for one patch_size of 3 axes"):
        _build("umamba_enc")
