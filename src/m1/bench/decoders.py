"""What `m1 bench decode` times: the engine and its peers, each a function of a batch and its new tokens.

A decoder warms up when it first meets a batch: what compiles, captures or allocates does so before the clock starts.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from m1.bench.options import DTYPES, Options
from m1.engine import Engine, Request, SamplingParams
from m1.engine.state import slots_that_fit
from m1.errors import UserError
from m1.model import M1Config, M1ForCausalLM
from m1.model.configuration import ATTENTION, MAMBA
from m1.peers.vllm_client import start_vllm, version

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=1000, attention=(1, 3),
    ),
    "30m": dict(
        hidden_size=512, intermediate_size=1344, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, vocab_size=16000, attention=(3, 7),
    ),
    "100m": dict(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
        head_dim=64, vocab_size=16000, attention=(3, 7, 11),
    ),
    "m1-3b": dict(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, attention=(3, 8, 13, 18, 23, 27), tie_word_embeddings=True,
    ),
}  # fmt: skip
OURS = ("ours-hybrid", "ours-transformer", "ours-hybrid-int8", "ours-transformer-int8")
ENGINES = (*OURS, "transformers", "vllm")
STEPS, WARMUPS = 24, 4  # timed at each context, and before them


class Run(NamedTuple):
    """A batch: seconds from the first prompt's submission to the last token, and how many samples went together.

    `largest` is the batch that memory has room for, `peak_bytes` the memory that was taken, where these are known.
    """

    seconds: float
    together: int
    largest: int | None = None
    peak_bytes: int | None = None


Decoder = Callable[[int, int], Run]  # of a batch and so many new tokens each


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(Options):
    """`cells`: pairs of batch and new tokens. `engines`: some of ENGINES. `contexts`: see `at_contexts`."""

    name = "decode"

    shape: str
    cells: list[tuple[int, int]]
    prompt: int
    engines: list[str]
    contexts: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.shape in SHAPES, "shape", f"choose {', '.join(SHAPES)}")
        for engine in self.engines:
            if engine not in ENGINES:
                raise UserError(f"--engines: no engine {engine!r}; choose from {', '.join(ENGINES)}")
        for number in (number for cell in self.cells for number in cell):
            if number < 1:
                raise UserError(f"--cells {number}: must be at least 1")
        if self.contexts and not all(engine.startswith("ours") for engine in self.engines):
            raise UserError("--contexts times steps of this engine: choose --engines ours-hybrid,ours-transformer")

    @property
    def max_model_len(self) -> int:
        return self.prompt + max(new for _, new in self.cells)


def make_model(shape: str, dtype: torch.dtype, hybrid: bool, max_model_len: int) -> PreTrainedModel:
    """One of SHAPES with random weights, on the device of the context. A transformer is a Llama."""
    sizes = dict(SHAPES[shape], max_position_embeddings=max_model_len)
    attention = sizes.pop("attention")
    torch.manual_seed(0)
    if not hybrid:
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).eval()
    kinds = [ATTENTION if i in attention else MAMBA for i in range(sizes["num_hidden_layers"])]
    return M1ForCausalLM(M1Config(**sizes, layer_types=kinds)).to(dtype).eval()


def model_on_device(options: DecodeOptions, hybrid: bool) -> PreTrainedModel:
    with torch.device(options.device):
        return make_model(options.shape, DTYPES[options.dtype], hybrid, options.max_model_len)


def random_prompts(shape: str, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(SHAPES[shape]["vocab_size"], (count, length), generator=generator).tolist()


def clock(options: DecodeOptions) -> float:
    """Seconds, all work done."""
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def start(name: str, options: DecodeOptions) -> Iterator[Decoder]:
    match name:
        case "vllm":
            with vllm(options) as decoder:
                yield decoder
        case "transformers":
            yield transformers_generate(options)
        case _:
            measure = at_contexts if options.contexts else whole_batches
            yield measure(options, is_hybrid(name), "int8" if name.endswith("-int8") else None)


def is_hybrid(name: str) -> bool:
    return name.startswith("ours-hybrid")


def whole_batches(options: DecodeOptions, hybrid: bool, quantize: str | None = None) -> Decoder:
    """This engine, every token of every sample."""
    model = model_on_device(options, hybrid)
    engine: Engine | None = None

    def decode(engine: Engine, batch: int, new: int) -> None:
        engine.generate(random_prompts(options.shape, batch, options.prompt), SamplingParams(max_tokens=new))

    def run(batch: int, new: int) -> Run:
        nonlocal engine
        length = options.prompt + new
        if engine is None or (engine.num_slots, engine.max_model_len) != (batch, length):
            engine = Engine(model, [], batch, max_model_len=length, prefix_cache=0, quantize=quantize)
            if engine.num_slots < batch:
                raise UserError(f"memory has room for {engine.num_slots} sequences of {length} tokens, not {batch}")
            decode(engine, batch, min(new, 2))
        began = clock(options)
        decode(engine, batch, new)
        return Run(clock(options) - began, batch)

    return run


def at_contexts(options: DecodeOptions, hybrid: bool, quantize: str | None = None) -> Decoder:
    """This engine, timing a few steps at each of some contexts, evenly spread over those that a batch passes through.

    A batch takes the mean of those steps for each new token, and its prompts the time that one prompt takes alone. Of a
    batch that memory has no room for, as many as fit are decoded together, one such part after the other. The model is
    made for each batch anew: what another one holds would take its memory.
    """

    def run(batch: int, new: int) -> Run:
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = model_on_device(options, hybrid)
        length, parts = options.prompt + new, options.contexts or 1
        largest = slots_that_fit(model.config, length, model.dtype, model.device)
        engine = Engine(model, [], batch, max_model_len=length, prefix_cache=0, quantize=quantize)
        together = engine.num_slots
        contexts = [options.prompt + (2 * i + 1) * new // (2 * parts) for i in range(parts)]
        step = sum(seconds_of_step(options, engine, context) for context in contexts) / parts
        seconds = together * seconds_of_prompt(options, engine) + new * step
        peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
        return Run(seconds * batch / together, together, largest, peak)

    return run


def seconds_of_step(options: DecodeOptions, engine: Engine, context: int) -> float:
    """A step that decodes in all slots, which have seen about `context` tokens."""
    steps = min(STEPS, 2 * (engine.max_model_len - context - WARMUPS) - 2)
    if steps < 1:
        raise UserError(
            f"--contexts: no room for timed steps at {context} of {engine.max_model_len} tokens; give fewer"
        )
    (prompt,) = random_prompts(options.shape, 1, max(1, context - WARMUPS - steps // 2))
    request = Request(prompt, SamplingParams(n=engine.num_slots, max_tokens=WARMUPS + steps + 1))
    engine.submit(request)
    while engine.scheduler.waiting:
        engine.step()
    for _ in range(WARMUPS):
        engine.step()
    began = clock(options)
    for _ in range(steps):
        engine.step()
    seconds = (clock(options) - began) / steps
    engine.abort(request)
    return seconds


def seconds_of_prompt(options: DecodeOptions, engine: Engine, count: int = 4) -> float:
    """A prompt's prefill, by the first token."""
    began = clock(options)
    engine.generate(random_prompts(options.shape, count, options.prompt), SamplingParams(max_tokens=1))
    return (clock(options) - began) / count


def transformers_generate(options: DecodeOptions) -> Decoder:
    """On a GPU with a static cache, with which transformers compiles the decoding step."""
    model: Any = model_on_device(options, hybrid=False)
    sampling: dict[str, Any] = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    if options.device == "cuda":
        sampling["cache_implementation"] = "static"
    warm: set[tuple[int, int]] = set()

    def run(batch: int, new: int) -> Run:
        prompts = torch.tensor(random_prompts(options.shape, batch, options.prompt), device=options.device)

        def generate() -> float:
            began = clock(options)
            mask = torch.ones_like(prompts)
            model.generate(prompts, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, **sampling)
            return clock(options) - began

        if (batch, new) not in warm:  # the static cache's size is the length's: each is compiled for itself
            generate()
            warm.add((batch, new))
        return Run(generate(), batch)

    return run


@contextmanager
def vllm(options: DecodeOptions) -> Iterator[Decoder]:
    """The transformer under vLLM."""
    most = max(batch for batch, _ in options.cells)
    with start_vllm(model_on_device(options, hybrid=False), options.max_model_len, most) as ask:
        print(f"vllm {version()}", file=sys.stderr)
        warm: set[int] = set()

        def run(batch: int, new: int) -> Run:
            work = {"batch": batch, "prompt": options.prompt, "new_tokens": new, "seed": 0}
            if batch not in warm:
                ask(work | {"new_tokens": 2})
                warm.add(batch)
            return Run(ask(work)["seconds"], batch)

        yield run
