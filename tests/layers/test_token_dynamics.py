"""Definite input-output matrices, and tokens in the order of their importance."""

import pytest
import torch
from torch import nn

from ssmvision import create_model
from ssmvision.layers import SS2D, BiMamba, ImportanceOrder, Mamba, MambaVisionMixer, TriMamba, constrain_input_output
from ssmvision.layers.token_dynamics import input_output_eigenvalues, scan_projections, soft_sort


def eigenvalues(layer):
    """Of every branch, from the weights that its forward pass reads."""
    r = layer.dt_rank
    found = []
    for weight in scan_projections(layer):
        S_B, S_C = weight.detach()[r:].chunk(2)
        found.append(input_output_eigenvalues(S_B, S_C))
    return found


@pytest.mark.parametrize(("n", "d"), [(3, 10), (4, 6), (1, 5)])
def test_eigenvalues_are_those_of_the_whole_matrix(n, d):
    torch.manual_seed(0)
    S_B, S_C = torch.randn(2, n, d).double()
    m = S_C.T @ S_B
    wanted = torch.linalg.eigvalsh((m + m.T) / 2)
    found = input_output_eigenvalues(S_B, S_C)
    assert found.shape == (min(2 * n, d),)
    # What is left out is zero, as its rank is at most 2n.
    wanted = wanted[wanted.abs().argsort()[d - len(found) :]].sort().values
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("make", [Mamba, BiMamba])
def test_the_sign_survives_training(make, sign):
    torch.manual_seed(0)
    layer = make(8, d_state=3, input_output="positive" if sign > 0 else "negative")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    before = eigenvalues(layer)
    for _ in range(5):
        x = torch.randn(4, 9, 8)
        optimizer.zero_grad()
        (layer(x) - x.flip(1)).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
        optimizer.step()
    for found, start in zip(eigenvalues(layer), before, strict=True):
        found = sign * found
        assert (found >= 0).all()
        assert (found > 1e-3).sum() == 3, "positive definite on the three rows of S_B"
        assert not torch.allclose(found, sign * start, rtol=0.1), "nothing was learned"


def test_free_matrices_are_indefinite():
    torch.manual_seed(0)
    (found,) = eigenvalues(Mamba(8, d_state=3))
    assert found.min() < 0 < found.max()


def test_a_layer_is_constrained_after_training():
    torch.manual_seed(0)
    free = BiMamba(8, d_state=3)
    same = BiMamba(8, d_state=3)
    weights = free.state_dict()
    rows = {name: free.get_submodule(name).weight.detach().clone() for name in ("x_proj", "x_proj_b")}
    for name, weight in rows.items():
        weights[f"{name}.weight"] = torch.cat([weight[:4], weight[1:4]])  # r = 1
    same.load_state_dict(weights)
    assert constrain_input_output(free) == 2
    assert all(torch.equal(free.get_submodule(name).rows, weight[:4]) for name, weight in rows.items())
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(free(x), same(x))


def test_whole_models_are_constrained():
    assert constrain_input_output(create_model("test_vim"), "negative") == 8
    assert constrain_input_output(TriMamba(8, nslices=3)) == 3
    mixer = MambaVisionMixer(8, d_state=3)
    constrain_input_output(mixer)
    mixer(torch.randn(2, 9, 8)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in mixer.parameters())
    assert min(eigenvalues(mixer)[0]) >= 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Mamba(8, input_output="definite"), "input_output must be one of free, positive, negative, not 'defin"),
        (lambda: constrain_input_output(Mamba(8), "free"), "must be 'positive' or 'negative', not 'free'"),
        (lambda: constrain_input_output(SS2D(8)), "SS2D has no linear x_proj to constrain"),
        (lambda: ImportanceOrder(8, nn.Identity(), tau=0), "tau must be positive, not 0"),
    ],
)
def test_errors_name_the_rule_and_the_value(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_soft_sort_becomes_a_permutation():
    torch.manual_seed(0)
    scores = torch.randn(3, 7)
    for tau in (1.0, 1e-4):
        torch.testing.assert_close(soft_sort(scores, tau).sum(2), torch.ones(3, 7))
    exact = soft_sort(scores, 1e-4)
    torch.testing.assert_close((exact @ scores.unsqueeze(2)).squeeze(2), scores.sort(dim=1).values)
    assert soft_sort(scores, 1.0).amax(2).max() < 0.9
    assert set(exact.unique().tolist()) == {0.0, 1.0}


def ordered(**kwargs):
    torch.manual_seed(0)
    return ImportanceOrder(8, Mamba(8, d_state=3), **kwargs), torch.randn(2, 9, 8)


@pytest.mark.parametrize("hard", [True, False])
def test_order_learns_with_its_mixer(hard):
    layer, x = ordered(hard=hard)
    layer(x).square().sum().backward()
    assert not [name for name, p in layer.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    before = layer.score.weight.detach().clone()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert not torch.equal(layer.score.weight, before)


def test_equal_scores_leave_the_order():
    layer, x = ordered()
    nn.init.zeros_(layer.score.weight)
    assert torch.equal(layer(x), layer.mixer(x))


def test_the_mixer_sees_the_least_important_first_and_places_come_back():
    layer, x = ordered()
    seen = []
    layer.mixer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    y = layer(x)
    scores = layer.score(seen[0]).squeeze(2)
    assert (scores.diff(dim=1) >= 0).all()
    # The order of the input does not matter any more, as far as the mixer is concerned.
    moved = torch.randperm(9)
    torch.testing.assert_close(layer(x[:, moved]), y[:, moved])
    assert not torch.allclose(layer.mixer(x[:, moved]), layer.mixer(x)[:, moved], atol=1e-3)


def test_soft_order_is_the_hard_one_without_temperature():
    layer, x = ordered()
    soft, _ = ordered(hard=False, tau=1e-5)
    torch.testing.assert_close(soft(x), layer(x))
    assert not torch.allclose(ordered(hard=False)[0](x), layer(x), atol=1e-3)


@pytest.mark.parametrize("options", [{"input_output": "positive"}, {"importance_order": True}])
def test_vim_has_them_as_arguments(options):
    torch.manual_seed(0)
    model = create_model("test_vim", img_size=32, num_classes=3, **options)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    scripted = torch.jit.script(model.eval())
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(scripted(x), model(x))


def test_a_constrained_vim_is_made_on_the_meta_device():
    model = create_model("test_vim", img_size=32, input_output="positive", device="meta").to_empty(device="cpu")
    for p in model.parameters():
        nn.init.constant_(p, torch.nan)
    model.init_weights()
    assert not [name for name, p in model.named_parameters() if name.endswith("rows") and not p.isfinite().all()]
