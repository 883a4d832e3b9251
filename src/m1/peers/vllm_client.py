"""vLLM on a model, in the environment that `make peers` makes for CPUs; vllm_worker.py runs there."""

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from m1.errors import UserError

PYTHON = Path(".venv-peers/bin/python")
WORKER = Path(__file__).with_name("vllm_worker.py")


class Ask(Protocol):
    def __call__(self, work: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's answer to a line of work (see there). Raises UserError if it is an error."""


def installed() -> bool:
    return PYTHON.exists()


@contextmanager
def start_vllm(model: PreTrainedModel, max_len: int, max_seqs: int) -> Iterator[tuple[Ask, dict[str, str]]]:
    """A worker on a copy of the model, in its dtype, and the versions of what it runs on; ends with the context.

    Args:
        max_len: tokens of a prompt and its sample together.
        max_seqs: samples decoded together.

    Raises:
        UserError: it isn't installed, or can't run this model.
    """
    if not installed():
        raise UserError("vllm isn't installed: `make peers` installs it, for CPUs")
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w") as log:
        model.save_pretrained(folder)
        command = [str(PYTHON), str(WORKER), folder, "--dtype", str(model.dtype).removeprefix("torch.")]
        command += ["--max-len", str(max_len), "--max-seqs", str(max_seqs)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdin and process.stdout

        def read() -> dict[str, Any]:
            line = process.stdout.readline() if process.stdout else ""
            answer = json.loads(line) if line else {"error": "it ended without an answer"}
            if "error" in answer:
                raise UserError(f"vllm: {answer['error']}")
            return answer

        def ask(work: Mapping[str, Any]) -> dict[str, Any]:
            print(json.dumps(work), file=process.stdin, flush=True)
            return read()

        try:
            yield ask, read()["versions"]
        finally:
            process.stdin.close()
            process.wait(timeout=60)
