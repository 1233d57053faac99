"""How fast is `measure` on a GPU: against the plain forward pass, the published protocol, and what the card can do?

    python benchmarks/gpu.py                       # resnet50, vit_base_patch16_224, convnext_tiny; about 8 minutes
    python benchmarks/gpu.py --arch resnet50 --images 10000 --trials 3
    python benchmarks/gpu.py --photographs DIR     # JPEGs for the published protocol; else photographs of scikit-image

Every row is a process of its own. The published protocol (Gavrikov et al. 2024), as plainly as it can be written:
for every layer it decodes the images again, with a data loader that has a worker for each core, and runs the whole
network as timm builds it, in float32 with torch's defaults (TF32 convolutions), in batches of 256. It is timed on a few
layers. `measure` runs all layers; opening the model is told apart. The study of 51 models with the first architecture,
three trials on 10,000 images each, is calculated from that: all seconds of one measurement, 51 times.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

MODELS, TRIALS, IMAGES = 51, 3, 10_000  # of the published study
LAYERS_TIMED = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["resnet50", "vit_base_patch16_224", "convnext_tiny"])
    parser.add_argument("--images", type=int, default=4096, help="that `measure` runs")
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--photographs", type=Path, help="a folder of JPEGs for the published protocol")
    parser.add_argument("--plain-images", type=int, default=2048, help="that the published protocol decodes")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task = json.loads(arguments.child)
        print(json.dumps({"limits": limits, "forward": forward, "published": published, "measure": measure_models}[
            task.pop("what")
        ](**task)))  # fmt: skip
        return
    from replay import write_photographs  # the benchmark beside this one

    figures = {"card": child(what="limits"), "networks": {}}
    print(card_in_words(figures["card"]), end="\n\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        photographs = arguments.photographs
        if photographs is None:
            photographs = Path(scratch) / "images"
            write_photographs(photographs, 64)
        for arch in arguments.arch:
            found = {
                "forward": child(what="forward", arch=arch),
                "published": child(what="published", arch=arch, folder=str(photographs), n=arguments.plain_images),
                "measure": child(what="measure", arch=arch, n_images=arguments.images, trials=arguments.trials),
            }
            figures["networks"][arch] = found
            print(table(arch, found, figures["card"]), end="\n\n", flush=True)
            first = figures["networks"][arguments.arch[0]]
            figures |= {"gpu_ratio": ratio(first), "study_minutes": study_minutes(first["measure"])}
            if arguments.json:  # what was measured is kept if a later network fails
                arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"gpu_ratio={figures['gpu_ratio']:.1f} study_minutes={figures['study_minutes']:.1f}")


def ratio(found: dict) -> float:
    """Evaluations a second of `measure`, opening included, over those of the published protocol."""
    one = found["measure"]["next model"]
    return one["evaluations"] / one["seconds"] / found["published"]["evaluations_per_second"]


def study_minutes(found: dict) -> float:
    """What the study takes: its images once, and every model as the second one of this process."""
    one = found["next model"]
    by_image = IMAGES / one["n_images"]
    trials = TRIALS / one["trials"] * (one["running"] * by_image + one["drawing"])
    return (found["images"] * by_image + MODELS * (one["seconds"] - one["running"] - one["drawing"] + trials)) / 60


def table(arch: str, found: dict, card: dict) -> str:
    """Return one network's table, in Markdown."""
    measured, plain = found["measure"], found["published"]["evaluations_per_second"]
    first, one = measured["first model"], measured["next model"]
    lines = [
        f"{arch}: {one['layers']} layers, {one['flops'] / 1e9:.1f} GFLOP an image, "
        f"{one['after'] / one['flops']:.1f} forward passes after the layers together\n",
        "| | images a second | evaluations a second | times the published protocol |",
        "|---|---|---|---|",
        *(f"| forward pass, {name} | {speed:,.0f} | | |" for name, speed in found["forward"].items()),
        f"| published protocol | {plain:,.0f} | {plain:,.0f} | 1 |",
    ]
    for words, of_mode, seconds in (
        ("float32, while running", measured["float32"], measured["float32"]["running"]),
        ("bfloat16, while running", one, one["running"]),
        ("bfloat16, as a whole", one, one["seconds"]),
    ):
        speed = of_mode["evaluations"] / seconds
        lines.append(f"| `measure`, {words} | | {speed:,.0f} | {speed / plain:.0f} |")
    per_image = one["running"] / one["trials"] / one["n_images"]
    lines.append(
        f"\nbfloat16: {one['after'] / per_image / 1e12:.0f} TFLOP/s, {one['after'] / per_image / card['flops']:.0%} "
        f"of the rate of matrix products; activations {one['bytes'] / per_image / 1e12:.2f} TB/s, "
        f"{one['bytes'] / per_image / card['bytes']:.0%} of the rate of copies. Of {one['seconds']:.1f} s for "
        f"{one['trials']} trials on {one['n_images']:,} images opening took {one['opening']:.1f}, drawing "
        f"{one['drawing']:.1f} and running {one['running']:.1f}; the first model of a process took "
        f"{first['seconds']:.1f} s, its opening {first['opening']:.1f}. Peak {measured['peak'] / 2**30:.1f} GiB, "
        f"batches of {one['batch_size']}. Largest difference of a layer's criticality from float32: "
        f"{measured['difference']:.1e}."
    )
    return "\n".join(lines)


def card_in_words(card: dict) -> str:
    return (
        f"{card['name']}, torch {card['torch'].split('+')[0]}, {card['cores']} CPU cores: matrix products at "
        f"{card['flops'] / 1e12:.0f} TFLOP/s in bfloat16, copies at {card['bytes'] / 1e12:.2f} TB/s, counting bytes "
        "read and written."
    )


def markdown(figures: dict) -> str:
    """Return all tables as the documentation has them."""
    name, found = next(iter(figures["networks"].items()))
    first = found["measure"]["next model"]
    tables = [table(arch, found, figures["card"]) for arch, found in figures["networks"].items()]
    study = (
        f"A study of {MODELS} models such as {name}, {TRIALS} trials on {IMAGES:,} images each, would take "
        f"{figures['study_minutes']:.1f} minutes by these figures: {first['layers'] * MODELS * TRIALS:,} cells, one "
        "process."
    )
    return "\n\n".join([card_in_words(figures["card"]), *tables, study])


def child(**task: object) -> dict:
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode:
        sys.exit(output.stderr)
    found: dict = json.loads(output.stdout.splitlines()[-1])
    return found


# --- what children do -----------------------------------------------------------------------------------------------


def limits() -> dict:
    """What the card can do: large matrix products, and copies (bytes read and written)."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.randint(0, 256, (2**31,), dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return {
        "name": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "flops": 2 * 8192**3 / seconds(lambda: a @ b),
        "bytes": 2 * 2**31 / seconds(lambda: y.copy_(x)),
    }


def forward(arch: str, n: int = 256) -> dict:
    """Images a second of the plain forward pass."""
    import timm
    import torch

    network = timm.create_model(arch).eval().cuda()
    images = torch.randn(n, 3, 224, 224, device="cuda")
    speeds = {}
    with torch.inference_mode():
        speeds["float32, as it is"] = n / seconds(lambda: network(images))
        network = network.to(torch.bfloat16, memory_format=torch.channels_last)
        images = images.to(torch.bfloat16, memory_format=torch.channels_last)
        speeds["bfloat16, channels last"] = n / seconds(lambda: network(images))
        compiled = torch.compile(network)
        speeds["bfloat16, channels last, compiled"] = n / seconds(lambda: compiled(images))
    return speeds


def published(arch: str, folder: str, n: int) -> dict:
    """Evaluations a second of the published protocol, on a few layers."""
    import timm
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    model = timm.create_model(arch).eval().cuda()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    files = sorted(Path(folder).glob("*.jpg"))

    class Photographs(Dataset):
        def __len__(self) -> int:
            return n

        def __getitem__(self, index: int) -> torch.Tensor:
            return transform(Image.open(files[index % len(files)]).convert("RGB"))

    @torch.no_grad()
    def predict() -> torch.Tensor:
        loader = DataLoader(Photographs(), batch_size=256, num_workers=os.cpu_count() or 1, pin_memory=True)
        return torch.cat([model(images.cuda(non_blocking=True)).softmax(dim=1).cpu() for images in loader])

    clean = predict()  # warms up
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    started = time.perf_counter()
    for name in names[:: max(1, len(names) // LAYERS_TIMED)][:LAYERS_TIMED]:
        trained = model.get_parameter(name).detach().clone()
        donor = dict(timm.create_model(arch).named_parameters())
        with torch.no_grad():
            model.get_parameter(name).copy_(donor[name])
            (1 - torch.cosine_similarity(clean, predict())).mean().item()
            model.get_parameter(name).copy_(trained)
    return {"evaluations_per_second": LAYERS_TIMED * n / (time.perf_counter() - started)}


def measure_models(arch: str, n_images: int, trials: int) -> dict:
    """Two models one after the other on the same images, in bfloat16; then a few images in both number formats."""
    import numpy as np
    import torch

    from layercrit.models.references import open_model
    from layercrit.probes.probe_set import ProbeSet

    models = []
    for _ in range(2):
        models.append(open_model(f"timm:{arch}?pretrained=false"))
        with torch.no_grad():  # so that predictions differ from image to image
            models[-1].network.get_classifier().weight.mul_(30)
    pixels = np.random.default_rng(0).integers(0, 256, (n_images, 3, 224, 224), dtype=np.uint8)
    started = time.perf_counter()
    images = ProbeSet.from_source(pixels, models[0].preprocessing)
    seconds_images = time.perf_counter() - started
    found = {
        "first model": measure_one(models[0], images, trials, "bfloat16"),
        "next model": measure_one(models[1], images, trials, "bfloat16"),
    }
    peak = torch.cuda.max_memory_allocated()
    some = images.first(n_images // 16)
    exact, rough = (measure_one(models[1], some, trials, mode) for mode in ("float32", "bfloat16"))
    differences = [abs(a - b) for a, b in zip(exact["criticality"], rough["criticality"], strict=True)]
    found |= {"float32": exact}
    for one in found.values():
        del one["criticality"]
    return {**found, "images": seconds_images, "peak": peak, "difference": max(differences)}


def measure_one(model: object, images: object, trials: int, mode: str) -> dict:
    """One measurement, and where its seconds went."""
    import torch

    import layercrit
    from layercrit.engine.flops import count_flops
    from layercrit.engine.session import Session
    from layercrit.layers import find_layers, select_layers

    sessions: list[Session] = []
    opened = Session.__init__

    def watched(self: Session, *given: object, **options: object) -> None:
        sessions.append(self)
        opened(self, *given, **options)

    Session.__init__ = watched
    started = time.perf_counter()
    found = layercrit.measure(model, images, trials=trials, dtype=mode, device="cuda", progress=False)
    total = time.perf_counter() - started
    Session.__init__ = opened
    (session,) = sessions
    one = torch.zeros(1, 3, 224, 224)
    layers = select_layers(find_layers(model.network, one))
    flops, after = count_flops(model.network, layers, one)
    return {
        "seconds": total,
        "opening": found.record["seconds_opening"],
        "drawing": session.seconds_drawing + session.seconds_packing,
        "running": session.seconds_running,
        "layers": len(layers),
        "evaluations": len(layers) * trials * images.n_images,
        "n_images": images.n_images,
        "trials": trials,
        "batch_size": found.record["protocol"]["batch_size"],
        "flops": flops,
        "after": flops * sum(after.values()),
        "bytes": activation_bytes(session),
        "criticality": found.to_pandas()["criticality"].tolist(),
    }


def activation_bytes(session: object) -> float:
    """Bytes of activations that a sweep reads and writes for an image, once for each node that touches a value."""
    from torch import Tensor

    replay = session.holder.replay
    size = 4 if replay.mode == "float32" else 2
    total = 0
    for suffix in replay._suffixes.values():
        for step in suffix.steps:
            touched = [step.node, *(node for node in step.node.all_input_nodes if node in replay._dynamic)]
            values = [node.meta.get("val") for node in touched]
            total += sum(value.numel() for value in values if isinstance(value, Tensor))
    return size * total / session.holder.batch_size


def seconds(work: Callable[[], object], n: int = 10) -> float:
    """Return the median time of some work on the card, after a warm-up."""
    import torch

    for _ in range(3):
        work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    return times[n // 2] / 1e3


if __name__ == "__main__":
    main()
