import csv
import shutil

import pytest
import torch
import yaml
from image_folders import HOSTILE
from PIL import Image
from runs import argv, load

import ssmvision
from tools import predict, validate
from tools.train import main


def test_a_run_leaves_what_it_promises(image_folder, tmp_path, capsys):
    assert main(argv(image_folder, tmp_path, epochs="2")) == 0
    run = tmp_path / "run"
    rows = list(csv.DictReader((run / "results.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert all(0 <= float(row["val_top1"]) <= float(row["val_top5"]) == 100 for row in rows)
    assert yaml.safe_load((run / "args.yaml").read_text())["num_classes"] == 3
    for picture in ("curves.png", "predictions.png"):
        with Image.open(run / picture) as image:
            assert len(image.convert("L").getcolors()) > 50, "an empty picture"
    assert list((run / "tensorboard").iterdir())
    assert f'create_model("local-dir:{run}/export", pretrained=True)' in capsys.readouterr().out
    assert {path.name for path in run.iterdir()} == {
        *("args.yaml", "results.csv", "curves.png", "predictions.png", "tensorboard", "export", ".lock"),
        *("last.pth", "model_best.pth"),
    }


def test_it_learns_and_the_best_weights_are_exported(image_folder, tmp_path):
    assert main(argv(image_folder, tmp_path, epochs="6")) == 0
    best = load(tmp_path / "run/model_best.pth")
    assert max(row["val_top1"] for row in best["history"]) > 90
    assert best["history"][-1] == max(best["history"], key=lambda row: row["val_top1"])
    model = ssmvision.create_model(f"local-dir:{tmp_path}/run/export", pretrained=True)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, best["state_dict_ema"][name])
    assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)


def test_the_saved_arguments_repeat_the_run(image_folder, tmp_path):
    assert main(argv(image_folder, tmp_path, epochs="1")) == 0
    again = ["--config", str(tmp_path / "run/args.yaml"), "--output", str(tmp_path / "again")]
    assert main(again) == 0
    first, second = (load(path / "run/last.pth")["state_dict"] for path in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_validation_from_folder_checkpoint_and_initial_weights_agree(image_folder, tmp_path, capsys):
    assert main(argv(image_folder, tmp_path, epochs="2")) == 0
    run, common = tmp_path / "run", ["--data-dir", str(image_folder), "--workers", "0", "--device", "cpu"]
    results = []
    for source in (["--model", str(run)], ["--checkpoint", str(run / "model_best.pth")]):
        assert validate.main([*common, *source, "--results-file", str(tmp_path / "out/r.json")]) == 0
        results.append(yaml.safe_load((tmp_path / "out/r.json").read_text()))
    best = max(load(run / "last.pth")["history"], key=lambda row: row["val_top1"])
    for result in results:
        assert result["top1"] == pytest.approx(best["val_top1"], abs=1e-4)
        assert result["loss"] == pytest.approx(best["val_loss"], abs=1e-5)
        assert result["images"] == 12
    flags = {"epochs": "1", "lr": "1e-12", "min_lr": "1e-12", "warmup_epochs": "0"}
    assert main(argv(image_folder, tmp_path / "tuned", checkpoint=str(run / "model_best.pth"), **flags)) == 0
    tuned = load(tmp_path / "tuned/run/last.pth")["history"][0]
    assert tuned["val_loss"] == pytest.approx(best["val_loss"], abs=1e-4)


def test_prediction_skips_or_stops_at_broken_files(image_folder, tmp_path, capsys):
    assert main(argv(image_folder, tmp_path, epochs="3")) == 0
    photos = tmp_path / "photos" / "deep"
    photos.mkdir(parents=True)
    for name in ("red", "blue"):
        shutil.copy(image_folder / f"val/{name}/0.png", photos / f"{name}.png")
    shutil.copy(HOSTILE / "truncated.jpg", photos)
    common = ["--model", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--device", "cpu", "--topk", "2"]
    assert predict.main([str(tmp_path / "photos"), *common]) == 0
    assert "1 unreadable images were skipped" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open()))
    assert [row["label1"] for row in rows] == ["blue", "red"]
    assert all(float(row["probability1"]) >= float(row["probability2"]) for row in rows)
    with Image.open(tmp_path / "out/predictions.png") as sheet:
        assert len(sheet.convert("RGB").getcolors(1 << 20)) > 100
    assert predict.main([str(tmp_path / "photos"), *common, "--on-bad-sample", "stop"]) == 2
    assert "truncated.jpg" in capsys.readouterr().err
    assert predict.main([str(photos / "truncated.jpg"), *common]) == 2
    assert predict.main([str(tmp_path / "nothing"), *common]) == 2


def test_skipped_training_images_are_counted(image_folder, tmp_path, capsys):
    for name in ("empty.png", "truncated.jpg"):
        shutil.copy(HOSTILE / name, image_folder / "train/red")
    assert main(argv(image_folder, tmp_path, epochs="1")) == 2
    assert not (tmp_path / "run/last.pth").exists()
    assert main(argv(image_folder, tmp_path, epochs="1", on_bad_sample="skip")) == 0
    output = capsys.readouterr().out
    assert "2 unreadable images are left out" in output
    assert "36 training and 12 validation images" in output


def test_a_diverging_run_stops_and_keeps_the_last_good_state(image_folder, tmp_path, capsys):
    flags = {"opt": "sgd", "lr": "1e30", "warmup_epochs": "2", "checkpoint_interval_steps": "1"}
    assert main(argv(image_folder, tmp_path, **flags)) == 2
    message = capsys.readouterr().err
    assert "not finite in epoch" in message
    assert "--clip-grad" in message
    last = tmp_path / "run/last.pth"
    assert not last.exists() or all(weight.isfinite().all() for weight in load(last)["state_dict"].values())


FAULTS = {
    "unknown model": ({"model": "test_vitt"}, "no model named 'test_vitt'; did you mean test_v"),
    "unknown optimizer": ({"opt": "adamm"}, "adamm not found"),
    "unknown schedule": ({"sched": "cosin"}, "cosin"),
    "schedule without a state": ({"sched": "plateau"}, "resumed exactly"),
    "unknown augmentation": ({"aa": "nonsense"}, "transform"),
    "wrong number of classes": ({"num_classes": "4"}, "--num-classes is 4, but the training data has 3 classes"),
    "unknown constructor argument": ({"model_kwargs": "colour=1"}, "unexpected keyword argument 'colour'"),
    "odd channels": ({"in_chans": "7"}, "not 7"),
    "missing checkpoint": ({"checkpoint": "missing.pth"}, "missing.pth"),
    "unknown device": ({"device": "nonsense"}, "Cannot use device 'nonsense'"),
    "large batch": ({"batch_size": "64"}, "fewer than one batch of 64"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_arguments_end_in_one_clear_sentence(image_folder, tmp_path, capsys, fault):
    flags, expected = FAULTS[fault]
    assert main(argv(image_folder, tmp_path, **flags)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert expected in message


def test_an_unwritable_output_folder_stops_before_anything_is_read(image_folder, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    shutil.rmtree(image_folder)
    for output in (blocked, "/proc/nowhere"):
        assert main(argv(image_folder, output)) == 2
        assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        {"amp": None, "amp_dtype": "bfloat16"},
        {"model": "test_convnext", "opt": "lamb", "layer_decay": "0.7", "warmup_epochs": "0", "sched": "poly"},
        {"cutmix": "1.0", "aa": "rand-m9", "clip_grad": "0.1", "clip_mode": "agc"},
        {"in_chans": "1", "eval_metric": "loss"},
    ],
)
def test_other_recipes_run(image_folder, tmp_path, flags):
    switches = ["--amp", "--channels-last", "--grad-checkpointing"] if "amp" in flags else []
    assert main(argv(image_folder, tmp_path, *switches, epochs="1", **flags)) == 0
