"""`m1 bench scan`: one Mamba-1 layer's selective scan over whole sequences, forward, and forward and backward."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m1.bench.contest import Contender, Work, begin, contest, nbytes
from m1.bench.memory import in_fresh_process, peak_growth
from m1.bench.options import DTYPES, Options
from m1.bench.peers import Inputs, Scan, mamba_libraries, mamba_scan
from m1.ops import selective_scan
from m1.ops.backend import Backend

TAPS = 4


@dataclass(frozen=True, kw_only=True)
class ScanOptions(Options):
    """`inner` channels D, `kv` channels X of x and B, `state` numbers N a channel, `batch` sequences of `length`."""

    name = "scan"

    inner: int
    kv: int
    state: int
    batch: int
    length: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.inner % self.kv == 0, "kv", f"must divide --inner {self.inner}")
        self.require(self.kv % self.state == 0, "state", f"must divide --kv {self.kv}")
        self.require_for_kernels(self.state == 16, "state", "must be 16")


class Problem(NamedTuple):
    """The arguments of `selective_scan` by name, and the gradient of y."""

    inputs: dict[str, Tensor]
    dy: Tensor


def run(options: ScanOptions) -> dict[str, Any]:
    """Measures; returns what is printed and written.

    Gradients are checked on the first sequence of the batch. On a CPU the loops' backward is also timed on it alone:
    each of its steps fills gradients as large as all steps' inputs, and the batch would take it many minutes.
    """
    limits, result = begin(options)
    batch = make_problem(options)
    sequence = first_sequence(batch)
    scans, result["skipped"] = make_scans(options, batch)
    singles, _ = make_scans(options, sequence)

    y, work = forward(own_scan("reference", batch)), least_work(batch, backward=False)
    contenders = [Contender(scan.name, partial(forward, scan), work, y) for scan in scans]
    rows = [{"pass": "forward"} | row for row in contest(contenders, limits, options)]

    gradients, contenders = forward_backward(own_scan("reference", sequence)), []
    for scan, single in zip(scans, singles, strict=True):
        timed, problem = (single, sequence) if scan.loop and options.device == "cpu" else (scan, batch)
        work, check = least_work(problem, backward=True), partial(forward_backward, single)
        contenders.append(Contender(scan.name, partial(forward_backward, timed), work, gradients, check))
    for row in contest(contenders, limits, options):
        if "tokens" in row:
            problem_options = replace(options, batch=row["tokens"] // options.length)
            peak = peak_memory(problem_options, row["name"])
            row |= {} if peak is None else {"peak_memory_bytes": peak}
        rows.append({"pass": "forward+backward"} | row)
    return result | {"rows": rows}


def make_problem(options: ScanOptions) -> Problem:
    """Random numbers, but all groups have the same B and C."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    generator = torch.Generator(device).manual_seed(0)
    tokens = (options.batch, options.length)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    inputs = {
        "z": normal(*tokens, options.inner, dtype=dtype),
        "x": normal(*tokens, options.kv, dtype=dtype),
        "B": normal(*tokens, options.state, dtype=dtype).repeat(1, 1, options.kv // options.state),
        "C": normal(*tokens, options.state, dtype=dtype).repeat(1, 1, options.inner // options.state),
        "dt": normal(*tokens, options.inner, dtype=dtype).sub_(3.0),  # steps around 0.05 after softplus
        "A": -torch.arange(1.0, options.state + 1, device=device).repeat(options.inner, 1),
        "D": torch.ones(options.inner, device=device),
        "conv_weight": normal(options.inner, TAPS),
        "conv_bias": normal(options.inner),
    }
    return Problem(inputs, normal(*tokens, options.inner, dtype=dtype))


def first_sequence(batch: Problem) -> Problem:
    inputs = {name: tensor[:1] if tensor.ndim == 3 else tensor for name, tensor in batch.inputs.items()}
    return Problem(inputs, batch.dy[:1])


def make_scans(options: ScanOptions, problem: Problem) -> tuple[list[Scan], list[str]]:
    """Our backends, then the peers; and a line about each peer that is left out."""
    libraries, skipped = mamba_libraries(options.device)
    own = [own_scan(backend, problem) for backend in options.chosen_backends()]
    return own + [mamba_scan(library, *problem) for library in libraries], skipped


def own_scan(backend: Backend, problem: Problem) -> Scan:
    def call(leaves: Inputs) -> Tensor:
        return selective_scan(**leaves, backend=backend)[0]

    return Scan(backend, backend == "reference", problem.inputs, call, problem.dy)


@torch.no_grad()
def forward(scan: Scan) -> dict[str, Tensor]:
    return {"y": scan.forward(scan.leaves)}


def forward_backward(scan: Scan) -> dict[str, Tensor]:
    """y, and for each leaf its gradient, named d and the leaf's name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in scan.leaves.items()}
    y = scan.forward(leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), scan.dy)
    return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def least_work(problem: Problem, backward: bool) -> Work:
    """Forward reads the inputs and writes y. Backward reads the inputs and y's gradient, and writes the inputs'.

    A state's number costs forward seven operations: dt A, its exp, the decay, dt u B, its addition, C h, its addition.
    Backward's arithmetic is counted as twice forward's, as is usual.
    """
    inputs, y = nbytes(*problem.inputs.values()), problem.dy.nbytes
    operations = problem.dy.numel() * (7 * problem.inputs["A"].shape[1] + 2 * TAPS)
    tokens = problem.dy.shape[:2].numel()
    return Work(3 * inputs + 2 * y, 3 * operations, tokens) if backward else Work(inputs + y, operations, tokens)


def peak_memory(options: ScanOptions, name: str) -> int | None:
    """Bytes that forward and backward take beyond their inputs."""
    if options.device == "cpu":
        return in_fresh_process(_peak_memory, options, name)
    return _peak_memory(options, name)


def _peak_memory(options: ScanOptions, name: str) -> int | None:
    # A short scan first: what code and threads take is not the scan's.
    for problem_options in (replace(options, batch=1, length=2), options):
        scans, _ = make_scans(problem_options, make_problem(problem_options))
        scan = next(scan for scan in scans if scan.name == name)
        growth = peak_growth(partial(forward_backward, scan), torch.device(options.device))
    return growth
