"""Sequence layers compared by one command: its configs on a tiny budget, its tasks, its table, its errors."""

import csv
import io
import math
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from ssmvision.engine import sequences
from ssmvision.engine.sequences import experiment
from ssmvision.layers import S5, S4Conv
from ssmvision.layers.hippo import diagonal_init
from tools import sequences as tool

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("configs/sequence/*.yaml"))


@pytest.fixture(scope="session")
def few_images(tmp_path_factory):
    """An archive of the first ten images per class and split of the one that ships."""
    path = tmp_path_factory.mktemp("images") / "few.tar.gz"
    counts = {}
    with tarfile.open(ROOT / "examples" / "fashion_mnist.tar.gz") as whole, tarfile.open(path, "w:gz") as few:
        for member in whole:
            folder = str(Path(member.name).parent)
            counts[folder] = counts.get(folder, 0) + 1
            if member.isfile() and counts[folder] <= 10:
                few.addfile(member, io.BytesIO(whole.extractfile(member).read()))
    return path


def small(config, few_images, folder):
    """The recipe with little data and narrow networks, written into `folder`."""
    recipe = yaml.safe_load(config.read_text())
    recipe["task_args"] |= {"train": 60, "val": 20}
    if "data" in recipe["task_args"]:
        assert (ROOT / recipe["task_args"]["data"]).is_file()
        recipe["task_args"]["data"] = str(few_images)
    else:
        recipe["task_args"] |= {"steps": 100, "still": 20}
    recipe["net_args"] |= {"dim": 8} | ({"d_state": 16} if "d_state" in recipe["net_args"] else {})
    recipe |= {"epochs": 3, "batch_size": 10, "lr": [0.01], "seeds": [0], "output": str(folder / "out")}
    if recipe.get("noise"):
        recipe |= {"noise_every": 196, "noise_count": 10}
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return recipe


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_gives_its_table(config, few_images, tmp_path, capsys):
    recipe = small(config, few_images, tmp_path)
    assert tool.main(["--config", str(tmp_path / "small.yaml")]) == 0
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["row"], line["epoch"]) for line in lines] == [
        (row, str(epoch)) for row in recipe["rows"] for epoch in (1, 2, 3)
    ]
    for row in recipe["rows"]:
        first, *_, last = (float(line["train_loss"]) for line in lines if line["row"] == row)
        assert last < first
    text = (tmp_path / "out" / "table.md").read_text()
    assert text in capsys.readouterr().out
    cells = [line.strip("|").split("|") for line in text.splitlines()]
    assert [line[0].strip() for line in cells[2:]] == list(recipe["rows"])
    assert {len(line) for line in cells} == {11 if recipe.get("noise") else 6}
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


def test_the_networks_of_the_drift_config_are_of_one_size():
    recipe = yaml.safe_load((ROOT / "configs" / "sequence" / "drift.yaml").read_text())
    sizes = [
        sum(p.numel() for p in sequences.build_network(2, 1, **{**recipe["net_args"], **row}).parameters())
        for row in recipe["rows"].values()
    ]
    assert max(sizes) < 1.01 * min(sizes)


def test_what_is_finished_survives_a_crash(few_images, tmp_path, monkeypatch):
    small(ROOT / "configs" / "sequence" / "drift.yaml", few_images, tmp_path)
    scored = experiment._score
    calls = []

    def crash_in_the_second_row(*args):
        calls.append(1)
        if len(calls) > 4:
            raise MemoryError
        return scored(*args)

    monkeypatch.setattr(experiment, "_score", crash_in_the_second_row)
    with pytest.raises(MemoryError):
        tool.main(["--config", str(tmp_path / "small.yaml")])
    lines = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert [line.split(",")[4] for line in lines] == ["epoch", "1", "2", "3", "1"]


def test_without_errors_of_the_sensor_velocity_is_the_sum_of_accelerations():
    task = sequences.drift(4, 2, steps=200, chunk=10, still=50, bias=0, walk=0, noise=0)
    (x, y), _ = task.train, task.val
    assert x[:, :50].abs().max() == 0
    integral = x.cumsum(1)[:, 9::10]
    torch.testing.assert_close(integral * (y[0, -1, 0] / integral[0, -1, 0]), y, rtol=1e-3, atol=1e-3)


def test_no_estimate_is_better_than_the_best():
    exact = sequences.drift(4, 20, steps=200, still=50, bias=0, walk=0, noise=0)
    assert exact.best < 1e-6
    task = sequences.drift(2, 200, steps=600, still=100, bias=1, walk=0, noise=0.1)
    x, y = task.val
    assert 0.008 < task.best < 0.013  # the filter's own covariance gives 0.0095
    at_rest = x[:, :100].mean(1, keepdim=True)
    speed = (x - at_rest).cumsum(1)[:, 9::10]
    fitted = speed * (speed * y).sum() / speed.square().sum()
    assert task.best < (fitted - y).square().mean()


def test_differences_are_a_second_channel():
    x, plain = (sequences.drift(2, 2, steps=40, still=10, differences=d).train[0] for d in (True, False))
    assert torch.equal(x[..., :1], plain)
    assert x[:, 0, 1].tolist() == [0, 0]
    assert torch.equal(x[:, 1:, 1], plain[:, 1:, 0] - plain[:, :-1, 0])


def test_at_rest_the_sensor_shows_its_bias():
    x, _ = sequences.drift(200, 2, steps=110, still=100, bias=2, walk=0, noise=0.1).train
    x = x[:, :100]
    assert 1.6 < x.mean(1).std() < 2.4
    assert x.std(1).max() < 0.2


def test_networks_of_either_rate_are_read_at_the_ends_of_chunks():
    task = sequences.drift(2, 2, steps=40, chunk=10, still=10)
    target = task.train[1]
    steps = torch.arange(40.0).expand(2, 40)[..., None]
    assert task.answer(steps, target)[0, :, 0].tolist() == [9, 19, 29, 39]
    assert torch.equal(task.answer(target, target), target)


def test_noise_is_one_oscillation_of_the_norm_that_is_asked_for():
    x = torch.randn(5, 784, 1)
    wave = sequences.fourier_noise(x, 2 * math.pi * 100 / 784, 0.1) - x
    torch.testing.assert_close(wave.norm(dim=1), 0.1 * x.norm(dim=1), rtol=1e-3, atol=0)
    spectrum = torch.fft.rfft(wave, dim=1).abs()[..., 0]
    assert spectrum.argmax(1).tolist() == [100] * 5
    assert spectrum[:, :100].max() < 1e-3 * spectrum[:, 100].min()


def test_noise_may_lie_between_fourier_modes():
    x = torch.randn(5, 784, 1, dtype=torch.float64)
    wave = (sequences.fourier_noise(x, 0.977, 0.1) - x)[..., 0]
    torch.testing.assert_close(wave.norm(dim=1), 0.1 * x[..., 0].norm(dim=1))
    # A sine is what its neighbours say: u_{t-1} + u_{t+1} = 2 cos(omega) u_t.
    torch.testing.assert_close(
        wave[:, :-2] + wave[:, 2:], 2 * math.cos(0.977) * wave[:, 1:-1], rtol=0, atol=1e-4 * wave.abs().max().item()
    )


def test_s4d_amplifies_most_where_its_fastest_state_oscillates():
    def network(**args):
        torch.manual_seed(0)
        shared = {"mode": "s4d", "d_state": 32, "dt_min": 3e-3, "dt_max": 3e-3}
        return sequences.build_network(1, 2, "s4", 8, depth=1, **shared, **args)

    fastest = diagonal_init("legs", 32)[0].imag.abs().max().item()
    assert sequences.spike(network(B_clip=None), 784) == pytest.approx(3e-3 * fastest, abs=1e-3)
    assert sequences.spike(network(), 784) < 0.5
    assert sequences.spike(network(init="ptd"), 784) < 0.1


@pytest.mark.parametrize("net", ["s4", "s5"])
def test_a_spike_is_where_the_layer_answers_loudest(net):
    torch.manual_seed(0)
    network = sequences.build_network(1, 2, net, 6, depth=1, d_state=16, dt_min=0.05, dt_max=0.05)
    layer = next(m for m in network.modules() if isinstance(m, S4Conv | S5))
    layer.D.data.zero_()
    layer.activation = torch.nn.Identity()  # of S4Conv

    def loudness(omega):
        u = torch.cos(omega * torch.arange(400))[None, :, None] * network.embed.weight[:, 0]
        return layer(u if net == "s5" else u.mT).square().sum()

    found = sequences.spike(network, 400)
    others = [loudness(omega) for omega in torch.linspace(2 * math.pi / 400, 3.1, 60)]
    assert loudness(found) > 0.95 * max(others)
    assert loudness(found) > 2 * sum(others) / 60


def test_a_hierarchy_has_the_spike_of_its_lower_level_and_mamba_has_none():
    low = {"net": "s4", "mode": "s4d", "depth": 1, "d_state": 16}
    hierarchy = sequences.build_network(1, 2, "hiss", 6, ratio=5, low=low, high={"net": "mamba", "depth": 1})
    assert sequences.spike(hierarchy, 100) == sequences.spike(hierarchy.low_level, 100)
    assert sequences.spike(sequences.build_network(1, 2, "mamba", 6, depth=1), 100) is None


def test_a_row_is_judged_at_its_best_learning_rate():
    def line(row, lr, seed, score, **more):
        return {"row": row, "lr": lr, "seed": seed, "parameters": 7, "score": score, **more}

    runs = [("a", 0.1, 70.0), ("a", 0.2, 80.0), ("b", 0.1, 60.0), ("b", 0.2, 50.0)]
    ends = {"epoch": 1, "train_loss": 1.0, "seconds": 2.0}
    lines = [line(row, lr, seed, score + seed, **ends) for seed in (0, 1) for row, lr, score in runs]
    noise = [line(row, lr, seed, score, omega=omega) for row, lr, seed, by in (
                 ("a", 0.2, 0, (80, 50, 70)), ("a", 0.1, 0, (70, 60, 50)), ("b", 0.1, 0, (60, 59, 58)),
                 ("a", 0.2, 1, (81, 71, 61)), ("a", 0.1, 1, (71, 61, 51)), ("b", 0.1, 1, (61, 55, 59)),
             ) for omega, score in zip((0, 0.3, 0.6), by, strict=True)]  # fmt: skip
    assert sequences.table(lines, noise, "accuracy").splitlines()[2:] == [
        f"| a | 7 | 0.2 | 80.5 | 80, 81 | 4 | 80.5 |{' 55.5 (at 0.3, 0.6) | 25 (30, 20) |' * 2}",
        "| b | 7 | 0.1 | 60.5 | 60, 61 | 4 | 60.5 | 56.5 (at 0.6, 0.3) | 4 (2, 6) | 58.5 (at 0.6, 0.6) | 2 (2, 2) |",
    ]
    once = [line for line in noise if line["seed"] == 0]
    assert (
        sequences.table(lines, once, "accuracy")
        .splitlines()[2]
        .endswith("| 80 | 50 (at 0.3) | 30 | 50 (at 0.3) | 30 |")
    )
    assert "| a | 7 | 0.1 | 70.5 | 70, 71 | 4 |" in sequences.table(lines, [], "mse")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "unknown key 'epoch'; the nearest one is 'epochs'"),
        ({"task": "words"}, "task is 'words', but must be one of pixels, drift"),
        ({"task_args": {"length": 3}}, "it takes train, val, steps, chunk, still, bias, walk, noise, push"),
        ({"noise_every": 0}, "noise_every is 0, but must be at least 1"),
        ({"task_args": {"push": 0}}, "push is 0, but must be positive"),
        ({"task_args": {"steps": 55}}, "55 steps are not a multiple of the chunk of 10"),
        ({"task_args": {"still": 600}}, "A body that rests for 600 of 600 steps does not move."),
        ({"rows": {}}, "There is nothing to compare: give --rows."),
        ({"rows": {"a": 3}}, "Row 'a' is 3, but must hold `key: value` lines."),
        ({"rows": {"a": {"net": "lstm"}}}, "Row 'a': there is no network 'lstm'; known: s4, s5, mamba, hiss"),
        ({"rows": {"a": {"net": "s4", "depth": 1, "init": "legz"}}}, "Row 'a': there is no measure 'legz'"),
        ({"rows": {"a": {"net": "mamba", "deep": 1}}}, "Row 'a': "),
        (
            {"rows": {"a": {"net": "hiss", "ratio": 7, "low": {"net": "mamba", "depth": 1}, "high": {"net": "mamba",
             "depth": 1}}}}, "Row 'a': Hierarchical: 60 steps are not a multiple of the ratio 7",
        ),
        ({"task": "pixels", "task_args": {"data": "nowhere"}}, "The data folder nowhere does not exist."),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(change, message, tmp_path, capsys):
    recipe = {
        "task": "drift",
        "task_args": {"train": 4, "val": 2, "steps": 60, "still": 10},
        "net_args": {"dim": 8},
        "epochs": 1,
    }
    recipe |= {"rows": {"a": {"net": "mamba", "depth": 1}}, "output": str(tmp_path / "out")}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(recipe | change))
    assert tool.main(["--config", str(tmp_path / "bad.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_results_are_not_overwritten(tmp_path, capsys):
    arguments = ["--task", "drift", "--task-args", "train=4", "val=2", "steps=20", "still=5", "--epochs", "1"]
    arguments += ["--rows", "a={'net': 'mamba', 'dim': 4, 'depth': 1}", "--output", str(tmp_path)]
    assert tool.main(arguments) == 0
    before = (tmp_path / "results.csv").read_text()
    assert tool.main(arguments) == 2
    assert "already holds results; choose another --output" in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_text() == before
