"""Generates with llama.cpp. It is a program of its own: any Python that has llama-cpp-python runs it, without M1.

    python llama_worker.py MODEL.gguf --max-model-len N --max-num-seqs B --threads T

Stdout has one JSON object per line. The first is {"ready": true, "versions": ..., "settings": ...}. After it, each line
on stdin is work and has one line as its answer, {"error": why} if the work can't be done:

    {"batch": 64, "prompt": 128, "new_tokens": 512, "seed": 0}
        samples `batch` random prompts together -> {"seconds": of the whole, with prompts, "tokens": sampled in total}

The program ends when stdin does. If llama.cpp can't start, it writes {"error": why} and exits with status 1.
"""

import argparse
import importlib.metadata
import json
import random
import sys
import time
from typing import Any

CHUNK = 512  # tokens per call of llama.cpp, its own default


def main() -> int:
    """Runs the program. Returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--max-model-len", type=int, required=True, help="maximum tokens of a prompt and its sample")
    parser.add_argument("--max-num-seqs", type=int, required=True, help="maximum number of samples decoded together")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    try:
        llama = LlamaCpp(options)
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return 1
    versions = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}
    answer({"ready": True, "versions": versions, "settings": vars(options) | {"n_batch": CHUNK}})
    for line in sys.stdin:
        try:
            answer(llama.generate(**json.loads(line)))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
    return 0


def answer(content: dict[str, Any]) -> None:
    """Writes one line."""
    print(json.dumps(content), flush=True)


class LlamaCpp:
    """llama.cpp on one model, by its C interface, which decodes several sequences together.

    Args:
        options: the command line's.
    """

    def __init__(self, options: argparse.Namespace):
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        defaults = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(options.model.encode(), defaults)
        if not self.model:
            raise ValueError(f"can't load {options.model}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = options.max_model_len * options.max_num_seqs
        settings.n_batch = settings.n_ubatch = CHUNK
        settings.n_seq_max = options.max_num_seqs
        settings.n_threads = settings.n_threads_batch = options.threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise ValueError(f"no context of {settings.n_ctx} tokens for {options.max_num_seqs} sequences")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(max(CHUNK, options.max_num_seqs), 0, 1)
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(1.0))
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(0))
        self.sampler = chain

    def generate(self, batch: int, prompt: int, new_tokens: int, seed: int) -> dict[str, Any]:
        """Samples a batch of random prompts of `prompt` tokens. No sample ends before `new_tokens`."""
        rng = random.Random(seed)
        prompts = [[rng.randrange(self.vocabulary) for _ in range(prompt)] for _ in range(batch)]
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        start = time.perf_counter()
        tokens = [0] * batch
        queue = [(i, j, token, j == prompt - 1) for i, row in enumerate(prompts) for j, token in enumerate(row)]
        for first in range(0, len(queue), CHUNK):
            self.decode(queue[first : first + CHUNK], tokens)
        for step in range(1, new_tokens):
            self.decode([(i, prompt + step - 1, token, True) for i, token in enumerate(tokens)], tokens)
        return {"seconds": time.perf_counter() - start, "tokens": batch * new_tokens}

    def decode(self, entries: list[tuple[int, int, int, bool]], tokens: list[int]) -> None:
        """Runs entries (sequence, position, token, whether the next one is drawn). What is drawn goes into `tokens`."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (sequence, position, token, drawn) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, drawn
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if status := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        for i, (sequence, *_, drawn) in enumerate(entries):
            if drawn:
                tokens[sequence] = self.api.llama_sampler_sample(self.sampler, self.context, i)


if __name__ == "__main__":
    sys.exit(main())
