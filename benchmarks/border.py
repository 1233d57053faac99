"""What do the checks at the border cost, as a share of a measurement of 1,000 images?

    python benchmarks/border.py                            # a bundled network, 3 trials: the least favourable case
    python benchmarks/border.py --model timm:resnet18?pretrained=false --images FOLDER

Each check is timed, in seconds of CPU, inside the measurement that it belongs to. The smaller the network, the larger
their share, since they run a fixed number of images. The closing line has the share of all of them.
"""

import argparse
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import layercrit
from layercrit import measuring
from layercrit.engine import session
from layercrit.engine.subject import Subject

FAMILY = files("layercrit") / "family"
CHECKS: list[tuple[str, Any, str]] = [
    ("output and head", Subject, "_with_clear_output"),
    ("draws of the reset", Subject, "check_draws"),
    ("predictions depend on the image alone", session, "check_dependence"),
    ("common size of the images", measuring, "common_size"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=f"file:{FAMILY / 'baseline'}")
    parser.add_argument("--images", default=str(FAMILY / "fashion-mnist-test.npz"))
    parser.add_argument("--n-images", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=3)
    arguments = parser.parse_args()
    # what a process does once, such as importing parts of torch, is no check's
    layercrit.measure(arguments.model, arguments.images, n_images=8, trials=1, progress=False)
    seconds = dict.fromkeys((name for name, _, _ in CHECKS), 0.0)
    for name, owner, attribute in CHECKS:
        setattr(owner, attribute, timed(getattr(owner, attribute), name, seconds))
    started = time.process_time()
    found = layercrit.measure(arguments.model, arguments.images, n_images=arguments.n_images, trials=arguments.trials)
    total = time.process_time() - started
    for name, taken in seconds.items():
        print(f"{name:40} {taken:7.3f} s  {taken / total:6.2%}")
    print(f"{found.summary()['n_images']} images, {found.summary()['n_trials']} trials: {total:.1f} s")
    print(f"share_of_checks={sum(seconds.values()) / total:.4f}")


def timed(function: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """Return the function, with its time added to ``seconds[name]``."""

    def run(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.process_time() - started

    return run


if __name__ == "__main__":
    main()
