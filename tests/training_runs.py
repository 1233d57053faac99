"""The folder of a training run, as training leaves it."""

import json

from safetensors.torch import save_file


def write_run(folder, states, arch=None, final=None):
    """Write the folder of a training run, and return it.

    Args:
        folder: made where it is missing.
        states: epoch -> the weights after it, parameter name -> tensor.
        arch: a reference for ``model.json``; None for a run that has not finished.
        final: the weights it ended with; None for a run that has not finished.
    """
    (folder / "epochs").mkdir(parents=True)
    (folder / "log.csv").touch()
    (folder / "state").mkdir()
    for epoch, state in states.items():
        save_file(state, folder / "epochs" / f"epoch-{epoch:04d}.safetensors")
    if final is not None:
        save_file(final, folder / "model.safetensors")
    if arch is not None:
        (folder / "model.json").write_text(json.dumps({"arch": arch, "method": "baseline"}), encoding="utf-8")
    return folder
