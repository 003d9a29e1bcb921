"""Exported programs compute what the model computes, without this package."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from micro_models import NAMES

import ssmvision
from ssmvision.engine import ExportError, programs
from ssmvision_tools import export as tool


def micro(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = ssmvision.create_model(name, num_classes=5).eval()
    if hasattr(model, "layers"):
        model.layers = model.layers[:1]  # all blocks of plain models are alike, and each costs seconds
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_onnx_file_takes_any_batch_and_size(name, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = micro(name)
    program = programs.export_program(model, torch.randn(2, 3, 192, 224), dynamic_size=True)
    run = programs.write_onnx(program, tmp_path / "model.onnx")
    for shape in ((2, 3, 192, 224), (1, 3, 256, 192)):
        assert programs.difference(model, run, torch.randn(shape)) < programs.TOLERANCE


LOAD = """
import sys, torch
x, wanted = torch.load(sys.argv[2])
found = torch.export.load(sys.argv[1]).module()(x)
assert not {"ssmvision", "timm"} & sys.modules.keys()
torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
"""


@pytest.mark.parametrize("name", ["test_vim", "test_videomamba_video"])
def test_a_pt2_file_loads_where_this_package_is_not_installed(name, tmp_path):
    model = micro(name)
    frames = (3,) if name.endswith("video") else ()
    programs.write_pt2(programs.export_program(model, torch.randn(2, 3, *frames, 48, 64)), tmp_path / "model.pt2")
    x = torch.randn(4, 3, *frames, 48, 64)
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "io.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt2"), str(tmp_path / "io.pt")]
    subprocess.run(command, check=True, cwd=tmp_path)


def operators(model: torch.nn.Module) -> set[str]:
    with torch.no_grad():
        program = torch.export.export(model.eval(), (torch.randn(2, 3, 64, 64),))
    return {str(node.target) for node in program.graph.nodes if "ssmvision" in str(node.target)}


def test_timms_exportable_lowers_operators_also_in_copies():
    model = ssmvision.create_model("test_vmamba", exportable=True)
    assert operators(pickle.loads(pickle.dumps(copy.deepcopy(model)))) == set()
    assert operators(ssmvision.create_model("test_vmamba")) == {"ssmvision.selective_scan.default"}
    twin = ssmvision.create_model("test_vmamba").eval()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), twin(x))  # outside of an export the native operators run


def test_the_tool_writes_checks_and_prints(tmp_path, capsys):
    command = ["--model", "test_vssd", "--img-size", "64", "--format", "pt2", "--output", str(tmp_path / "out/vssd")]
    assert tool.main(command) == 0
    assert "vssd.pt2" in (out := capsys.readouterr().out)
    assert "max abs difference" in out
    assert "2 x 3 x 64 x 64 and 3 x 3 x 64 x 64" in out


def test_a_program_that_computes_something_else_fails(monkeypatch, tmp_path, capsys):
    right = programs.write_pt2
    monkeypatch.setattr(programs, "write_pt2", lambda *args: lambda x: right(*args)(x) + 1e-3)
    command = ["--model", "test_vssd", "--img-size", "64", "--format", "pt2", "--output", str(tmp_path / "vssd")]
    assert tool.main(command) == 2
    assert "is off by 1.0e-03, more than 1e-04: do not use it." in capsys.readouterr().err


def test_errors_are_one_sentence(monkeypatch, capsys):
    assert tool.main(["--model", "vimm_tiny"]) == 2
    assert "There is no model named 'vimm_tiny'; did you mean" in capsys.readouterr().err
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    assert tool.main(["--model", "test_vim"]) == 2
    assert "pip install 'ssmvision[export]'" in capsys.readouterr().err
    with pytest.raises(ExportError, match="cannot be exported"):
        programs.export_program(Branching(), torch.randn(2, 3, 4, 4))


class Branching(torch.nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x
