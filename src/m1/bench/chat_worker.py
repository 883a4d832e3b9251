"""Generates with this engine, in a process of its own, so that its memory can be told from the others'.

    python -m m1.bench.chat_worker MODEL --dtype bfloat16 --quantize int4 --max-model-len N --max-num-seqs B

The work and the answers are those of m1/peers/llama_worker.py.
"""

import argparse
import json
import sys
import time
from typing import Any

import torch

from m1.engine import LLM, Engine, Request, SamplingParams
from m1.errors import UserError


def main() -> int:
    """Runs the program. Returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--quantize", required=True, choices=["none", "int8", "int4"])
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    options = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        model = LLM.from_pretrained(options.model, options.dtype, "cpu").model
        sizes = {"max_num_seqs": options.max_num_seqs, "max_model_len": options.max_model_len}
        quantize = None if options.quantize == "none" else options.quantize
        engine = Engine(model, [], **sizes, prefix_cache=0, quantize=quantize)
    except UserError as error:
        answer({"error": str(error)})
        return 1
    settings = sizes | {"quantize": quantize, "dtype": str(model.dtype).removeprefix("torch.")}
    answer({"ready": True, "versions": {"torch": torch.__version__}, "settings": settings})
    for line in sys.stdin:
        answer(generate(engine, **json.loads(line)))
    return 0


def generate(engine: Engine, batch: int, prompt: int, new_tokens: int, seed: int) -> dict[str, Any]:
    """Samples a batch of random prompts of `prompt` tokens. No sample ends before `new_tokens`."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(engine.vocab_size, (batch, prompt), generator=generator).tolist()
    params = SamplingParams(max_tokens=new_tokens, seed=seed)
    requests = [Request(tokens, params, i) for i, tokens in enumerate(prompts)]
    began = time.perf_counter()
    for _ in engine.run(requests):
        pass
    return {"seconds": time.perf_counter() - began, "tokens": batch * new_tokens}


if __name__ == "__main__":
    sys.exit(main())
