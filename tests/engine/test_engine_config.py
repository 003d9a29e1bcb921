from pathlib import Path

import pytest

from ssmvision.engine import ConfigError, parse_with_config
from tools import predict, sequences, train, validate


def parse(tmp_path, text, *flags):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return parse_with_config(train.build_parser(), ["--config", str(path), *flags])


def test_values_come_from_default_file_and_flag_in_this_order(tmp_path):
    recipe = "lr: 0.5\nopt: sgd\nmodel-kwargs: {dims: [8, 16]}\nscale: [0.5, 1]\namp: true"
    args = parse(tmp_path, recipe, "--lr", "0.1")
    assert (args.lr, args.opt, args.epochs, args.amp) == (0.1, "sgd", 100, True)
    assert (args.model_kwargs, args.scale) == ({"dims": [8, 16]}, [0.5, 1.0])
    assert parse(tmp_path, "amp: true", "--no-amp").amp is False


def test_scientific_notation_that_yaml_reads_as_text(tmp_path):
    assert parse(tmp_path, "lr: 1e-3").lr == 1e-3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epoch: 3", "unknown key 'epoch'; the nearest one is 'epochs'"),
        ("batchsize: 3", "nearest one is 'batch_size'"),
        ("epochs: many", "epochs is 'many', which --epochs does not take"),
        ("epochs: 2.5", "epochs is 2.5"),
        ("epochs: [1, 2]", "epochs is [1, 2]"),
        ("scale: [0.5]", "scale is [0.5]"),
        ("scale: 0.5", "scale is 0.5"),
        ("amp: 3", "must be true or false"),
        ("amp_dtype: int8", "must be one of float16, bfloat16"),
        ("model_kwargs: 3", "must hold `key: value` lines"),
        ("- lr", "must hold `key: value` lines"),
        ("lr: [", "is not a YAML file"),
        ("lr: !!python/object/apply:os.mkdir [PWNED]", "is not a YAML file"),
        ("[" * 5000, "is not a YAML file"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, text, expected, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        parse(tmp_path, text)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "PWNED").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read .*nowhere\.yaml"):
        parse_with_config(train.build_parser(), ["--config", str(tmp_path / "nowhere.yaml")])


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("configs/image/*.yaml")), ids=lambda p: p.name)
def test_recipes_of_the_repository_fit_the_parser(path):
    assert parse_with_config(train.build_parser(), ["--config", str(path)]).model


@pytest.mark.parametrize("tool", [train, validate, predict, sequences])
def test_every_flag_is_explained_in_a_group(tool):
    parser = tool.build_parser()
    for group in parser._action_groups[2:]:
        assert group.description
    assert all(action.help for action in parser._actions)
    assert "examples:" in parser.format_help()
