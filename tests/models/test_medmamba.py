"""What MedMamba promises beyond the golden case."""

import pytest
import torch

import ssmvision


def make(**kwargs):
    torch.manual_seed(0)
    return ssmvision.create_model("test_medmamba", num_classes=5, **kwargs).eval()


@pytest.mark.parametrize("size", [(32, 32), (33, 57), (65, 40)])
def test_any_size_goes_in(size):
    assert make()(torch.randn(2, 3, *size)).isfinite().all()


def test_an_odd_map_loses_its_last_row_and_column():
    model, x = make(), torch.randn(1, 3, 36, 44)  # maps of 9 x 11
    merge = model.stages[1].downsample
    maps = model.stages[0](model.patch_embed(x))
    torch.testing.assert_close(merge(maps), merge(maps[:, :, :8, :10]))


def test_channels_of_both_halves_alternate():
    block = make().stages[0].blocks[0]
    x = torch.randn(2, 8, 8, 16)
    added = block(x) - x
    convolved = block.conv(x[..., :8].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(added[..., ::2], convolved, rtol=1e-4, atol=1e-5)


def test_an_odd_width_is_refused_by_name():
    with pytest.raises(ValueError, match="MedMamba: dims must be even, not 15"):
        make(dims=15)


def test_weights_are_to_be_fetched_by_hand():
    with pytest.raises(RuntimeError, match=r"get them by hand from https://github\.com/YubiaoYue/MedMamba"):
        ssmvision.create_model("medmamba_tiny", pretrained=True)
