"""Would the demo's thin network run faster in one batch that grows from layer to layer, or with other convolutions?

    python benchmarks/wavefront.py --json benchmarks/results/wavefront.json
    python benchmarks/tables.py

After its reset, every suffix runs with the trained weights. So the activations of all layers and trials could ride in
one batch that grows from layer to layer, a wavefront, and a layer's draws could be one convolution with stacked output
channels. That can gain no more than larger batches gain on the same network, and stacking on its convolutions. And no
convolution is faster than its matrix product alone, without gathering patches, bias, ReLU and shortcut. All of it is
measured on the demo's network, in float32 and in seconds of CPU, the least of several rounds.
"""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

BATCHES, OWN, DRAWS, ROUNDS = (32, 128, 512, 2048), 128, 5, 12
IN_CACHES = (4, 16, 32)  # batches of matrix products


def measured() -> dict:
    """Return seconds for an image by batch size, and seconds of each convolution's draws, apart and stacked."""
    import torch
    from torch import nn

    from layercrit.demo import small_resnet
    from layercrit.engine.allocator import large_blocks_stay
    from layercrit.engine.graph import export_graph, speed_up
    from layercrit.engine.graph_replay import GraphReplay
    from layercrit.engine.onednn import fused_convolution, packed_weight

    torch.manual_seed(0)
    network, cpu = small_resnet().eval(), torch.device("cpu")
    batches = {n: torch.rand(n, 1, 28, 28) for n in BATCHES}
    forward = {
        n: GraphReplay(speed_up(export_graph(network, images), torch.float32, cpu), []) for n, images in batches.items()
    }
    inputs: dict[nn.Conv2d, torch.Tensor] = {}
    pixels: dict[nn.Conv2d, int] = {}  # of its output
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_pre_hook(lambda module, given: inputs.update({module: given[0]}))
        module.register_forward_hook(lambda module, _, out: pixels.update({module: out.shape[-2:].numel()}))
    seconds: dict[int, list[float]] = {n: [] for n in BATCHES}
    apart, stacked, products = [], [], []
    with torch.inference_mode(), large_blocks_stay():
        network(batches[OWN])
        for _ in range(ROUNDS):
            for n, images in batches.items():
                started = time.process_time()
                forward[n].logits(images)
                seconds[n].append((time.process_time() - started) / n)
        for module in convolutions:
            x = inputs[module].contiguous(memory_format=torch.channels_last)
            where = (list(module.stride), list(module.padding), [1, 1], 1)
            one = module.weight.contiguous(memory_format=torch.channels_last)
            least = []
            for weight in (one, one.repeat(DRAWS, 1, 1, 1)):
                packed = packed_weight(weight, where[1], where[0], where[2], 1, list(x.shape))
                times = []
                for _ in range(ROUNDS):
                    started = time.process_time()
                    fused_convolution(x, packed, None, *where, "relu", [])
                    times.append(time.process_time() - started)
                least.append(min(times))
            apart.append(DRAWS * least[0])
            stacked.append(least[1])
            products.append(min(product_seconds(module, n * pixels[module]) / n for n in IN_CACHES))
    return {
        "batches": {n: min(found) for n, found in seconds.items()},
        "apart": apart,
        "stacked": stacked,
        "products": products,
        "flops": sum(2 * module.weight.numel() * pixels[module] for module in convolutions),
    }


def product_seconds(module: "nn.Conv2d", n_patches: int) -> float:
    """Return the seconds of the matrix product that a convolution is, with everything in caches."""
    import torch

    patches = torch.rand(n_patches, module.weight[0].numel())
    weight = torch.rand(patches.shape[1], module.out_channels)
    out = torch.empty(n_patches, module.out_channels)
    times = []
    for _ in range(20 * ROUNDS):
        started = time.process_time()
        torch.mm(patches, weight, out=out)
        times.append(time.process_time() - started)
    return min(times)


def markdown(figures: dict) -> str:
    """Return the tables as the documentation has them."""
    batches = {int(n): seconds for n, seconds in figures["batches"].items()}
    ratios = [one / five for one, five in zip(figures["apart"], figures["stacked"], strict=True)]
    least, products = min(batches.values()), sum(figures["products"])
    rows = [f"| {n} | {1e6 * seconds:.0f} | {batches[OWN] / seconds:.2f} |" for n, seconds in batches.items()]
    return "\n".join(
        [
            f"{figures['machine']}.",
            "",
            f"| images in a batch | µs of CPU an image | times batches of {OWN} |",
            "|---|---|---|",
            *rows,
            "",
            f"{DRAWS} draws of one convolution stacked, against {DRAWS} calls: {min(ratios):.2f} to {max(ratios):.2f} "
            f"times, {sum(figures['apart']) / sum(figures['stacked']):.2f} over all {len(ratios)} together.",
            "",
            f"{figures['flops'] / 1e6:.1f} MFLOP an image: {figures['flops'] / least / 1e9:.0f} GFLOP/s in the best "
            f"batch. The matrix products of its convolutions alone, in caches and as fast as torch.mm does them, take "
            f"{1e6 * products:.0f} µs, {figures['flops'] / products / 1e9:.0f} GFLOP/s, without gathering patches, "
            f"biases, ReLUs and shortcuts: at that rate it would be {least / products:.1f} times as fast.",
        ]
    )


def main() -> None:
    from replay import describe_machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    figures = {"machine": describe_machine(), **measured()}
    print(markdown(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
