import pytest
import timm
import yaml

import ssmvision
from ssmvision.hub import Published, render_card
from ssmvision_tools import model_cards

CFG = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "url": "https://example.org/releases/%23v2cls/w.pth",
    "license": "mit",
    "origin_url": "https://example.org",
    "paper_ids": ("arXiv:2401.10166",),
    "description": "A toy.",
}
PUBLISHED = Published(
    "https://example.org/table", top1=82.6, top5=96.0, flops="4.9 G", caveats=("Square images only.",)
)


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_cards_are_up_to_date():
    """The cards in the repository are exactly what the registry says today."""
    assert model_cards.differences(model_cards.render_all(), model_cards.CARDS) == []


def test_every_weight_is_published_with_a_source():
    for name in ssmvision.list_models(pretrained=True):
        published, cfg = model_cards._published(name), timm.get_pretrained_cfg(name)
        assert published.source.startswith("https://"), name
        assert cfg.license, name
        assert cfg.origin_url, name


def test_front_matter_is_what_the_hub_reads():
    data = front_matter(render_card("toy.in1k", CFG, PUBLISHED, 30_250_000))
    assert data["license"] == "mit"
    assert data["datasets"] == ["imagenet-1k"]
    (result,) = data["model-index"][0]["results"]
    assert {metric["name"]: metric["value"] for metric in result["metrics"]} == {"Top-1": 82.6, "Top-5": 96.0}
    assert result["source"]["url"] == "https://example.org/table"


def test_body_says_what_a_user_needs():
    card = render_card("toy.in1k", CFG | {"crop_mode": "squash"}, PUBLISHED, 30_250_000)
    for text in (
        "| Parameters | 30.25 M (measured on the built model) |",
        "| Input | 3 × 224 × 224, bicubic, crop 0.9 (squash) |",
        "| Top-1, ImageNet-1K @224 | 82.6 % (published) |",
        "the authors: <https://example.org/table>",
        "<https://example.org/releases/%23v2cls/w.pth>",
        "<https://arxiv.org/abs/2401.10166>",
        'ssmvision.create_model("toy.in1k", pretrained=True)',
        "it was not measured with this package",
        "- Square images only.",
    ):
        assert text in card


def test_weights_without_figures_and_with_their_own_licence():
    card = render_card("toy.in1k", CFG, Published("https://example.org", weights_license="NVIDIA-NC 1"), 1)
    data = front_matter(card)
    assert (data["license"], data["license_name"]) == ("other", "NVIDIA-NC 1")
    assert "model-index" not in data
    assert "| Licence of the weights | NVIDIA-NC 1 |" in card


def test_cards_of_clips_say_how_many_frames():
    published = Published("https://example.org", top1=81.0, dataset="Kinetics-400", frames=16, views="3 × 4 views")
    card = render_card("toy.k400", CFG, published, 1)
    data = front_matter(card)
    assert (data["pipeline_tag"], data["datasets"]) == ("video-classification", ["kinetics-400"])
    assert data["model-index"][0]["results"][0]["task"]["type"] == "video-classification"
    assert "| Input | 3 × 16 × 224 × 224, bicubic, crop 0.9 |" in card
    assert "| Top-1, Kinetics-400 @224, 3 × 4 views of 16 frames | 81.0 % (published) |" in card


def test_cards_without_a_classifier_promise_none():
    card = render_card("toy.mask_pt", CFG | {"num_classes": 0}, Published("https://example.org"), 1)
    assert front_matter(card)["pipeline_tag"] == "feature-extraction"
    assert "num_classes" not in card
    assert "accuracy" not in card


def test_weights_to_be_downloaded_by_hand_say_where_and_how():
    cfg = {key: value for key, value in CFG.items() if key != "url"}
    card = render_card("toy.in1k", cfg, Published("https://example.org", by_hand="https://example.org/d/toy/view"), 1)
    assert "| Weights | <https://example.org/d/toy/view>, to be downloaded by hand |" in card
    assert 'create_model("toy.in1k", pretrained=True, pretrained_cfg_overlay=dict(file="FILE")).eval()' in card


def test_check_finds_drift(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model_cards, "render_all", lambda: {"a.md": "a", "b.md": "b"})
    arguments = ["--folder", str(tmp_path)]
    (tmp_path / "gone.md").write_text("of a weight that is no more")
    assert model_cards.main(["--check", *arguments]) == 1
    assert "a.md differs" in capsys.readouterr().out
    assert model_cards.main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.md", "b.md"]
    assert model_cards.main(["--check", *arguments]) == 0
    (tmp_path / "a.md").write_text("edited")
    assert model_cards.main(["--check", *arguments]) == 1


def test_unpublished_weights_are_refused(monkeypatch):
    with pytest.raises(LookupError, match=r"PUBLISHED says nothing about resnet18\.a1_in1k"):
        model_cards._published("resnet18.a1_in1k")
