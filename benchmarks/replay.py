"""How much faster than the plain way is `measure`, how near does it come to the machine's limit, and how exact is it?

    python benchmarks/replay.py                  # resnet50 (all 54 layers), vit_tiny, convnext_tiny; about 25 minutes
    python benchmarks/replay.py --arch resnet50 --rounds 1
    python benchmarks/replay.py --memory         # does the peak grow with layers, trials or images?

The plain baseline follows the published protocol (Gavrikov et al. 2024): for every layer and trial it decodes the
images again, loads the trained weights, replaces the layer's, and runs the whole model in float32 as timm builds it.
Contenders take turns, each in a process of its own so that peak memory is its own. Seconds are those of the work per
image and trial; imports and opening the model are left out on both sides, decoding and the donor are in.

The networks are not trained on anything (no weights can be assumed to be there). Their BatchNorm statistics are taken
from the photographs and the last layer is scaled until the mean entropy of predictions is three nats, so that
differences in criticality show.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

MODES = ("float32", "bfloat16", "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["resnet50", "vit_tiny_patch16_224", "convnext_tiny"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--plain-batches", type=int, nargs="+", default=[32, 8], help="batch sizes of the plain way")
    parser.add_argument("--memory", action="store_true", help="peak memory against layers, trials and images instead")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task = json.loads(arguments.child)
        result = {"plain": plain, "measure": layercrit_measure, "network": write_network, "exact": exactness}[
            task.pop("what")
        ](**task)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**result, "peak_mb": peak}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_photographs(folder / "images", 4 * arguments.images if arguments.memory else arguments.images)
        describe_machine()
        if arguments.memory:
            memory(folder, arguments.images)
            return
        rates = {dtype: product_rate(dtype) for dtype in ("float32", "bfloat16")}
        print("matrix products:", ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
        last = ""
        for arch in arguments.arch:
            line = compare(folder, arch, arguments.images, arguments.rounds, arguments.plain_batches, rates)
            last = last or line
        exact = child(what="exact", folder=scratch)
        print(f"\nefficientnet_lite0, trained on ImageNet, {exact['n_images']} photographs, against reference mode")
        for mode in ("float32", "bfloat16"):
            print(f"  {mode}: largest difference of a layer {exact[mode][0]:.1e}, of the mean {exact[mode][1]:.1e}")
        print(last)


def compare(folder: Path, arch: str, n_images: int, rounds: int, batches: list[int], rates: dict[str, float]) -> str:
    """Let the contenders take turns on one network; print the table, return the closing line."""
    work = child(what="network", arch=arch, folder=str(folder))
    contenders = {f"plain, batch {b}": {"what": "plain", "batch_size": b} for b in batches}
    contenders |= {f"measure, {mode}": {"what": "measure", "dtype": mode} for mode in MODES}
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, task in contenders.items():
            runs[name].append(child(**task, arch=arch, folder=str(folder), n_images=n_images))
    seconds = {name: statistics.median(run["seconds"] for run in found) / n_images for name, found in runs.items()}
    plain = runs[f"plain, batch {batches[0]}"][0]["criticality"]
    print(
        f"\n{arch}: {len(plain)} layers, {n_images} images, {rounds} rounds; {work['flops'] / 1e9:.2f} GFLOP an image,"
    )
    print(f"  {work['after'] / 1e9:.0f} GFLOP after the layers together ({work['after'] / work['flops']:.1f} passes)")
    print(
        f"  {'':20} {'ms/image':>9} {'(min-max)':>13} {'ratios':>11} {'floor':>6} {'open s':>7} "
        f"{'peak MB':>8} {'max diff':>9}"
    )
    for name, found in runs.items():
        each = [1e3 * run["seconds"] / n_images for run in found]
        ratios = " ".join(f"{seconds[f'plain, batch {b}'] / seconds[name]:.2f}" for b in batches)
        dtype = found[0].get("dtype", "float32")
        floor = work["after"] / rates[dtype] / seconds[name]
        difference = max(abs(found[0]["criticality"][layer] - plain[layer]) for layer in plain)
        opening = f"{found[0]['opening']:.1f}" if "opening" in found[0] else ""
        peak = max(run["peak_mb"] for run in found)
        print(f"  {name:20} {1e3 * seconds[name]:9.0f} {min(each):6.0f}-{max(each):<6.0f} {ratios:>11} {floor:6.0%} "
              f"{opening:>7} {peak:8.0f} {difference:9.1e}")  # fmt: skip
    default = runs["measure, auto"][0]
    print("  auto:", "; ".join(default["notes"]) or default["dtype"])
    best = min(seconds[f"plain, batch {b}"] for b in batches)
    mine = seconds["measure, auto"]
    difference = max(abs(default["criticality"][layer] - plain[layer]) for layer in plain)
    return (
        f"ratio={seconds[f'plain, batch {batches[0]}'] / mine:.2f} ratio_best={best / mine:.2f} "
        f"floor_share={work['after'] / rates[default['dtype']] / mine:.2f} max_difference={difference:.1e} "
        f"peak_mb={max(run['peak_mb'] for run in runs['measure, auto']):.0f}"
    )


def memory(folder: Path, n_images: int) -> None:
    """Print the peak of several jobs that differ in one thing."""
    child(what="network", arch="resnet50", folder=str(folder))
    print("\nresnet50, peak memory of the whole process (MB)")
    for words, settings in (
        ("1 layer", {"layers": "fc"}),
        ("54 layers", {}),
        ("54 layers, 3 trials", {"trials": 3}),
        (f"54 layers, {4 * n_images} images", {"n_images": 4 * n_images}),
    ):
        task = {"n_images": n_images, **settings}
        peaks = [
            child(what="measure", arch="resnet50", folder=str(folder), dtype=dtype, **task)["peak_mb"]
            for dtype in ("float32", "bfloat16")
        ]
        print(f"  {words:28} float32 {peaks[0]:6.0f}   bfloat16 {peaks[1]:6.0f}", flush=True)


def child(**task: object) -> dict:
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode:
        sys.exit(output.stderr)
    return json.loads(output.stdout.splitlines()[-1])


# --- what children do -----------------------------------------------------------------------------------------------


def plain(arch: str, folder: str, n_images: int, batch_size: int) -> dict:
    """The published protocol, as plainly as it can be written."""
    import timm
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    from layercrit.layers import find_layers, select_layers
    from layercrit.seeds import seed_of

    weights = torch.load(Path(folder) / f"{arch}.pth", weights_only=True)
    model = timm.create_model(arch).eval()
    model.load_state_dict(weights)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    files = sorted((Path(folder) / "images").glob("*.jpg"))[:n_images]

    class Photographs(Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> torch.Tensor:
            return transform(Image.open(files[index]).convert("RGB"))

    @torch.no_grad()
    def predict() -> torch.Tensor:
        return torch.cat([model(batch).softmax(dim=1) for batch in DataLoader(Photographs(), batch_size=batch_size)])

    layers = select_layers(find_layers(model, torch.zeros(1, 3, 224, 224)))
    predict()  # warm up
    started = time.perf_counter()
    torch.manual_seed(seed_of(0, f"timm:{arch}", "rerandomize", 0))
    donor = dict(timm.create_model(arch).named_parameters())
    clean = predict()
    criticality = {}
    for layer in layers:
        model.load_state_dict(torch.load(Path(folder) / f"{arch}.pth", weights_only=True))
        with torch.no_grad():
            for name in layer.parameters:
                model.get_parameter(name).copy_(donor[name])
        criticality[layer.name] = 1 - torch.cosine_similarity(clean, predict()).mean().item()
    return {"seconds": time.perf_counter() - started, "criticality": criticality}


def layercrit_measure(arch: str, folder: str, n_images: int, dtype: str, layers: str = "*", trials: int = 1) -> dict:
    import layercrit

    model = layercrit.open_model(f"file:{folder}/{arch}.pth?arch=timm:{arch}")
    started = time.perf_counter()
    measurement = layercrit.measure(
        model, f"{folder}/images", trials=trials, n_images=n_images, dtype=dtype, layers=layers, progress=False
    )
    total = time.perf_counter() - started
    record, table = measurement.record, measurement.to_pandas()
    return {
        "seconds": total - record["seconds_opening"],
        "opening": record["seconds_opening"],
        "criticality": dict(zip(table["layer"], table["criticality"], strict=True)),
        "dtype": record["dtype"],
        "notes": record["notes"],
    }


def write_network(arch: str, folder: str) -> dict:
    """Write weights that react to photographs as trained ones do, and count what there is to compute."""
    import timm
    import torch

    from layercrit.engine.flops import count_flops
    from layercrit.layers import find_layers, select_layers
    from layercrit.models.references import open_model
    from layercrit.probes.probe_set import ProbeSet

    model = open_model(f"timm:{arch}?pretrained=false")
    images = ProbeSet.from_folder(f"{folder}/images", model.preprocessing, n_images=16).batch(0, 16)
    x, network = model.classifier.normalise(images), model.network
    with torch.no_grad():
        norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.train()
            norm.momentum = None  # the plain average of what follows
            norm.reset_running_stats()
            torch.nn.init.uniform_(norm.weight, 0.5, 1.0)  # timm starts the last one of each block at zero
        if norms:
            network(x)
        network.eval()
        head = network.get_classifier()
        low, high = 1.0, 1e6
        weight = head.weight.clone()
        for _ in range(40):  # scale the head until the mean entropy is three nats
            scale = math.sqrt(low * high)
            head.weight.copy_(weight * scale)
            p = network(x).softmax(dim=1)
            entropy = -(p * p.clamp_min(1e-30).log()).sum(dim=1).mean()
            low, high = (scale, high) if entropy > 3 else (low, scale)
        torch.save(network.state_dict(), Path(folder) / f"{arch}.pth")
        layers = select_layers(find_layers(network, x[:1]))
        flops, after = count_flops(network, layers, x[:1])
    assert timm.is_model(arch)
    return {"flops": flops, "after": flops * sum(after.values())}


def exactness(folder: str) -> dict:
    """Differences of the fast modes from the reference mode, on a network that was trained."""
    import layercrit
    from trained_models import efficientnet_lite0

    model = efficientnet_lite0()
    tables = {
        mode: layercrit.measure(model, f"{folder}/images", dtype=mode, progress=False).to_pandas()
        for mode in ("reference", "float32", "bfloat16")
    }
    result: dict = {"n_images": len(list(Path(folder, "images").iterdir()))}
    for mode in ("float32", "bfloat16"):
        difference = tables[mode]["criticality"] - tables["reference"]["criticality"]
        result[mode] = (difference.abs().max(), abs(difference.mean()))
    return result


# --- the surroundings -----------------------------------------------------------------------------------------------


def write_photographs(folder: Path, n: int) -> None:
    """Cut n photographs out of those that scikit-image ships."""
    import numpy as np
    import skimage
    from PIL import Image

    folder.mkdir()
    whole = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]
    generator = np.random.default_rng(0)
    for index in range(n):
        picture = Image.fromarray(whole[index % len(whole)])
        side = int(generator.integers(220, min(picture.size)))
        left, top = (int(generator.integers(0, size - side + 1)) for size in picture.size)
        picture.crop((left, top, left + side, top + side)).resize((320, 320)).save(
            folder / f"{index:05}.jpg", quality=90
        )


def product_rate(dtype: str) -> float:
    """FLOP/s of matrix products of the shape that dominates ResNet-50, the best of several repetitions."""
    import torch

    a = torch.randn(3136, 768).to(getattr(torch, dtype))
    b = torch.randn(768, 768).to(getattr(torch, dtype))
    # The same product as a 1 x 1 convolution goes to another library, which is faster on some processors.
    image = a.t().reshape(1, 768, 56, 56).contiguous(memory_format=torch.channels_last)
    kernel = b.reshape(768, 768, 1, 1).contiguous(memory_format=torch.channels_last)
    times = []
    with torch.inference_mode():
        for _ in range(30):
            for product in (lambda: a @ b, lambda: torch.conv2d(image, kernel)):
                started = time.perf_counter()
                product()
                times.append(time.perf_counter() - started)
    return 2 * 3136 * 768 * 768 / min(times)


def describe_machine() -> None:
    import torch

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "unknown")  # fmt: skip
    print(f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)


if __name__ == "__main__":
    main()
