"""What PlainMamba promises beyond the golden case."""

import pytest
import torch
import torch.nn.functional as F

import ssmvision
from ssmvision.layers.plain_mamba import PlainMambaMixer, continuous_routes, moves
from ssmvision.models.plainmamba import from_official

OFFICIAL = dict(
    img_size=(40, 72), embed_dims=16, num_layers=2, num_convs_patch_embed=2, layers_with_dwconv=[1], patch_size=8,
    num_classes=5, layer_cfgs=dict(use_rms_norm=True, mamba_cfg=dict(d_state=4, expand=1, conv_size=3, bias=False)),
)  # fmt: skip


def test_the_move_into_each_step() -> None:
    grid = [2, 3]
    assert moves(continuous_routes(torch.empty(1), grid), grid).tolist() == [
        [0, 1, 1, 4, 2, 2],
        [0, 1, 1, 3, 2, 2],
        [0, 4, 1, 3, 1, 4],
        [0, 3, 2, 4, 2, 3],
    ]


def test_only_tokens_follow_the_routes() -> None:
    """The mixer against its recurrence, step by step."""
    torch.manual_seed(0)
    mixer, grid, x = PlainMambaMixer(4, d_state=2, d_conv=3).double(), [2, 3], torch.randn(1, 6, 4).double()
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    u = F.silu(mixer.conv2d(u.transpose(1, 2).reshape(1, 8, 2, 3))).flatten(2)[0].T
    low, b, c = mixer.x_proj(u).split([mixer.dt_rank, 2, 2], dim=-1)
    step = F.softplus(mixer.dt_proj(low) + mixer.dt_proj.bias)
    y = torch.zeros_like(u)
    stack = continuous_routes(x, grid)
    for route, codes in zip(stack, moves(stack, grid), strict=True):
        h = torch.zeros(8, 2, dtype=torch.float64)
        for t, token in enumerate(route.tolist()):
            drive = (step[t] * u[token]).outer(b[t] + mixer.direction_Bs[codes[t]])
            h = torch.exp(-step[t, :, None] * mixer.A_log.exp()) * h + drive
            y[token] += h @ c[t] + mixer.D * u[token]
    torch.testing.assert_close(mixer(x, grid), mixer.out_proj(y * F.silu(z[0])).unsqueeze(0))


def test_other_configurations_of_the_official_class_are_built() -> None:
    model = from_official("PlainMamba", OFFICIAL).model.eval()
    assert model(torch.randn(1, 3, 40, 72)).shape == (1, 5)
    assert model(torch.randn(1, 3, 33, 50)).isfinite().all()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes["pos_embed"] == (1, 45, 16)
    assert shapes["patch_embed.convs.3.weight"] == (64, 64, 3, 3)
    assert shapes["layers.1.dw.0.weight"] == (16, 1, 3, 3)
    assert shapes["layers.0.mixer.conv2d.weight"] == (16, 1, 3, 3)
    assert not {"layers.0.dw.0.weight", "layers.0.norm.bias", "layers.0.mixer.in_proj.bias"} & set(shapes)


def test_what_was_never_published_is_refused() -> None:
    with pytest.raises(ValueError, match="final_norm=False was never published"):
        from_official("PlainMamba", OFFICIAL | {"final_norm": False})
    with pytest.raises(ValueError, match="patch_size must be even, not 7"):
        ssmvision.create_model("test_plainmamba", patch_size=7)
