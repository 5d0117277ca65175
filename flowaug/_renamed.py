"""Import paths of version 0.1 that appeared in the documentation; they import the same modules as the new paths."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

RENAMED = {
    "flowaug.bijections": "flowaug.flows.bijections",
    "flowaug.checkpoint": "flowaug.flows.checkpoint",
    "flowaug.estimators": "flowaug.latents.estimators",
    "flowaug.generation": "flowaug.evaluation.sampling",
    "flowaug.host": "flowaug.training.runtime",
    "flowaug.labels": "flowaug.data.class_map",
    "flowaug.loaders": "flowaug.data.loaders",
    "flowaug.metrics": "flowaug.evaluation.metrics",
    "flowaug.oracle": "flowaug.evaluation.oracle",
}


class _RenamedModules(MetaPathFinder, Loader):
    """Finder and loader that resolve an old module name to the module of the new name."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in RENAMED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self._spec = importlib.import_module(RENAMED[spec.name]).__spec__
        return sys.modules[RENAMED[spec.name]]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has replaced it by the spec of the old name


def install() -> None:
    """Register the finder, so that ``import flowaug.metrics`` and the other old paths work."""
    sys.meta_path.append(_RenamedModules())
