"""What commands that take a model have in common."""

import pytest

from layercrit.cli.model_options import default_folder


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("timm:resnet50.a1_in1k", "layercrit-timm-resnet50.a1_in1k"),
        ("file:/data/nets/r20.th?arch=py:nets:R20&mean=(0.5,0.5,0.5)", "layercrit-nets-r20"),
        ("file:runs/adv/model.safetensors", "layercrit-adv-model"),
        ("file:my.pth?arch=py:nets:R20", "layercrit-my"),
        ("file:модель.pth?arch=py:nets:R20", "layercrit-модель"),
        ("layercrit-resnet18?mean=(0.5,)", "layercrit-layercrit-resnet18"),
        ("runs/study", "layercrit-runs-study"),
    ],
)
def test_default_folder__is_called_after_the_model(model, folder):
    assert str(default_folder("layercrit", model)) == folder
