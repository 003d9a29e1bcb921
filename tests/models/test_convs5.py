"""ConvS5 and its baselines: official weights, and generation that goes on for ever from a state of constant size."""

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import safetensors.torch
import torch

import ssmvision
from ssmvision.engine.verify import verify_case
from ssmvision.hub import CheckpointError
from ssmvision.models.convs5 import checkpoint_filter_fn, from_official, prediction_loss
from ssmvision.ops import lowered_for_export
from ssmvision_tools import verify

TESTS = Path(__file__).parents[1]
PARITY = TESTS / "parity"
MANIFESTS = sorted((TESTS / "manifests" / "video").glob("*.json"))
CASES = ["ssm_convs5_layer", "ssm_convs5_novq", "ssm_convlstm_novq"]
RECURRENT = ["test_convs5", "test_convlstm"]
TRANSFORMER = "test_video_transformer"


def make(name: str, **kwargs):
    torch.manual_seed(0)
    return ssmvision.create_model(name, **kwargs).eval()


def clip(frames: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, frames, 1, 16, 16) * 2 - 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_official_code_is_matched(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSMVISION_BACKEND", backend)
    result = verify_case(PARITY / case)
    assert set(result.worst) == {"output", "gradient"}
    assert result.ok, str(result)


def edited(case: str, file: str, folder: Path, edit) -> Path:
    copy = Path(shutil.copytree(PARITY / case, folder / case))
    tensors = safetensors.torch.load_file(copy / file)
    edit(tensors)
    safetensors.torch.save_file(tensors, copy / file)
    return copy


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("ssm_convs5_layer", "params/log_step"),
        ("ssm_convs5_novq", "params/sequence_model/layers_1/seq/Lambda_im"),
        ("ssm_convlstm_novq", "params/decoder/ResNetBlock_0/AddBias_0/bias"),
    ],
)
def test_a_wrong_weight_fails(case: str, key: str, tmp_path: Path) -> None:
    copy = edited(case, "ckpt.safetensors", tmp_path, lambda weights: weights[key].add_(0.05))
    assert not verify_case(copy).ok


@pytest.mark.parametrize("key", ["imagined", "last.1", "grad.sequence_model/layers_0/seq/B", "grad_video", "l1_loss"])
def test_every_tensor_of_a_case_is_compared(key: str, tmp_path: Path) -> None:
    copy = edited("ssm_convs5_novq", "io.safetensors", tmp_path, lambda tensors: tensors[key].mul_(1.1))
    assert not verify_case(copy).ok


def test_options_that_no_published_model_has_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(PARITY / "ssm_convs5_novq", tmp_path / "case"))
    meta = json.loads((copy / "meta.json").read_text())
    meta["kwargs"]["seq_model"]["skip_connections"] = True
    (copy / "meta.json").write_text(json.dumps(meta))
    assert verify.main([str(copy)]) == 1
    assert "skip_connections is not built here" in capsys.readouterr().out


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_official_checkpoints_fit_strictly(path: Path) -> None:
    manifest = json.loads(path.read_text())
    model = ssmvision.create_model(path.stem, device="meta")
    official = {key: torch.empty(shape, device="meta") for key, shape in manifest["state_dict"].items()}
    converted, ours = checkpoint_filter_fn(official, model), model.state_dict()
    assert len(official) == len(converted)
    assert {key: v.shape for key, v in converted.items()} == {key: v.shape for key, v in ours.items()}
    assert sum(p.numel() for p in model.parameters()) == manifest["params_total"]
    assert checkpoint_filter_fn(ours, model) == ours, "our own keys must pass unchanged"
    with torch.device("meta"):
        built = from_official(path.stem.partition("_")[0].upper() + "_NOVQ", manifest["config"])
    assert {key: v.shape for key, v in built.state_dict().items()} == {key: v.shape for key, v in ours.items()}


def test_official_weights_load_by_name_and_say_their_licence(tmp_path: Path) -> None:
    official = PARITY / "ssm_convs5_novq" / "ckpt.safetensors"
    arguments = {"d_model": 32, "n_layers": 2, "ssm": {"ssm_size": 16, "ssm_blocks": 2}, "depths": (32, 64)}
    name = "convs5_moving_mnist_train300"
    with pytest.warns(UserWarning, match="forbids commercial use"):
        model = ssmvision.create_model(name, checkpoint_path=official, **arguments)
    tensors = safetensors.torch.load_file(PARITY / "ssm_convs5_novq" / "io.safetensors")
    video = tensors["video"].permute(0, 1, 4, 2, 3)
    recon = model.eval()(video[:, :-1]).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(recon, tensors["recon"], rtol=1e-3, atol=2e-4)
    weights = safetensors.torch.load_file(official)
    del weights["params/decoder/Dense_0/bias"]
    safetensors.torch.save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.head\.bias"):
        ssmvision.create_model(name, checkpoint_path=tmp_path / "less.safetensors", **arguments)
    with pytest.raises(RuntimeError, match="No program can download weights"):
        ssmvision.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", [*RECURRENT, TRANSFORMER])
def test_steps_equal_all_frames_at_once(name: str) -> None:
    model, video = make(name), clip(6)
    whole, state = model(video), None
    for t, frame in enumerate(video.unbind(1)):
        prediction, state = model.step(frame, state)
        torch.testing.assert_close(prediction, whole[:, t], rtol=1e-4, atol=1e-5)
    later = video.clone()
    later[:, 4:] = 0
    torch.testing.assert_close(model(later)[:, :4], whole[:, :4])


@pytest.mark.parametrize("name", RECURRENT)
def test_packed_clips_equal_clips_run_alone(name: str) -> None:
    model, video = make(name), clip(7)
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[:, 3] = True
    alone = torch.cat([model(video[:, :3]), model(video[:, 3:])], dim=1)
    torch.testing.assert_close(model(video, reset=reset), alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(video), alone, atol=1e-4)


def size(state) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel()
    return sum(map(size, state))


@pytest.mark.parametrize("name", RECURRENT)
def test_the_state_of_generation_is_constant(name: str) -> None:
    model, frame = make(name), clip(1)[:, 0]
    _, state = model.step(frame)
    first = size(state)
    assert size(model.condition(clip(20))) == first
    for _ in range(20):
        frame, state = model.step(frame, state)
    assert size(state) == first


def test_generation_feeds_back_what_it_predicts() -> None:
    model, video = make("test_convs5"), clip(4)
    frames = model.generate(video, 3)
    assert frames.shape == (2, 3, 1, 16, 16)
    assert not frames.requires_grad
    assert torch.equal(torch.stack(list(islice(model.stream(video), 3)), dim=1), frames)
    for count in range(3):
        seen = torch.cat([video, frames[:, :count]], dim=1)
        torch.testing.assert_close(model(seen)[:, -1], frames[:, count], rtol=1e-4, atol=1e-5)


def test_there_may_be_nothing_to_generate_but_not_from_nothing() -> None:
    model, video = make("test_convs5"), clip(3)
    assert model.generate(video, 0).shape == (2, 0, 1, 16, 16)
    with pytest.raises(ValueError, match="a video of no frames has none to go on from"):
        model.generate(video[:, :0], 3)


def test_an_exported_program_needs_no_operator_of_ours() -> None:
    model, video = make("test_convs5").eval(), clip(4)
    with torch.no_grad(), lowered_for_export():
        program = torch.export.export(model, (video,))
    assert not [node for node in program.graph.nodes if "ssmvision" in str(node.target)]
    torch.testing.assert_close(program.module()(video), model(video), rtol=1e-4, atol=1e-5)


def test_a_transformer_generates_the_same_with_and_without_its_cache() -> None:
    model, video = make(TRANSFORMER), clip(4)
    cached = model.generate(video, 3)
    grown = size(model.condition(clip(20))) / size(model.condition(clip(10)))
    model.sequence_model.kv_cache = False
    torch.testing.assert_close(model.generate(video, 3), cached, rtol=1e-4, atol=1e-5)
    assert grown > 1.8
    with pytest.raises(ValueError, match="no state to reset"):
        model(video, reset=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="latents must be 8 x 8, one token a frame, not 2 x 2 tokens"):
        model(torch.zeros(1, 2, 1, 32, 32))


@pytest.mark.parametrize("name", [*RECURRENT, TRANSFORMER])
def test_every_parameter_learns(name: str) -> None:
    model, video = make(name).train(), clip(4)
    loss, _, _ = prediction_loss(model(video[:, :-1]), video[:, 1:])
    loss.backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_actions_matter_once_given() -> None:
    model, video = make("test_convs5", action_dim=3, action_embed_dim=2), clip(3)
    actions = torch.tensor([[0, 0, 0], [1, 2, 3]])
    told = model(video, actions)
    assert torch.allclose(told[0], model(video)[0], atol=1e-6)
    assert not torch.allclose(told[1], model(video)[1], atol=1e-6)
    torch.testing.assert_close(model.step(video[:, 0], None, actions[:, 0])[0], told[:, 0], rtol=1e-4, atol=1e-5)


def test_loss_is_a_sum_over_channels_and_width() -> None:
    prediction, target = torch.zeros(2, 3, 2, 4, 5), torch.full((2, 3, 2, 4, 5), 2.0)
    assert [x.item() for x in prediction_loss(prediction, target, 0.25)] == [0.25 * 40 + 0.75 * 20, 40, 20]


@pytest.mark.parametrize("shape", [(2, 3, 3, 16, 16), (2, 1, 16, 16), (2, 3, 1, 16, 15)])
def test_videos_of_another_shape_are_named(shape) -> None:
    with pytest.raises(ValueError, match=r"video must be \(b, t, 1, h, w\), h and w multiples of 2, not"):
        make("test_convs5")(torch.zeros(shape))
    with pytest.raises(ValueError, match="depths must be multiples of 32, not 16"):
        make("test_convs5", depths=(16, 32))
