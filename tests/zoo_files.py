"""Files in each of the formats that the zoo's checkpoints were published in, written as their authors' code does it."""

import argparse
import re
from collections import OrderedDict

import dill
import numpy as np
import safetensors.torch
import timm
import torch

LEGACY = {"_use_new_zipfile_serialization": False}


def resnet50_shapes():
    """Names, shapes and types of timm's ResNet-50."""
    with torch.device("meta"):
        return timm.create_model("resnet50", pretrained=False).state_dict()


def light_state():
    """Weights of a ResNet-50 in its full shapes, each tensor one number of its own; ``torch.save`` stores only that."""
    return {
        name: torch.tensor(index + 0.25 if like.is_floating_point() else index, dtype=like.dtype).expand(like.shape)
        for index, (name, like) in enumerate(resnet50_shapes().items())
    }


def full_state(seed=5):
    """Weights of a ResNet-50 with a random number in every place."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(like.shape, generator=generator) if like.is_floating_point() else torch.tensor(7)
        for name, like in resnet50_shapes().items()
    }


def momentum(state, names_too=False):
    """What SGD's ``state_dict()`` holds after a step: buffers under integers, or (as if) under names."""
    buffers = {
        (name if names_too else index): {"momentum_buffer": torch.zeros(3)}
        for index, name in enumerate(list(state)[:5])
    }
    return {"state": buffers, "param_groups": [{"lr": 0.1, "momentum": 0.9, "params": list(range(5))}]}


def prefixed(prefix, state):
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


def backbone(state):
    return OrderedDict((name, tensor) for name, tensor in state.items() if not name.startswith("fc."))


def head(state):
    return OrderedDict((f"module.linear.{name}", state[f"fc.{name}"]) for name in ("weight", "bias"))


def simclr_name(name):
    """The name that the PyTorch port of SimCLRv2 gives a tensor, put together from its parts."""
    if name.startswith("fc."):
        return name
    parts = name.split(".")
    if parts[0] == "conv1":
        return f"net.0.0.{parts[1]}"
    if parts[0] == "bn1":
        return f"net.0.1.0.{parts[1]}"
    stage, block, module = parts[0].removeprefix("layer"), parts[1], parts[2]
    start = f"net.{stage}.blocks.{block}"
    if module == "downsample":
        return f"{start}.projection.{'shortcut' if parts[3] == '0' else 'bn.0'}.{parts[4]}"
    kind, number = re.fullmatch(r"(conv|bn)(\d)", module).groups()
    place = 2 * (int(number) - 1)
    return f"{start}.net.{place}.{parts[3]}" if kind == "conv" else f"{start}.net.{place + 1}.0.{parts[3]}"


def write_safetensors(folder, state):
    path = folder / "model.safetensors"
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return [path]


def saver(make, name="weights.pth.tar", **options):
    """A writer of one file that holds what ``make`` wraps the weights in."""

    def write(folder, state):
        torch.save(make(state), folder / name, **options)
        return [folder / name]

    return write


def robust(key):
    def wrap(state):
        model = {
            "module.normalizer.new_mean": torch.zeros(3, 1, 1),
            "module.normalizer.new_std": torch.ones(3, 1, 1),
            **prefixed("module.model.", state),
            "module.attacker.normalize.new_mean": torch.zeros(3, 1, 1),
            **{f"module.attacker.model.{name}": tensor + 1 for name, tensor in list(state.items())[:100]},
        }
        schedule = {"step_size": 30, "gamma": 0.1, "base_lrs": [0.1], "last_epoch": 90}
        return {key: model, "optimizer": momentum(state), "schedule": schedule, "epoch": 90, "nat_prec1": np.float64(1)}

    return wrap


def classic(state):
    """What PyTorch's own ImageNet example saves."""
    return {
        "epoch": 90,
        "arch": "resnet50",
        "state_dict": prefixed("module.", state),
        "best_acc1": torch.tensor(76.5),
        "optimizer": momentum(state),
    }


def lightning(state):
    return {
        "epoch": 99,
        "global_step": 500400,
        "pytorch-lightning_version": "1.3.0",
        "state_dict": prefixed("model.", state),
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.7), "monitor": "val_acc"}},
        "optimizer_states": [momentum(state)],
        "lr_schedulers": [{"last_epoch": 99}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
    }


def write_dino(folder, state):
    torch.save(backbone(state), folder / "dino_resnet50_pretrain.pth")
    linear = {
        "epoch": 100,
        "state_dict": head(state),
        "optimizer": momentum(state),
        "scheduler": {"T_max": 100},
        "best_acc": 75.28,
    }
    torch.save(linear, folder / "dino_resnet50_linearweights.pth")
    return [folder / "dino_resnet50_pretrain.pth", folder / "dino_resnet50_linearweights.pth"]


def write_swav(folder, state):
    extras = {
        "module.projection_head.0.weight": torch.zeros(4, 8),
        "module.projection_head.1.running_mean": torch.zeros(4),
        "module.prototypes.weight": torch.zeros(5, 4),
    }
    torch.save({**prefixed("module.", backbone(state)), **extras}, folder / "swav_800ep_pretrain.pth.tar", **LEGACY)
    linear = {"epoch": 100, "state_dict": head(state), "optimizer": momentum(state), "best_acc": torch.tensor(75.3)}
    torch.save(linear, folder / "swav_800ep_eval_linear.pth.tar", **LEGACY)
    return [folder / "swav_800ep_pretrain.pth.tar", folder / "swav_800ep_eval_linear.pth.tar"]


def simclr(state):
    names = {simclr_name(name): tensor for name, tensor in state.items()}
    return {
        "resnet": OrderedDict(names),
        "head": {"layers.0.weight": torch.zeros(4, 4), "layers.1.bias": torch.zeros(4)},
    }


def debiased(state):
    aux = {
        f"module.{name.rpartition('.')[0]}.aux_bn.{name.rpartition('.')[2]}": tensor + 1
        for name, tensor in state.items()
        if "bn" in name
    }
    return {
        "epoch": 100,
        "state_dict": {**prefixed("module.", state), **aux},
        "acc": np.float64(76.8),
        "best_acc": np.float32(76.9),
        "optimizer": momentum(state),
    }


def optics(state):
    return {
        "epoch": 90,
        "model_state_dict": prefixed("module.", state),
        "optimizer_state_dict": momentum(state, names_too=True),
        "loss": torch.tensor(1.5),
        "acc": np.float32(74.2),
    }


def diffusion(state):
    return {
        "model": {"noise.schedule": torch.linspace(0, 1, 10), **prefixed("module.", state)},
        "optimizer": momentum(state),
        "lr_scheduler": {"last_epoch": 90},
        "epoch": 89,
        "args": argparse.Namespace(lr=0.5, data_path="/data/imagenet", output_dir="."),
    }


WRITERS = {
    "timm": write_safetensors,
    "torchvision1": write_safetensors,
    "torchvision2": saver(OrderedDict),
    "torchvision2-legacy": saver(OrderedDict, **LEGACY),
    "robust": saver(robust("model"), "resnet50.ckpt", pickle_module=dill),
    "robust-older": saver(robust("state_dict"), "resnet50.ckpt", pickle_module=dill, **LEGACY),
    "stylized": saver(classic, **LEGACY),
    "prime": saver(lambda state: prefixed("module.", state), "prime.ckpt"),
    "prime-lightning": saver(lightning, "prime.ckpt"),
    "prime-both": saver(lambda state: {"state_dict": prefixed("module.model.", state)}, "prime.ckpt"),
    "mocov3": saver(classic),
    "dino": write_dino,
    "swav": write_swav,
    "simclrv2": saver(simclr, "r50_1x_sk0.pth"),
    "autoaugment": saver(OrderedDict, **LEGACY),
    "fastautoaugment": saver(lambda state: prefixed("module.", state)),
    "randaugment": saver(OrderedDict),
    "augmix": saver(lambda state: {**classic(state), "model": "resnet50"}, **LEGACY),
    "pixmix": saver(lambda state: {**classic(state), "best_acc1": np.float64(77.4)}),
    "deepaugment": saver(lambda state: {"state_dict": prefixed("module.", state)}),
    "noisymix": saver(lambda state: prefixed("module.", state), "noisymix.pt"),
    "debiased": saver(debiased),
    "opticsaugment": saver(optics, "optics.pt"),
    "diffusionnoise": saver(diffusion),
    "frozen": saver(OrderedDict),
    "frozen-wrapped": saver(lambda state: {"state_dict": prefixed("module.", state)}),
}
"""Family (with a variant after a dash) -> writer(folder, state) -> the files in the order of the zoo's entry."""
