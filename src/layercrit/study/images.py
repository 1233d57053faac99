"""The images of a study: decoded once into its folder, whichever process comes first."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from layercrit.attacks import attacked, split_attack
from layercrit.errors import ProbeError
from layercrit.locks import hold
from layercrit.models.model import Model
from layercrit.probes.changes import plain_source
from layercrit.probes.kinds import without_split
from layercrit.probes.labelling import is_label_file, open_images, open_labelled
from layercrit.probes.probe_set import ProbeSet, Progress
from layercrit.seeds import probe_set_seed
from layercrit.study.file import StudyFile
from layercrit.study.image_entries import Images
from layercrit.study.shards import Shards
from layercrit.study.store import Store

__all__ = ["check_lists", "draw_images", "drawn_images", "n_available_images", "shown_images", "stored_images"]

_PROBE_SET, _FURTHER, _ADVERSARIAL = "probe_set", "probe_sets", "adversarial"
_LOCK = "shards"  # folder whose lock the shard that decodes holds
_PATIENCE = 3600.0  # seconds that the others wait for it


def n_available_images(images: Images) -> int:
    """Return how many images of a probe set there are, those of the study file at most."""
    labels = images.labels if isinstance(images.labels, str) else "auto"
    return min(images.n_images, len(open_images(split_attack(images.source)[1], labels)))


def check_lists(images: Images) -> None:
    """Read the file of labels and that of classes, where a study names them.

    Raises:
        ProbeError: as `layercrit.probes.labelling.open_labelled`.
    """
    if is_label_file(images.labels) or images.classes is not None:
        open_labelled(split_attack(images.source)[1], _labels_of(images), images.classes)


def _labels_of(images: Images) -> str:
    """Return which labels are asked for, as `layercrit.probes.labelling.LabelsGiven`."""
    return images.labels if isinstance(images.labels, str) else "auto" if images.labels else "none"


def drawn_images(study: StudyFile, folder: Path) -> dict[str | None, ProbeSet]:
    """Return the probe sets that `draw_images` put into a study's folder, by name."""
    return {images.name: ProbeSet.load(_place(study, folder, images), verify=False) for images in study.images}


def stored_images(folder: Path) -> Iterator[ProbeSet]:
    """Yield all probe sets that lie in a study's folder."""
    for place in (
        folder / _PROBE_SET,
        *sorted(folder.glob(f"{_FURTHER}/*")),
        *sorted(folder.glob(f"{_ADVERSARIAL}/*")),
    ):
        with contextlib.suppress(ProbeError):  # gone, or damaged
            yield ProbeSet.load(place, verify=False)


def shown_images(probe_set: ProbeSet, images: Images, model: Model, folder: Path, device: str) -> ProbeSet:
    """Return what a model is shown: the images, or, where they are to be attacked, adversarial ones made of them.

    These are made once on the trained model and kept in the study's folder.
    """
    attack, _ = split_attack(images.source)
    if attack is None:
        return probe_set
    about = [model.sha256, model.mean, model.std, model.output_in_words, probe_set.sha256, str(attack)]
    name = hashlib.sha256(str(about).encode()).hexdigest()[:16]
    kept = folder / _ADVERSARIAL / name
    with hold(kept, "attack", patience=_PATIENCE):  # by whichever process comes first
        return attacked(probe_set, model, attack, use_labels=images.labels is not False, device=device, folder=kept)


def _place(study: StudyFile, folder: Path, images: Images) -> Path:
    """Return the folder of a probe set, whose name may have any characters."""
    if images.name == study.probe_set:
        return folder / _PROBE_SET
    return folder / _FURTHER / hashlib.sha256(str(images.name).encode()).hexdigest()[:16]


def draw_images(
    study: StudyFile, images: Images, folder: Path, n_images: int, store: Store, *, shared: bool, progress: Progress
) -> ProbeSet:
    """Return the images as an earlier run or another shard decoded them, or decode them now.

    Args:
        study: the study.
        images: which of its probe sets.
        folder: its folder.
        n_images: how many to draw, at most.
        store: of the run or shard, in which is written what was decoded.
        shared: whether other shards may decode them at the same time.
        progress: called with the number of images decoded, and of those wanted.
    """
    labels, place = images.labels, _place(study, folder, images)
    _, source = split_attack(images.source)  # which is for each model to do
    asked = {"source": source, "n_images": n_images, "labels": labels,
             "seed": study.protocol.seed, "preprocessing": str(study.preprocessing)}  # fmt: skip
    lists = [path for path in (labels, images.classes) if isinstance(path, str)]
    asked |= {"classes": images.classes} if images.classes is not None else {}
    files = _state_of(source, lists)
    about = "images" if images.name == study.probe_set else f"images {images.name}"
    known = partial(_kept, folder, place, store, about, shared, asked, files)
    if shared and (found := known()) is not None:  # without waiting for anybody
        return found
    with hold(folder / _LOCK, "decoding of images", patience=_PATIENCE) if shared else contextlib.nullcontext():
        if (found := known()) is not None:
            return found
        probe_set = ProbeSet.from_source(
            source,
            study.preprocessing,
            n_images=n_images,
            seed=probe_set_seed(study.protocol.seed),
            labels=_labels_of(images),
            classes=images.classes,
            progress=progress,
        )
        probe_set.save(place)
        _write_down(store, about, {"asked": asked, "files": files, "sha256": probe_set.sha256})
    return ProbeSet.load(place, verify=False)


def _kept(
    folder: Path, place: Path, store: Store, about: str, shared: bool, asked: Mapping[str, Any], files: str | None
) -> ProbeSet | None:
    """Return the images in a study's folder, if they are those that are asked for."""
    for known in _known(folder, store, about, shared):
        if known.get("asked") == asked and files in (None, known["files"]):
            with contextlib.suppress(ProbeError):  # gone or damaged: decoded anew
                probe_set = ProbeSet.load(place)
                if probe_set.sha256 == known["sha256"]:
                    _write_down(store, about, known)
                    return probe_set
    return None


def _known(folder: Path, store: Store, about: str, shared: bool) -> list[dict[str, Any]]:
    """Return which images the stores of a study say are in its folder."""
    known = [store.meta(about)]
    if shared:
        with Shards(folder) as shards:
            known += [other.meta(about) for _, other in shards.stores()]
    # each once: to look whether the images are still those takes reading them all
    return [one for place, one in enumerate(known) if one is not None and one not in known[:place]]


def _write_down(store: Store, about: str, known: Mapping[str, Any]) -> None:
    if store.meta(about) != known:
        with store.transaction():
            store.put_meta(about, known)


def _state_of(source: str, lists: Sequence[str]) -> str | None:
    """Return what changes when the files of an image source, or lists of labels do; None where it is no path here."""
    path = Path(without_split(plain_source(source)[1])[0])
    if not path.exists():
        return None
    digest = hashlib.sha256()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in filter(Path.is_file, [*files, *(Path(one.partition("?column=")[0]) for one in lists)]):
        about = file.stat()
        name = (file.relative_to(path) if file.is_relative_to(path) else file).as_posix()
        digest.update(f"{name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()
