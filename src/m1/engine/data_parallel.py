"""Several engines on one host: a process per device, each with the whole model, that share a list of requests."""

import logging
import math
import multiprocessing
import signal
import traceback
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from m1.engine.llm import LLM, FinishedSample
from m1.engine.sequence import Request
from m1.errors import M1Warning, UserError
from m1.hub import checkpoint_folder
from m1.model.checkpoint import load_model
from m1.ops.backend import default_device

SPAWN = multiprocessing.get_context("spawn")  # CUDA doesn't survive a fork


def devices_of(devices: str | None) -> list[str]:
    """The devices that the option `devices` names.

    Args:
        devices: "all" GPUs of this host; or a list such as "cuda:0,cuda:1"; None or "auto" for one device. On a host
            without GPUs "all" is one device, too.

    Raises:
        UserError: a device that this host doesn't have, or a GPU that is named twice.
    """
    count = torch.cuda.device_count()
    if devices in (None, "auto") or (devices == "all" and count < 2):
        return [default_device()]
    known = ["cpu", *(f"cuda:{i}" for i in range(count))]
    named = known[1:] if devices == "all" else [name.strip() for name in str(devices).split(",")]
    for name in named:
        if name not in known:
            raise UserError(f"devices {devices}: no device {name!r} here; there are {', '.join(known)}, or give all")
        if name != "cpu" and named.count(name) > 1:
            raise UserError(f"devices {devices}: {name} is named twice; a GPU runs one engine")
    return named


@contextmanager
def load_llm(
    folder: str | Path, devices: str | None = None, dtype: str = "auto", **options: Any
) -> Iterator["LLM | DataParallel"]:
    """Loads a checkpoint as an `LLM` on one device or as a `DataParallel` on several, which ends with the context.

    Args:
        folder: checkpoint folder, Hub id, or on one device a GGUF file.
        devices: see `devices_of`.
        dtype: of the weights.
        options: those of `LLM`.
    """
    device, *others = devices_of(devices)
    if not others:
        yield LLM.from_pretrained(folder, dtype, device, **options)
        return
    parallel = DataParallel(checkpoint_folder(folder), [device, *others], dtype, **options)
    try:
        yield parallel
    finally:
        parallel.close()


class DataParallel:
    """Runs requests as `LLM.run` does, on several devices at once.

    Each device has a worker process with the whole model and an engine. Workers take requests in order, whenever their
    engine has room, so no device idles while another has a queue. All samples of a request stay on one device. As a
    sample depends only on its request and index, it is the one that a single device gives.

    Args:
        folder: the checkpoint's folder.
        devices: one per worker, such as "cuda:0". "cpu" may be repeated.
        dtype: of the weights.
        options: those of `LLM`, for each worker.

    Attributes:
        model: the model on the CPU, for its configuration and its weights' hash.
        tokenizer: its tokenizer.
        encode, decode: as in `LLM`.
    """

    def __init__(self, folder: str | Path, devices: list[str], dtype: str = "auto", **options: Any):
        texts = LLM(*load_model(folder, "cpu", dtype=dtype), **options)
        self.model, self.tokenizer, self.encode, self.decode = texts.model, texts.tokenizer, texts.encode, texts.decode
        self._next = SPAWN.Value("q")  # index of the next request that a worker takes
        self._settings = folder, devices, dtype, options
        self._workers: list[Worker] = []
        self._start()

    def run(self, requests: list[Request]) -> Generator[list[FinishedSample], None, None]:
        """Yields finished samples as they come. The workers' clocks start together, when all engines are made.

        Closing the iterator before its end, or an error, ends the workers. The next call starts new ones.

        Raises:
            UserError: a prompt the engine refuses, or a worker that was killed.
            RuntimeError: a fault in a worker, with its traceback.
        """
        self._start()
        complete = False
        try:
            self._next.value = 0
            for message in (requests, None):  # the work; then, when all are ready, the start
                for worker in self._workers:
                    worker.receive()
                for worker in self._workers:
                    worker.send(message)
            working = {worker.connection: worker for worker in self._workers}
            while working:
                for connection in wait(list(working)):
                    if (samples := working[connection].receive()) is None:  # type: ignore[index]
                        del working[connection]  # type: ignore[arg-type]
                    else:
                        yield samples
            complete = True
        finally:
            if not complete:
                self.close()

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers = []

    def _start(self) -> None:
        folder, devices, dtype, options = self._settings
        if not self._workers:
            self._workers = [Worker(self._next, device, devices, folder, dtype, options) for device in devices]


class Worker:
    """A worker process, and the pipe to it. The process ends when the pipe is closed, so it doesn't outlive its parent.

    It sends lists of finished samples, warnings, the exception that ended it, and None when it waits for a message or
    has no more samples.
    """

    def __init__(self, next_request: Any, device: str, *settings: Any):
        self.device = device
        self.connection, child = SPAWN.Pipe()
        arguments = (child, next_request, device, *settings)
        self.process = SPAWN.Process(target=_work, args=arguments, name=f"m1 {device}", daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited: Ctrl-C is the parent's
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        child.close()

    def send(self, message: list[Request] | None) -> None:
        """Sends a message. Raises UserError if the process has died."""
        try:
            self.connection.send(message)
        except OSError:
            raise self._death() from None

    def receive(self) -> list[FinishedSample] | None:
        """The next message, after passing on warnings. Raises what ended the process, or UserError if it was killed."""
        while True:
            try:
                message = self.connection.recv()
            except (EOFError, OSError):
                raise self._death() from None
            if isinstance(message, Warning):
                warnings.warn(message, stacklevel=2)
            elif isinstance(message, Exception):
                raise message
            else:
                return message

    def _death(self) -> UserError:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return UserError(f"the engine on {self.device} {how}: see whether memory ran out, and run again to resume")


def _work(
    connection: Connection, next_request: Any, device: str, devices: list[str], folder: Path, dtype: str, options: dict
) -> None:
    """What a worker process does until its parent closes the pipe."""
    logging.disable(logging.WARNING)  # the parent, which loads the same model, says it once
    disable_progress_bar()

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, M1Warning):
            connection.send(message)

    warnings.showwarning = show  # type: ignore[assignment]
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        try:
            if device == "cpu":
                torch.set_num_threads(max(1, torch.get_num_threads() // devices.count("cpu")))
            else:
                torch.cuda.set_device(device)
            llm = LLM(*load_model(folder, device, dtype=dtype), **options)
            while True:
                connection.send(None)
                _take_requests(llm, connection, next_request, len(devices))
                connection.send(None)
        except UserError as error:
            connection.send(UserError(f"{device}: {error}"))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception:
            connection.send(RuntimeError(f"the engine on {device} failed:\n{traceback.format_exc()}"))


def _take_requests(llm: LLM, connection: Connection, next_request: Any, workers: int) -> None:
    """Receives requests, and runs as many of them as are left whenever the engine has room."""
    requests: list[Request] = connection.recv()
    engine = llm.prepare(requests)
    for request in requests:
        engine.check(request)
    connection.send(None)
    connection.recv()  # all engines are ready
    total = sum(request.params.n for request in requests)
    room = min(engine.num_slots, math.ceil(total / workers))  # a small job is shared evenly
    taken: list[Request] = []
    unfinished = 0  # number of samples

    def take() -> None:
        nonlocal unfinished
        while unfinished < room:
            with next_request.get_lock():
                i, next_request.value = next_request.value, next_request.value + 1
            if i >= len(requests):
                return
            taken.append(requests[i])
            unfinished += requests[i].params.n

    take()
    for samples in llm.run(taken) if taken else ():
        if samples:
            connection.send(samples)
            unfinished -= len(samples)
        elif connection.poll():
            connection.recv()  # EOFError: the parent, which sends nothing meanwhile, is gone
        take()
