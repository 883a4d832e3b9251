"""`m1 bench chat`: one chat and many on a real model, by this engine, llama.cpp and vLLM on a CPU.

Every engine runs in a process of its own, and they take turns. Prompts are random tokens, all submitted at once, the
temperature is 1, and no answer ends early. The same chats with one new token each tell how long the first token takes.
"""

import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from m1.bench.contest import begin
from m1.bench.decoders import OnRun, ignore, quantization_of
from m1.bench.options import ChatOptions
from m1.errors import UserError
from m1.model.checkpoint import load_model
from m1.model.gguf import is_gguf, read_gguf
from m1.peers import vllm_client
from m1.peers.worker import Worker, start_worker

LLAMA_WORKER = Path(vllm_client.__file__).with_name("llama_worker.py")
MOST_CHATS = {"llama.cpp": 8}  # 64 would take minutes: its rate hardly grows with their number
JOULES = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


class TimedChats(NamedTuple):
    """One timed run: seconds until every chat has its first token, of the whole, and joules, None if unreadable."""

    first_seconds: float
    seconds: float
    joules: float | None


def run(options: ChatOptions, on_run: OnRun = ignore) -> dict[str, Any]:
    """Measures all engines. Returns the result that is printed and written."""
    _, result = begin(options)
    runs: dict[tuple[str, int], list[TimedChats]] = {}
    with ExitStack() as stack:
        engines = {name: stack.enter_context(start(name, options)) for name in options.chosen_engines()}

        def so_far() -> dict[str, Any]:
            return result | {"skipped": [], "rows": rows_of(options, runs, engines)}

        for chats in options.chosen_chats():
            able = {name: engine for name, engine in engines.items() if chats <= MOST_CHATS.get(name, chats)}
            for engine in able.values():
                engine(work(options, chats, 2))  # compiles and allocates
            for _ in range(options.repeats):
                for name, engine in able.items():
                    runs.setdefault((name, chats), []).append(timed(engine, options, chats))
                    on_run(f"{name}: {chats} in {runs[name, chats][-1].seconds:.2f} s", so_far())
        return so_far()


def work(options: ChatOptions, chats: int, new_tokens: int) -> dict[str, int]:
    """What an engine is asked."""
    return {"batch": chats, "prompt": options.prompt, "new_tokens": new_tokens, "seed": 0}


def timed(engine: Worker, options: ChatOptions, chats: int) -> TimedChats:
    """Times one engine once."""
    first = engine(work(options, chats, 1))["seconds"]
    before = joules()
    seconds = engine(work(options, chats, options.new_tokens))["seconds"]
    after = joules()
    if before is None or after is None or after < before:  # the counter begins again at its end
        return TimedChats(first, seconds, None)
    return TimedChats(first, seconds, after - before)


def joules() -> float | None:
    """The processor's energy counter, in joules; None where there is none or it can't be read."""
    with suppress(OSError):
        return int(JOULES.read_text()) / 1e6
    return None


def rows_of(
    options: ChatOptions, runs: dict[tuple[str, int], list[TimedChats]], engines: dict[str, Worker]
) -> list[dict[str, Any]]:
    """The rows: medians, and speeds relative to the peers."""
    rows = []
    for (name, chats), taken in runs.items():
        first, seconds = (statistics.median(getattr(one, key) for one in taken) for key in ("first_seconds", "seconds"))
        row = {"name": name, "chats": chats, "runs": len(taken), "seconds": seconds, "first_token_seconds": first}
        row |= {"seconds_min": min(one.seconds for one in taken), "seconds_max": max(one.seconds for one in taken)}
        row["prefill_tokens_per_second"] = chats * options.prompt / first
        row["tokens_per_second"] = chats * (options.new_tokens - 1) / (seconds - first)
        row |= {"peak_memory_bytes": engines[name].peak_bytes(), "versions": engines[name].versions}
        row["settings"] = engines[name].settings
        spent = [one.joules for one in taken if one.joules is not None]
        if spent:
            row["joules_per_token"] = statistics.median(spent) / (chats * options.new_tokens)
        rows.append(row)
    rate = {(row["name"], row["chats"]): row for row in rows}
    for row in rows:
        for peer, key in (("vllm", "vllm"), ("llama.cpp", "llama_cpp")):
            other = rate.get((peer, row["chats"]))
            if other and peer != row["name"]:
                row[f"times_{key}"] = row["tokens_per_second"] / other["tokens_per_second"]
                row[f"prefill_times_{key}"] = row["prefill_tokens_per_second"] / other["prefill_tokens_per_second"]
    return rows


@contextmanager
def start(name: str, options: ChatOptions) -> Iterator[Worker]:
    """Starts an engine of `options.known`."""
    most = min(max(options.chosen_chats()), MOST_CHATS.get(name, max(options.chosen_chats())))
    length = options.prompt + options.new_tokens
    sizes = ["--max-model-len", str(length), "--max-num-seqs", str(most)]
    if name == "vllm":
        with torch.device("cpu"):
            model = (
                read_gguf(Path(options.model), options.dtype)
                if is_gguf(options.model)
                else load_model(options.model, "cpu", dtype=options.torch_dtype)
            )[0]
        with vllm_client.start_vllm(model, length, most, vllm_client.find_python(options.vllm_python, "cpu")) as worker:
            yield worker
        return
    if name == "llama.cpp":
        python = vllm_client.find_python(options.vllm_python, "cpu")
        if python is None:
            raise UserError("llama.cpp isn't installed: `make peers` installs it")
        command = [str(python), str(LLAMA_WORKER), str(options.gguf or options.model), *sizes]
        command += ["--threads", str(torch.get_num_threads())]
    else:
        folder = str(options.hybrid if name.startswith("ours-hybrid") else options.model)
        command = [sys.executable, "-m", "m1.bench.chat_worker", folder, *sizes, "--dtype", options.dtype]
        command += ["--quantize", quantization_of(name) or "none"]
    with start_worker(name, command) as worker:
        yield worker
