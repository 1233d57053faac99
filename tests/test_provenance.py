"""What a result was made with, without any plug-in; tests/test_plug_ins.py has one."""

from importlib.metadata import version

import pytest

from layercrit.machine import PACKAGES, versions
from layercrit.provenance import missing_plug_ins, versions_with
from layercrit.registry import Registry

USED = {
    "resets": {"resets": ["zero", "mine(share=0.5)"]},
    "distances": {"distances": ["cosine", "mine"]},
    "models": {"models": ["timm:resnet18", "mine:5"]},
    "architecture of a file": {"models": ["file:x.pt?arch=mine:5"]},
    "images": {"images": ["corrupt:fog@1:mine:5"]},
    "corruptions": {"images": ["attack:pgd(norm=linf, eps=4/255):corrupt:mine@1:corrupt:fog@2:x.npz"]},
}


@pytest.fixture
def plug_in(monkeypatch):
    """Every registry says that what is named mine is of a package."""
    monkeypatch.setattr(Registry, "package_of", lambda registry, name: {"lab": "1.2"} if name == "mine" else {})
    monkeypatch.setattr("layercrit.provenance.kind_of", lambda source: source.partition(":")[0])


@pytest.mark.parametrize("used", USED)
def test_versions_with__those_of_plug_ins(plug_in, used):
    assert versions_with(**USED[used]) == versions() | {"lab": "1.2"}


def test_versions_with__nothing_of_a_plug_in():
    assert versions_with(resets=["zero"], distances=["l1"], models=["timm:x"], images=["x"]) == versions()


def test_missing_plug_ins__are_those_that_are_not_installed(monkeypatch):
    monkeypatch.setattr("layercrit.provenance.PACKAGES", (*PACKAGES, "no-plug-in"))
    recorded = versions() | {"no-plug-in": "0.1", "pytest": version("pytest"), "lab": "1.2"}
    assert missing_plug_ins(recorded) == ["lab 1.2"]
