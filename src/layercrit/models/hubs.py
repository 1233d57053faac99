"""Models of timm, torchvision and transformers, with the image geometry that each library declares."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from layercrit.errors import ModelError, near
from layercrit.models.checkpoints import loading_safely
from layercrit.models.model import Model, structure
from layercrit.models.sources import OWN_NETWORK, ModelSource, explained, model_source, written
from layercrit.probes.images import Interpolation, Preprocessing
from layercrit.seeds import drawing

__all__ = ["ImageInput", "timm_input", "torchvision_input"]

ImageInput = tuple[tuple[float, ...], tuple[float, ...], Preprocessing]
"""Mean and standard deviation of each channel, in units of pixels in [0, 1], and the geometry of images."""


@model_source("timm")
class _Timm(ModelSource):
    """Weights that timm publishes, such as ``timm:resnet50.a1_in1k``."""

    forms = ("timm:NAME",)

    def open(self, rest: str, options: dict[str, Any]) -> Model:
        import timm

        architecture, _, tag = rest.partition(".")
        if not timm.is_model(architecture):
            there = near(architecture, timm.list_models())
            raise ModelError(f"timm has no model {architecture!r}. {there} {OWN_NETWORK}")
        published = timm.list_pretrained(f"{architecture}.*")
        if tag and rest not in published:
            raise ModelError(f"timm has no weights {rest!r}. {near(rest, published)}")
        if options.get("pretrained", True) and not published:
            raise ModelError(
                f"timm publishes no weights of {rest!r}. Add '?pretrained=false' for an untrained network."
            )
        return _timm_model(f"timm:{rest}", rest, None, options)

    def architecture(self, rest: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return f"timm:{rest.partition('.')[0]}", options

    def is_here(self, rest: str) -> bool:
        import timm

        config = timm.get_pretrained_cfg(rest)
        if config is None or not config.has_weights:
            return True
        return _in_hub_cache(config.hf_hub_id, config.url if isinstance(config.url, str) else None)


@model_source("hf-hub")
class _TimmOnHub(ModelSource):
    """A timm model in a Hugging Face repository."""

    forms = ("hf-hub:REPO",)

    def open(self, rest: str, options: dict[str, Any]) -> Model:
        from timm.models import load_model_config_from_hf

        with explained(f"hf-hub:{rest}", options):
            config, name, arguments = load_model_config_from_hf(rest)
        return _timm_model(f"hf-hub:{rest}", name, config, {**arguments, **options})

    def is_here(self, rest: str) -> bool:
        return _in_hub_cache(rest, None)


def _timm_model(reference: str, name: str, config: dict[str, Any] | None, options: dict[str, Any]) -> Model:
    """A model built by timm; ``config`` describes weights that timm does not list."""
    import timm

    if elsewhere := options.keys() & {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}:
        raise ModelError(
            f"{reference}: the option {min(elsewhere)!r} would load other weights. Use 'file:PATH?arch={reference}'."
        )
    pretrained = options.pop("pretrained", True)
    architecture = name.partition(".")[0]
    usual = ("pretrained", "seed", "num_classes", "in_chans", "img_size", "patch_size", "global_pool")
    with explained(reference, options, usual), drawing(options.pop("seed", 0)), loading_safely():
        network: Any = timm.create_model(name, pretrained=pretrained, pretrained_cfg=config, **options)
    n_published = network.pretrained_cfg["num_classes"]
    if pretrained and options.get("num_classes", n_published) != n_published:
        raise ModelError(
            f"{reference} was trained on {n_published} classes; with num_classes={options['num_classes']} its last "
            "layer would be random. Leave num_classes out, or add pretrained=false."
        )
    mean, std, shape = timm_input(network, options)
    build = partial(timm.create_model, architecture, pretrained=False, pretrained_cfg=config, **options)
    initialiser = f"timm.create_model({architecture!r}, pretrained=False)"
    return Model(
        reference, f"timm:{architecture}{written(options)}", network.eval(), mean, std, shape, build, initialiser
    )


def timm_input(network: nn.Module, options: Mapping[str, Any]) -> ImageInput:
    """Mean, standard deviation and geometry of timm's own evaluation transform.

    That is ``create_transform(**resolve_model_data_config(network), is_training=False)``, as in timm's model cards:
    at the training size, not at the larger test size that some weights also declare.
    """
    from timm.data import config as timm_config

    resolve: Any = timm_config.resolve_model_data_config
    config = resolve(network)
    channels, height, width = config["input_size"]
    size = options.get("img_size", (height, width))
    height, width = (size, size) if isinstance(size, int) else size
    scaled = (math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"]))
    if config["crop_mode"] == "border" or (config["crop_mode"] == "center" and height != width):
        raise ModelError(
            f"timm prepares images for this network with crop mode {config['crop_mode']!r} at {height} x {width}, "
            "which layercrit does not support. Build the network yourself and call open_model(network, mean=..., "
            "std=..., input_size=...)."
        )
    shape = Preprocessing(
        channels=options.get("in_chans", channels),
        height=height,
        width=width,
        resize=scaled if config["crop_mode"] == "squash" else scaled[0],
        interpolation=config["interpolation"],
    )
    return tuple(config["mean"]), tuple(config["std"]), shape


@model_source("torchvision")
class _Torchvision(ModelSource):
    """Weights of torchvision: the default ones if left out, ``none`` for an untrained network."""

    forms = ("torchvision:NAME[:WEIGHTS]",)

    def open(self, rest: str, options: dict[str, Any]) -> Model:
        from torchvision import models

        name, _, weights_name = rest.partition(":")
        known = models.list_models(module=models)
        if name not in known:
            raise ModelError(f"torchvision has no classifier {name!r}. {near(name, known)} {OWN_NETWORK}")
        pretrained = options.pop("pretrained", True) and weights_name != "none"
        weights = _torchvision_weights(name, weights_name)
        seed = options.pop("seed", 0)
        with explained(f"torchvision:{rest}", options, ("pretrained", "seed", "num_classes")), drawing(seed):
            build = partial(models.get_model, name, weights=None, **options)
            with loading_safely():  # torchvision itself unpickles without restriction
                network = models.get_model(name, weights=weights, progress=False, **options) if pretrained else build()
        mean, std, shape = torchvision_input(weights)
        architecture = f"torchvision:{name}{written(options)}"
        initialiser = f"torchvision.models.get_model({name!r}, weights=None)"
        return Model(f"torchvision:{rest}", architecture, network.eval(), mean, std, shape, build, initialiser)

    def architecture(self, rest: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return f"torchvision:{rest.partition(':')[0]}", options

    def is_here(self, rest: str) -> bool:
        name, _, weights_name = rest.partition(":")
        return weights_name == "none" or _in_hub_cache(None, _torchvision_weights(name, weights_name).url)


def _torchvision_weights(name: str, weights_name: str) -> Any:
    """The weights of a classifier by their name in a reference; the default ones where there is none."""
    from torchvision import models

    published = models.get_model_weights(name).__members__
    if weights_name not in ("", "none", *published):
        hint = near(weights_name, [*published, "none"])
        raise ModelError(f"torchvision:{name} has no weights {weights_name!r}. {hint}")
    return published[weights_name if weights_name not in ("", "none") else "DEFAULT"]


def torchvision_input(weights: Any) -> ImageInput:
    """Mean, standard deviation and geometry of the transform that torchvision's weights were evaluated with."""
    transform = weights.transforms()
    shape = Preprocessing(
        height=transform.crop_size[0],
        width=transform.crop_size[0],
        resize=transform.resize_size[0],
        interpolation=transform.interpolation.value,
    )
    return tuple(transform.mean), tuple(transform.std), shape


@model_source("hf")
class _Transformers(ModelSource):
    """An image classifier of transformers, safetensors only, never code from the hub."""

    forms = ("hf:REPO", "hf:FOLDER")

    def open(self, rest: str, options: dict[str, Any]) -> Model:
        try:
            from transformers import AutoConfig, AutoModelForImageClassification
        except ImportError as error:
            raise ModelError(f"hf:{rest} requires transformers. Install it: pip install 'layercrit[hf]'.") from error
        folder = Path(rest).expanduser()
        where = str(folder) if folder.is_dir() else rest
        pretrained, seed = options.pop("pretrained", True), options.pop("seed", 0)
        what = f"hf:{rest}" if folder.is_dir() else f"hf:{rest} (no folder here, so a repository of the hub)"
        with explained(what, options), drawing(seed):
            config, unknown = AutoConfig.from_pretrained(
                where, trust_remote_code=False, return_unused_kwargs=True, **options
            )
            if unknown:
                known = [*config.to_dict(), "num_labels"]
                raise ModelError(f"hf:{rest} has no option {min(unknown)!r}. {near(min(unknown), known)}")
            build = partial(AutoModelForImageClassification.from_config, config, dtype=torch.float32)
            if pretrained:
                network, report = AutoModelForImageClassification.from_pretrained(
                    where,
                    config=config,
                    use_safetensors=True,
                    trust_remote_code=False,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
                if report["missing_keys"]:
                    raise ModelError(
                        f"hf:{rest} has no trained values for {sorted(report['missing_keys'])}; they would be random. "
                        "Choose a repository with an image classifier, or add '?pretrained=false'."
                    )
            else:
                network = build()
            given = _hf_input(where, config)
            mean, std, shape = given or _hf_undeclared(config)
        name = type(network).__name__
        initialiser = f"transformers.AutoModelForImageClassification.from_config ({name})"
        architecture = f"hf:{name}-{structure(network)}"
        return Model(
            f"hf:{rest}", architecture, network.eval(), mean, std, shape, build, initialiser,
            undeclared=() if given else (*(() if hasattr(config, "image_size") else ("input_size",)), "mean", "std"),
        )  # fmt: skip

    def is_here(self, rest: str) -> bool:
        return Path(rest).expanduser().is_dir() or _in_hub_cache(rest, None)


def _hf_undeclared(config: Any) -> ImageInput:
    """The configuration's image size, and pixels in [0, 1] without normalisation."""
    channels, side = getattr(config, "num_channels", 3), getattr(config, "image_size", 224)
    height, width = (side, side) if isinstance(side, int) else side
    shape = Preprocessing(channels=channels, height=height, width=width, resize=max(height, width))
    return (0.0,) * channels, (1.0,) * channels, shape


def _hf_input(where: str, config: Any) -> ImageInput | None:
    """Mean, standard deviation and geometry of a transformers image processor, checked against its output.

    None for a local folder without a processor.
    """
    import transformers

    folder = Path(where)
    if folder.is_dir() and not any((folder / f"{name}_config.json").exists() for name in ("preprocessor", "processor")):
        return None
    auto: Any = transformers.AutoImageProcessor
    processor = auto.from_pretrained(where, trust_remote_code=False)
    settings = processor.to_dict()
    channels = getattr(config, "num_channels", 3)
    shape = replace(_hf_geometry(settings), channels=channels)
    # transformers scales 0..255 by a factor that may differ from 1 / 255; ours is fixed, so mean and std take it on.
    unit = 1 / (255 * settings["rescale_factor"]) if settings.get("do_rescale", True) else 1 / 255
    normalised = settings.get("do_normalize", True)
    mean = tuple(m * unit for m in (settings["image_mean"] if normalised else (0.0,) * channels))
    std = tuple(s * unit for s in (settings["image_std"] if normalised else (1.0,) * channels))
    # Releases of transformers do not agree on where crops begin.
    for candidate in (shape, replace(shape, crop_offset="rounded down")):
        if _agrees_with_hf(processor, mean, std, candidate):
            return mean, std, candidate
    raise ModelError(
        f"{type(processor).__name__} prepares images in a way that layercrit does not support. Load the network "
        "yourself and call open_model(network, mean=..., std=..., input_size=...)."
    )


def _hf_geometry(settings: Mapping[str, Any]) -> Preprocessing:
    size, crop_share = settings["size"], settings.get("crop_pct")
    edge = size.get("shortest_edge")
    resize: int | tuple[int, int]
    if edge is None:
        height, width = size["height"], size["width"]
        resize = (height, width)
    else:
        height = width = edge
        # ConvNeXt's processor, which alone of the common ones has crop_pct, squashes from 384 pixels on.
        resize = edge if crop_share is None else int(edge / crop_share) if edge < 384 else (edge, edge)
    if settings.get("do_center_crop"):
        height, width = settings["crop_size"]["height"], settings["crop_size"]["width"]
    filters: tuple[Interpolation, ...] = ("nearest", "lanczos", "bilinear", "bicubic")  # by Pillow's number
    return Preprocessing(height=height, width=width, resize=resize, interpolation=filters[settings["resample"]])


def _agrees_with_hf(processor: Any, mean: tuple[float, ...], std: tuple[float, ...], shape: Preprocessing) -> bool:
    """Compare with the processor on ramps, where a shift by one pixel changes 0.7 of 255 grey levels on average."""
    sizes = [(600, 800)]
    if isinstance(shape.resize, int):  # sides that are not resized, with every remainder of the division by 4
        longer = [shape.resize + more for more in range(84, 88)]
        sizes += [(shape.resize, side) for side in longer] + [(side, shape.resize) for side in longer]
    for height, width in sizes:
        rows, columns = np.mgrid[0:height, 0:width]
        ramps = np.stack([rows / height, columns / width, (rows + columns) / (height + width)], axis=2) * 255
        image = Image.fromarray(ramps.astype(np.uint8))
        theirs = np.asarray(processor(images=image, return_tensors="np")["pixel_values"])[0]
        ours = (shape(image) / 255 - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))  # as theirs: (c, h, w)
        # The two resample with different code, and agree to 0.003 grey levels where they mean the same.
        if theirs.shape != ours.shape or np.abs((theirs - ours) * np.reshape(std, (-1, 1, 1))).mean() > 0.1 / 255:
            return False
    return True


def _in_hub_cache(repository: str | None, address: str | None) -> bool:
    """Whether the weights of a repository or an address are cached, by the file's name; it may be incomplete."""
    from huggingface_hub import try_to_load_from_cache

    if repository:
        files = ("model.safetensors", "pytorch_model.bin")
        if any(isinstance(try_to_load_from_cache(repository, name), str) for name in files):
            return True
    if not address:
        return False
    return (Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]).is_file()
