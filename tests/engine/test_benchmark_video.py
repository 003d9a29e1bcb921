"""The measurements of ConvS5 compare what they say they compare."""

import pytest
import torch

from ssmvision.engine.benchmark import video


def test_the_same_sizes_are_compared() -> None:
    models = video.predictors()
    codecs = {
        tuple((key, v.shape) for key, v in model.state_dict().items() if key.startswith(("encoder", "decoder")))
        for model in models.values()
    }
    assert len(codecs) == 1
    cached, uncached = models["Transformer"], models["Transformer, no cache"]
    clip = torch.rand(1, 3, 1, 32, 32)
    assert (cached.sequence_model.kv_cache, uncached.sequence_model.kv_cache) == (True, False)
    torch.testing.assert_close(cached.eval()(clip), uncached.eval()(clip))


def test_states_grow_only_where_tokens_are_kept() -> None:
    found = video.state_bytes((4, 8))
    assert {name for name, at in found.items() if at[8] > at[4]} == {"Transformer", "Transformer, no cache"}
    assert found["ConvS5"][8] == 2 * 16 * 8 * 8 * 8  # layers, states, pixels, bytes of a complex number


def test_every_figure_is_measured() -> None:
    generated = video.generation((2, 4), repeats=1)
    assert len(generated) == 8
    assert all(set(by) == {2, 4} and min(by.values()) > 0 for by in generated.values())
    trained = video.training(3, repeats=1)
    assert all(min(figures.values()) > 0 for figures in trained.values())
    assert trained["ConvS5"]["flop"] == pytest.approx(trained["ConvLSTM"]["flop"], rel=0.2)
    assert min(video.packed_clips(repeats=1).values()) > 0
