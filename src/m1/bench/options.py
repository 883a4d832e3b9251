"""The options that all benchmarks have, refused in one line where they make no sense."""

from dataclasses import asdict, dataclass
from typing import ClassVar, get_args

import torch

from m1.errors import UserError
from m1.ops.backend import Backend, available, own_backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every benchmark asks for.

    Attributes:
        dtype: of the activations, "float32" or "bfloat16"; the kernels' arithmetic and states are float32.
        device: "cpu" or "cuda".
        backends: those that are timed, separated by commas; all that run on the device when None.
        repeats: timed calls a row; slow rows have fewer.
    """

    name: ClassVar[str]  # of the benchmark

    dtype: str
    device: str
    backends: str | None
    repeats: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype}: choose {' or '.join(DTYPES)}")
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"--device {self.device}: choose cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no GPU here; use --device cpu")
        self.chosen_backends()

    @property
    def own(self) -> Backend:
        """This package's kernels on the device."""
        return own_backend(self.device)

    def chosen_backends(self) -> list[Backend]:
        """Those asked for, or all that run here.

        Raises:
            UserError: a name that isn't known, or a backend that can't run here.
        """
        here: list[Backend] = [backend for backend in (self.own, "reference") if available(backend)]
        chosen = here if self.backends is None else self.backends.split(",")
        for name in chosen:
            if name not in get_args(Backend) or name == "auto":
                raise UserError(f"--backends {self.backends}: no backend {name!r}; choose from cpu, triton, reference")
            if name not in here:
                raise UserError(
                    f"--backends {self.backends}: {name} can't run on {self.device} here; choose from {', '.join(here)}"
                )
        return [backend for backend in here if backend in chosen]

    def require(self, holds: bool, option: str, demand: str) -> None:
        """Raises UserError naming the option, its value and the demand that doesn't hold."""
        if not holds:
            raise UserError(f"--{option.replace('_', '-')} {getattr(self, option)}: {demand}")

    def require_for_kernels(self, holds: bool, option: str, demand: str) -> None:
        """As `require`, but `reference` alone does without."""
        kernels = [backend for backend in self.chosen_backends() if backend != "reference"]
        self.require(holds or not kernels, option, f"{demand} for the {self.own} kernel; or use --backends reference")
