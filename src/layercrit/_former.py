"""Modules that moved into packages before the first release: their former names still import."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

# Former module -> where its names are now.
FORMER = {
    "archives": ("probes.hugging_face", "probes.parquet", "probes.tar", "probes.torchvision", "probes.opening"),
    "checkpoints": ("models.checkpoints", "models.fitting", "models.file_source", "models.pickles"),
    "downloads": ("models.zoo.downloads",),
    "executors": ("study.executors", "study.local_processes"),
    "exports": ("reporting.exports",),
    "families": ("study.training",),
    "findings": ("reporting.findings",),
    "flops": ("engine.flops",),
    "graph": ("engine.graph",),
    "hubs": ("models.hubs",),
    "idx": ("probes.idx",),
    "images": ("probes.images",),
    "merging": ("study.merging",),
    "networks": ("models.model", "models.sources", "seeds", "errors"),
    "page": ("reporting.page",),
    "planning": ("study.planning",),
    "published": ("study.published",),
    "replay": ("engine.replay", "engine.graph_replay", "engine.recorded_replay", "engine.opening"),
    "running": ("study.running",),
    "session": ("engine.session", "engine.predictions"),
    "sources": ("probes.sources", "probes.classes"),
    "store": ("study.store", "study.packing"),
    "study_figures": ("figures",),
    "studyfile": ("study.file", "study.entries", "study.training_entries"),
    "training.pictures": ("training.mixing_set",),
    "zoo": ("models.zoo",),
}

# Former name -> the name now.
RENAMED = {"FamilyReport": "TrainingReport", "draw_pictures": "mixing_set", "train_family": "train_models"}


class _Finder(MetaPathFinder, Loader):
    """Finds a former module after every other finder has failed, as a view of its new homes."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return spec_from_loader(fullname, self) if package == "layercrit" and name in FORMER else None

    def exec_module(self, module: ModuleType) -> None:
        homes = FORMER[module.__name__.partition(".")[2]]
        module.__doc__ = f"Formerly a module of its own; now {' and '.join(f'layercrit.{home}' for home in homes)}."

        def find(name: str) -> Any:
            name = RENAMED.get(name, name)
            for home in homes:
                found = import_module(f"layercrit.{home}")
                if hasattr(found, name):
                    return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r}, now {', '.join(homes)}, has no attribute {name!r}")

        vars(module)["__getattr__"] = find


def install() -> None:
    """Let the former names import."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
