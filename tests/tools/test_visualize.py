"""The pictures of what a model sees."""

from itertools import product

import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
from ssmvision import create_model
from ssmvision.engine.inspection import visualize as engine
from ssmvision.engine.inspection.scans import watch_scans
from tools import visualize as tool


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("test_vmamba", ["receptive-field", "routes", "features"]),
        ("test_vim", ["receptive-field", "routes", "features"]),
        ("test_vssd", ["receptive-field", "features"]),
        ("test_vm_unet", ["receptive-field", "routes"]),
    ],
)
def test_pictures_are_written_and_named(name, pictures, photo, tmp_path, capsys):
    torch.manual_seed(0)
    assert tool.main([str(photo), "--model", name, "--output", str(tmp_path / "out")]) == 0
    files = [tmp_path / "out" / f"{name}_{picture}.png" for picture in pictures]
    out = capsys.readouterr().out
    for file in files:
        assert str(file) in out
        with Image.open(file) as image:
            assert len(image.convert("L").getcolors()) > 50, "an empty picture"
    assert sorted((tmp_path / "out").iterdir()) == sorted(files)


@pytest.mark.parametrize(
    ("shown", "arguments", "pictures"),
    [
        ("volume", ["test_segmamba"], {"receptive-field"}),
        ("frames", ["test_videomamba_video", "--num-frames", "4", "--img-size", "64"], {"receptive-field", "features"}),
    ],
)
def test_of_volumes_and_clips_the_middle_is_drawn(shown, arguments, pictures, tmp_path, capsys, request):
    output = tmp_path / "out"
    assert tool.main([str(request.getfixturevalue(shown)), "--model", *arguments, "--output", str(output)]) == 0
    assert {file.stem.partition(f"{arguments[0]}_")[2] for file in output.iterdir()} == pictures
    assert "no routes: routes are drawn over images, not over clips or volumes." in capsys.readouterr().out


def test_a_receptive_field_is_what_reaches_the_centre():
    convolution = torch.nn.Conv2d(3, 4, 3, padding=1)
    convolution.forward_intermediates = lambda x, indices, intermediates_only: [convolution(x) + 1e3]
    field = engine.receptive_field(convolution, torch.randn(2, 3, 9, 9))
    assert field.max() == 1
    assert {tuple(at) for at in field.nonzero().tolist()} == {(i, j) for i in (3, 4, 5) for j in (3, 4, 5)}


def test_a_segmenter_reads_around_the_centre_of_a_volume():
    field = engine.receptive_field(torch.nn.Conv3d(1, 2, 3, padding=1), torch.randn(2, 1, 5, 7, 9))
    assert {tuple(at) for at in field.nonzero().tolist()} == set(product((1, 2, 3), (2, 3, 4), (3, 4, 5)))


def test_routes_add_up_to_what_the_scan_gives():
    model = create_model("test_vmamba").eval()
    image = torch.randn(1, 3, 64, 64)
    layers = engine.route_contributions(model, image)
    assert [tuple(norms.shape) for norms, _ in layers] == [(4, 16, 16), (4, 8, 8), (4, 4, 4), (4, 4, 4), (4, 2, 2)]
    assert layers[0][1] == ["rows", "columns", "rows, reversed", "columns, reversed"]
    y = watch_scans(model, image)[0].again(D=None, merge=False)
    torch.testing.assert_close(y[0].norm(dim=1).unflatten(1, (16, 16)), layers[0][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photo}", "--model", "vimm"], "There is no model named 'vimm'"),
        (["{text}", "--model", "test_vim"], "1 of 1 files are no images that can be read:\n  {text}: not an image"),
        (["nowhere.png", "--model", "test_vim"], "nowhere.png does not exist."),
        (["{photo}", "--model", "test_vssd", "--picture", "routes"], "VSSD has no scan over a whole map."),
    ],
)
def test_errors_are_one_sentence(arguments, message, complaint):
    assert message in complaint(tool, arguments)
