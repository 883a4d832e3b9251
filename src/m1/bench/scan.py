"""`m1 bench scan`: one Mamba-1 layer's selective scan over whole sequences, forward, and forward and backward."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m1.bench.contest import Contender, Work, begin, contest, nbytes
from m1.bench.layer_inputs import TAPS, Inputs, mamba_inputs
from m1.bench.memory import in_fresh_process, peak_growth
from m1.bench.options import ScanOptions
from m1.bench.peers import Scan, mamba_libraries, mamba_scan
from m1.ops import selective_scan
from m1.ops.backend import Backend


class ScanCase(NamedTuple):
    """The tensors that every contender of the scan benchmark computes with.

    Attributes:
        inputs: the arguments of `selective_scan` by name.
        dy: the gradient of the output y [batch, length, D].
    """

    inputs: dict[str, Tensor]
    dy: Tensor


def run(options: ScanOptions) -> dict[str, Any]:
    """Measures all backends and peers. Returns the result that is printed and written.

    Gradients are checked on the first sequence of the batch. On a CPU, loops in Python are also timed on that sequence
    alone: each step of their backward pass fills gradients as large as the inputs of all steps, which would take many
    minutes for a batch.
    """
    limits, result = begin(options)
    batch = make_case(options)
    sequence = first_sequence(batch)
    scans, result["skipped"] = make_scans(options, batch)
    singles, _ = make_scans(options, sequence)

    y, work = forward(own_scan("reference", batch)), least_work(batch, backward=False)
    contenders = [Contender(scan.name, partial(forward, scan), work, y) for scan in scans]
    rows = [{"pass": "forward"} | row for row in contest(contenders, limits, options)]

    gradients, contenders = forward_backward(own_scan("reference", sequence)), []
    for scan, single in zip(scans, singles, strict=True):
        timed, case = (single, sequence) if scan.loop and options.device == "cpu" else (scan, batch)
        work, check = least_work(case, backward=True), partial(forward_backward, single)
        contenders.append(Contender(scan.name, partial(forward_backward, timed), work, gradients, check))
    for row in contest(contenders, limits, options):
        if "tokens" in row:
            case_options = replace(options, batch=row["tokens"] // options.length)
            peak = peak_memory(case_options, row["name"])
            row |= {} if peak is None else {"peak_memory_bytes": peak}
        rows.append({"pass": "forward+backward"} | row)
    return result | {"rows": rows}


def make_case(options: ScanOptions) -> ScanCase:
    """A case of the sizes in `options`, with random numbers."""
    generator = torch.Generator(options.device).manual_seed(0)
    tokens = (options.batch, options.length)
    inputs = mamba_inputs(generator, tokens, options.inner, options.kv, options.state, options.torch_dtype)
    dy = torch.empty_like(inputs["z"]).normal_(generator=generator)
    return ScanCase(inputs, dy)


def first_sequence(batch: ScanCase) -> ScanCase:
    """The case's first sequence as a batch of one."""
    inputs = {name: tensor[:1] if tensor.ndim == 3 else tensor for name, tensor in batch.inputs.items()}
    return ScanCase(inputs, batch.dy[:1])


def make_scans(options: ScanOptions, case: ScanCase) -> tuple[list[Scan], list[str]]:
    """This package's backends, then the peers. Also returns one line for each peer that is left out."""
    libraries, skipped = mamba_libraries(options.device)
    own = [own_scan(backend, case) for backend in options.chosen_backends()]
    return own + [mamba_scan(library, *case) for library in libraries], skipped


def own_scan(backend: Backend, case: ScanCase) -> Scan:
    """This package's scan with one backend."""

    def call(leaves: Inputs) -> Tensor:
        return selective_scan(**leaves, backend=backend)[0]

    return Scan(backend, backend == "reference", case.inputs, call, case.dy)


@torch.no_grad()
def forward(scan: Scan) -> dict[str, Tensor]:
    """y, computed without gradients."""
    return {"y": scan.forward(scan.leaves)}


def forward_backward(scan: Scan) -> dict[str, Tensor]:
    """y, and the gradient of each leaf, named "d" plus the leaf's name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in scan.leaves.items()}
    y = scan.forward(leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), scan.dy)
    return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def least_work(case: ScanCase, backward: bool) -> Work:
    """The minimum work of the forward pass, or of forward and backward together.

    Forward reads the inputs and writes y. Backward reads the inputs and the gradient of y, and writes the gradients of
    the inputs. Forward needs seven operations per state: dt A, exp, decay, dt u B, addition, C h, addition. Backward
    counts as twice the operations of forward, as is usual.
    """
    inputs, y = nbytes(*case.inputs.values()), case.dy.nbytes
    operations = case.dy.numel() * (7 * case.inputs["A"].shape[1] + 2 * TAPS)
    tokens = case.dy.shape[:2].numel()
    return Work(3 * inputs + 2 * y, 3 * operations, tokens) if backward else Work(inputs + y, operations, tokens)


def peak_memory(options: ScanOptions, name: str) -> int | None:
    """Bytes that forward and backward need in addition to their inputs."""
    if options.device == "cpu":
        return in_fresh_process(_peak_memory, options, name)
    return _peak_memory(options, name)


def _peak_memory(options: ScanOptions, name: str) -> int | None:
    # A short scan runs first, so that the memory of loaded code and threads isn't counted.
    for case_options in (replace(options, batch=1, length=2), options):
        scans, _ = make_scans(case_options, make_case(case_options))
        scan = next(scan for scan in scans if scan.name == name)
        growth = peak_growth(partial(forward_backward, scan), torch.device(options.device))
    return growth
