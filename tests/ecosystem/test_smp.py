"""segmentation_models_pytorch builds on our backbones by their `tu-` names, with no code of ours in between."""

import pytest
import torch
from micro_models import NAMES, PLAIN, PYRAMIDS

import ssmvision

smp = pytest.importorskip("segmentation_models_pytorch")

# Heads that dilate the encoder instead of using its strides need `output_stride`; DPT is for plain encoders.
NEED_OUTPUT_STRIDE = {"deeplabv3", "deeplabv3plus", "pan"}
HEADS = sorted(set(smp.MODEL_ARCHITECTURES_MAPPING) - NEED_OUTPUT_STRIDE - {"dpt"})


def train_one_step(head: str, backbone: str) -> None:
    torch.manual_seed(0)
    model = smp.create_model(head, f"tu-{backbone}", encoder_weights=None, classes=2).train()
    images, target = torch.randn(2, 3, 64, 96), torch.randint(2, (2, 64, 96))
    logits = model(images)
    assert logits.shape == (2, 2, 64, 96)
    torch.nn.functional.cross_entropy(logits, target).backward()
    # DPT takes the outputs of blocks as they are, before the norm, the neck of registers and the head.
    unread = ("encoder.model.norm_f.", "encoder.model.neck.", "encoder.model.norm_neck.", "encoder.model.head.")
    gradients = {
        name: p.grad for name, p in model.named_parameters() if not (head == "dpt" and name.startswith(unread))
    }
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    stem = [gradient for name, gradient in gradients.items() if "patch_embed" in name and name.endswith("weight")]
    assert stem
    assert all(gradient.any() for gradient in stem)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model(images).isfinite().all()


def test_every_family_is_covered():
    assert len(HEADS) >= 8
    assert set(PYRAMIDS) | set(PLAIN) == set(NAMES)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", PYRAMIDS)
def test_every_head_trains_on_every_pyramid(backbone, head):
    train_one_step(head, backbone)


@pytest.mark.parametrize("backbone", PLAIN)
def test_dpt_trains_on_every_plain_family(backbone):
    train_one_step("dpt", backbone)


@pytest.mark.parametrize("backbone", PYRAMIDS)
def test_encoders_give_our_own_feature_maps(backbone):
    encoder = smp.encoders.get_encoder(f"tu-{backbone}", weights=None, depth=5).eval()
    ours = ssmvision.create_model(backbone, features_only=True).eval()
    ours.load_state_dict(encoder.model.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs, maps = encoder(x)[-4:], ours(x)
    assert [tuple(a.shape) for a in theirs] == [tuple(b.shape) for b in maps]
    assert all(torch.equal(a, b) for a, b in zip(theirs, maps, strict=True))
