"""How much faster than the plain way is `measure`, how near does it come to the machine's limit, and how exact is it?

    python benchmarks/replay.py                  # resnet50 (all 54 layers), vit_tiny, convnext_tiny; about 12 minutes
    python benchmarks/replay.py --arch resnet50 --rounds 2
    python benchmarks/replay.py --plain-every 8  # the plain way on every eighth layer: it takes as long for each
    python benchmarks/replay.py --json FILE      # writes the figures, too; benchmarks/tables.py puts them into the docs
    python benchmarks/replay.py --memory         # does the peak grow with layers, trials or images?

The plain baseline follows the published protocol (Gavrikov et al. 2024): for every layer and trial it decodes the
images again, loads the trained weights, replaces the layer's, and runs the whole model in float32 as timm builds it.
Contenders take turns, each in a process of its own so that peak memory is its own. Seconds are those of the work per
image and trial, of CPU and divided by the number of threads, so that other programs on the machine do not count;
imports, a first small run and opening the model are left out on both sides, decoding and the donor are in. bfloat16 is
left out where the processor has no instructions for it.

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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["resnet50", "vit_tiny_patch16_224", "convnext_tiny"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--plain-batches", type=int, nargs="+", default=[32, 8], help="batch sizes of the plain way")
    parser.add_argument("--plain-every", type=int, default=1, help="run the plain way on every so manyth layer only")
    parser.add_argument("--memory", action="store_true", help="peak memory against layers, trials and images instead")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task = json.loads(arguments.child)
        work = {
            "plain": partial(at_rate, plain),
            "measure": partial(at_rate, layercrit_measure),
            "network": write_network,
            "exact": exactness,
        }
        result = work[task.pop("what")](**task)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**result, "peak_mb": peak}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_photographs(folder / "images", 4 * arguments.images if arguments.memory else arguments.images)
        figures: dict = {"machine": describe_machine(), "n_images": arguments.images, "rounds": arguments.rounds}
        print(figures["machine"], flush=True)
        if arguments.memory:
            memory(folder, arguments.images)
            return
        modes = ("float32", "bfloat16") if multiplies_bfloat16() else ("float32",)
        figures["networks"] = {}
        for arch in arguments.arch:
            plain_way = [
                {"what": "plain", "batch_size": size, "every": arguments.plain_every}
                for size in arguments.plain_batches
            ]
            found = compare(folder, arch, arguments.images, arguments.rounds, plain_way, modes)
            figures["networks"][arch] = found
            write(figures, arguments.json)  # what was measured is kept, whatever follows
            print(f"\n{network_table(arch, figures)}", flush=True)
        figures["exact"] = child(what="exact", folder=scratch, modes=modes)
        print(f"\n{exactness_in_words(figures)}")
    write(figures, arguments.json)
    print(closing_line(figures, arguments.arch[0], modes[-1]))


def write(figures: dict, file: Path | None) -> None:
    if file:
        file.write_text(json.dumps(figures, indent=1) + "\n")


def compare(folder: Path, arch: str, n_images: int, rounds: int, plain_way: list[dict], modes: Sequence[str]) -> dict:
    """Let the contenders take turns on one network, and return what each took."""
    work = child(what="network", arch=arch, folder=str(folder))
    contenders = {f"plain, batches of {task['batch_size']}": task for task in plain_way}
    contenders |= {f"measure --dtype {mode}": {"what": "measure", "dtype": mode} for mode in modes}
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, task in contenders.items():
            runs[name].append(child(**task, arch=arch, folder=str(folder), n_images=n_images))
    exact = runs[next(iter(contenders))][0]["criticality"]
    return {
        **{name: work[name] for name in ("flops", "after")},
        "layers": len(runs[f"measure --dtype {modes[0]}"][0]["criticality"]),
        "contenders": {
            name: {
                "ms": statistics.median(1e3 * run["seconds"] / n_images for run in found),
                "rate": statistics.median(run["rate"] for run in found),
                "opening": found[0].get("opening"),
                "peak_mb": max(run["peak_mb"] for run in found),
                "max_difference": max(abs(found[0]["criticality"][layer] - exact[layer]) for layer in exact),
            }
            for name, found in runs.items()
        },
    }


def network_table(arch: str, figures: dict) -> str:
    """Return one network's table, in Markdown."""
    found = figures["networks"][arch]
    contenders = found["contenders"]
    plain = [name for name in contenders if name.startswith("plain")]
    heads = [f"times {name}" for name in plain]
    lines = [
        f"{arch}: {found['layers']} layers, {found['flops'] / 1e9:.1f} GFLOP an image, "
        f"{found['after'] / found['flops']:.1f} forward passes after the layers together.",
        "",
        f"| | ms of CPU an image and trial | {' | '.join(heads)} | share of the rate of products | seconds of opening "
        "| peak MB | largest difference |",
        f"|---|---|{'---|' * len(heads)}---|---|---|---|",
    ]
    for name, one in contenders.items():
        ratios = " | ".join("" if name in plain else f"{contenders[of]['ms'] / one['ms']:.1f}" for of in plain)
        share = share_of_rate(found, one)
        opening = "" if one["opening"] is None else f"{one['opening']:.1f}"
        words = name if name in plain else f"`{name}`"
        lines.append(
            f"| {words} | {one['ms']:.0f} | {ratios} | {share:.0%} | {opening} | {one['peak_mb']:.0f} "
            f"| {one['max_difference']:.0e} |"
        )
    return "\n".join(lines)


def share_of_rate(network: dict, contender: dict) -> float:
    return network["after"] / contender["rate"] / (contender["ms"] / 1e3)


def exactness_in_words(figures: dict) -> str:
    exact = figures["exact"]
    modes = [mode for mode in ("float32", "bfloat16") if mode in exact]
    each = [f"{exact[m][0]:.0e} in {m} (mean over layers: {exact[m][1]:.0e})" for m in modes]
    return (
        f"EfficientNet-Lite0, trained on ImageNet, {exact['n_images']} photographs, against the reference mode: the "
        f"criticality of a layer differs by at most {' and '.join(each)}."
    )


def closing_line(figures: dict, arch: str, mode: str) -> str:
    contenders = figures["networks"][arch]["contenders"]
    mine, *plain = contenders[f"measure --dtype {mode}"], *(c for name, c in contenders.items() if "plain" in name)
    share = share_of_rate(figures["networks"][arch], mine)
    return (
        f"ratio={plain[0]['ms'] / mine['ms']:.2f} ratio_best={min(c['ms'] for c in plain) / mine['ms']:.2f} "
        f"floor_share={share:.2f} max_difference={mine['max_difference']:.1e} peak_mb={mine['peak_mb']:.0f}"
    )


def markdown(figures: dict) -> str:
    """Return all tables as the documentation has them."""
    rates: dict[str, list[float]] = {}
    for found in figures["networks"].values():
        for name, one in found["contenders"].items():
            rates.setdefault("bfloat16" if name.endswith("bfloat16") else "float32", []).append(one["rate"] / 1e9)
    each = " and ".join(f"{min(of):.0f} to {max(of):.0f} GFLOP/s in {mode}" for mode, of in rates.items())
    about = f"{figures['machine']}; matrix products at {each}; {figures['n_images']} images, one trial."
    tables = [network_table(arch, figures) for arch in figures["networks"]]
    return "\n\n".join([about, *tables, exactness_in_words(figures)])


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


def plain(arch: str, folder: str, n_images: int, batch_size: int, every: int) -> dict:
    """The published protocol, as plainly as it can be written; seconds are those of all layers."""
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
    started = cpu_seconds()
    torch.manual_seed(seed_of(0, f"timm:{arch}", "rerandomize", 0))
    donor = dict(timm.create_model(arch).named_parameters())
    clean = predict()
    before_layers = cpu_seconds()
    criticality = {}
    for layer in layers[::every]:
        model.load_state_dict(torch.load(Path(folder) / f"{arch}.pth", weights_only=True))
        with torch.no_grad():
            for name in layer.parameters:
                model.get_parameter(name).copy_(donor[name])
        criticality[layer.name] = 1 - torch.cosine_similarity(clean, predict()).mean().item()
    of_layers = (cpu_seconds() - before_layers) * len(layers) / len(criticality)
    return {"seconds": before_layers - started + of_layers, "criticality": criticality}


def layercrit_measure(arch: str, folder: str, n_images: int, dtype: str, layers: str = "*", trials: int = 1) -> dict:
    import layercrit
    from layercrit.engine.holder import ReplayHolder

    openings, open_replay = [], ReplayHolder._open

    def timed(holder: ReplayHolder) -> object:
        started = cpu_seconds()
        replay = open_replay(holder)
        openings.append(cpu_seconds() - started)
        return replay

    ReplayHolder._open = timed
    model = layercrit.open_model(f"file:{folder}/{arch}.pth?arch=timm:{arch}")
    last = layercrit.list_layers(model)["layer"].iloc[-1]
    layercrit.measure(model, f"{folder}/images", n_images=4, dtype=dtype, layers=last, progress=False)
    n_warm, started = len(openings), cpu_seconds()  # warm, as the plain way is, and all is imported
    measurement = layercrit.measure(
        model, f"{folder}/images", trials=trials, n_images=n_images, dtype=dtype, layers=layers, progress=False
    )
    total = cpu_seconds() - started
    record, table = measurement.record, measurement.to_pandas()
    return {
        "seconds": total - sum(openings[n_warm:]),
        "opening": sum(openings[:n_warm]),
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
        logits = network(x) - head.bias
        low, high = 1.0, 1e6
        for _ in range(40):  # scale the head until the mean entropy is three nats
            scale = math.sqrt(low * high)
            p = (logits * scale + head.bias).softmax(dim=1)
            entropy = -(p * p.clamp_min(1e-30).log()).sum(dim=1).mean()
            low, high = (scale, high) if entropy > 3 else (low, scale)
        head.weight *= scale
        torch.save(network.state_dict(), Path(folder) / f"{arch}.pth")
        layers = select_layers(find_layers(network, x[:1]))
        flops, after = count_flops(network, layers, x[:1])
    assert timm.is_model(arch)
    return {"flops": flops, "after": flops * sum(after.values())}


def exactness(folder: str, modes: Sequence[str]) -> dict:
    """Differences of the fast modes from the reference mode, on a network that was trained."""
    import layercrit
    from trained_models import efficientnet_lite0

    model = efficientnet_lite0()
    tables = {
        mode: layercrit.measure(model, f"{folder}/images", dtype=mode, progress=False).to_pandas()
        for mode in ("reference", *modes)
    }
    result: dict = {"n_images": len(list(Path(folder, "images").iterdir()))}
    for mode in modes:
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


def cpu_seconds() -> float:
    """Return the CPU time of this process for each of its threads."""
    import torch

    return time.process_time() / torch.get_num_threads()


def at_rate(contender: Callable[..., dict], **task: object) -> dict:
    """Add the rate of matrix products at the time, the mean of those before and after: clocks and neighbours vary."""
    dtype = str(task.get("dtype", "float32"))
    before = product_rate(dtype)
    result = contender(**task)
    return {**result, "rate": (before + product_rate(dtype)) / 2}


def product_rate(dtype: str) -> float:
    """FLOP/s of matrix products of the shape that dominates ResNet-50, the median of several repetitions."""
    import torch

    a = torch.randn(3136, 768).to(getattr(torch, dtype))
    b = torch.randn(768, 768).to(getattr(torch, dtype))
    # The same product as a 1 x 1 convolution goes to another library, which is faster on some processors.
    image = a.t().reshape(1, 768, 56, 56).contiguous(memory_format=torch.channels_last)
    kernel = b.reshape(768, 768, 1, 1).contiguous(memory_format=torch.channels_last)
    ways: list[Callable[[], object]] = [lambda: a @ b, lambda: torch.conv2d(image, kernel)]
    times: list[list[float]] = [[] for _ in ways]
    with torch.inference_mode():
        for _ in range(31):
            for product, taken in zip(ways, times, strict=True):
                started = cpu_seconds()
                product()
                taken.append(cpu_seconds() - started)
    return 2 * 3136 * 768 * 768 / min(map(statistics.median, times))


def multiplies_bfloat16() -> bool:
    import torch

    from layercrit.machine import multiplies_bfloat16

    return multiplies_bfloat16(torch.device("cpu"))


def describe_machine() -> str:
    import torch

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "unknown")  # fmt: skip
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}"


if __name__ == "__main__":
    main()
