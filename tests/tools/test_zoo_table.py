"""The table of models in the README."""

import pytest

import ssmvision
from ssmvision_tools import zoo_table


def test_the_readme_is_up_to_date():
    """If this fails: python tools/zoo_table.py"""
    assert zoo_table.main(["--check"]) == 0


def test_every_architecture_with_weights_is_listed():
    table = zoo_table.render({"hardware": "a toaster", "ratios": {"vim_tiny_patch16_224": 1.234}})
    for name in ssmvision.list_models(pretrained=True):
        assert f"| `{name.partition('.')[0]}` |" in table
    assert "(a toaster)" in table
    (row,) = [line for line in table.splitlines() if "`vim_tiny_patch16_224`" in line]
    assert row == (
        "| vim | [2401.09417](https://arxiv.org/abs/2401.09417) | `vim_tiny_patch16_224` | 7.1M | 76.1 | apache-2.0 | "
        "1.23 |"
    )


def test_a_measurement_keeps_the_ratios_of_other_models():
    found = zoo_table.measure(["test_vim"], 1, {"hardware": "", "ratios": {"other": 2.0}})
    assert found["ratios"]["other"] == 2.0
    assert 0 < found["ratios"]["test_vim"] < 1
    assert "scan backend" in found["hardware"]


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="needs the lines"):
        zoo_table.insert("no markers", "table")
