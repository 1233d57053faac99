"""Labels, classes and parts of the images of a study."""

import numpy as np
import pytest

from labelled_images import FAMILY, LABELS, N_IMAGES, NAMES, accuracy, write_classes, write_pngs
from layercrit.errors import ProbeError
from layercrit.study.file import read_study_file
from layercrit.study.planning import plan_study
from layercrit.study.running import run_study
from layercrit.study.tables import load_study
from running_jobs import Inline


def write_study(folder, images):
    path = folder / "study.toml"
    path.write_text(
        f"[images]\nn_images = {N_IMAGES}\ninput_size = [1, 28, 28]\nresize = 0\n{images}\n"
        '[protocol]\ntrials = 1\nlayers = "fc"\ndtype = "float32"\ndistances = ["cosine"]\n'
        f'[[models]]\nreference = "file:{FAMILY / "baseline"}"\n'
    )
    return path


def run(path):
    """Run a study; return how many cells were measured, and how many images the model names."""
    out = path.parent / "out"
    report = run_study(read_study_file(path), out, executor=Inline(), progress=False)
    assert not report.failures
    record = load_study(out).models["record"].iloc[0]
    return report.n_measured, record["predictions"]["top1_accuracy"]


def write_list(path, shift=0):
    lines = [f"{number:03}.png {NAMES[(LABELS[number] + shift) % 10]}" for number in range(N_IMAGES)]
    path.write_text("\n".join(lines))


def test_run_study__labels_and_classes_in_files(tmp_path):
    write_pngs(tmp_path / "images" / "val")
    write_list(tmp_path / "labels.txt")
    write_classes(tmp_path / "classes.txt")
    images = 'source = "images?split=val"\nlabels = "labels.txt"\nclasses = "classes.txt"'
    path = write_study(tmp_path, images)
    expected = accuracy(tmp_path / "images" / "val", labels=tmp_path / "labels.txt", classes=NAMES)
    assert plan_study(read_study_file(path)).n_images == N_IMAGES
    assert run(path) == (1, expected)
    assert run(path) == (0, expected)
    write_list(tmp_path / "labels.txt", shift=3)
    n_measured, found = run(path)
    assert n_measured == 1, "other labels, other cells"
    assert found < 0.3
    resolved = read_study_file(tmp_path / "out")
    assert (resolved.labels, resolved.classes) == (str(tmp_path / "labels.txt"), str(tmp_path / "classes.txt"))


@pytest.mark.parametrize(("value", "expected"), [("false", False), ("true", True), ('"fine_label"', "fine_label")])
def test_read_study_file__labels(value, expected, tmp_path):
    assert read_study_file(write_study(tmp_path, f'source = "x"\nlabels = {value}')).labels == expected


def test_run_study__labels_off_by_one_are_refused(tmp_path):
    write_pngs(tmp_path / "dev", "{one}/{number}.png", one=range(1, 11))
    path = write_study(tmp_path, 'source = "dev"')
    report = run_study(read_study_file(path), tmp_path / "out", executor=Inline(), progress=False)
    assert report.n_measured == 0
    assert "begin at 1" in report.failures[0].error


def test_run_study__parts_are_not_mixed(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=np.zeros((4, 28, 28), np.uint8), x_test=np.zeros((4, 28, 28), np.uint8))
    with pytest.raises(ProbeError, match="has several parts"):
        run_study(read_study_file(write_study(tmp_path, 'source = "x.npz"')), tmp_path / "out", progress=False)
