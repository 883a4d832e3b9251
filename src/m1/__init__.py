"""M1: turn a pretrained transformer into a hybrid Mamba reasoning model and make its test-time compute cheap."""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m1.engine import LLM, Engine, Request, SamplingParams
    from m1.evaluation.evaluate import evaluate
    from m1.grading import Grader
    from m1.model import M1Config, M1ForCausalLM
    from m1.model.convert import convert
    from m1.reasoning.budget import Budget
    from m1.reasoning.solve import solve
    from m1.reasoning.voting import vote

__all__ = [
    "LLM",
    "Budget",
    "Engine",
    "Grader",
    "M1Config",
    "M1ForCausalLM",
    "Request",
    "SamplingParams",
    "convert",
    "evaluate",
    "solve",
    "vote",
]

# The module of each public name. It is imported on first use, because `m1 --help` needs no torch.
HOME = {
    **dict.fromkeys(("LLM", "Engine", "Request", "SamplingParams"), "m1.engine"),
    **dict.fromkeys(("M1Config", "M1ForCausalLM"), "m1.model"),
    "convert": "m1.model.convert",
    "evaluate": "m1.evaluation.evaluate",
    "Grader": "m1.grading",
    "Budget": "m1.reasoning.budget",
    "solve": "m1.reasoning.solve",
    "vote": "m1.reasoning.voting",
}


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module 'm1' has no attribute {name!r}")
    return getattr(importlib.import_module(HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class RegisterWithTransformers:
    """Registers M1 with transformers' Auto classes after `import m1`, without importing transformers itself.

    It waits on the import path until someone imports transformers, lets that import happen, and then imports
    `m1.model`, which does the registration.
    """

    loader: Any  # transformers' own

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Finds transformers, with this object in front of its loader; None for every other module."""
        spec = PathFinder.find_spec(name) if name == "transformers" else None
        if spec:
            self.loader, spec.loader = spec.loader, self  # type: ignore[assignment]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leaves that to transformers' own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Runs transformers, then registers M1 with it."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)  # type: ignore[arg-type]
        module.__spec__.loader = module.__loader__ = self.loader  # type: ignore[union-attr]
        self.loader.exec_module(module)
        importlib.import_module("m1.model")


if sys.modules.get("transformers"):
    importlib.import_module("m1.model")
else:
    sys.meta_path.insert(0, RegisterWithTransformers())
