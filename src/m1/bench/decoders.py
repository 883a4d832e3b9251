"""The engines that `m1 bench decode` times: this one and its peers, with one type of function for all, `Decoder`.

A decoder warms up before its first run of a batch, so that compiling, capturing and allocating aren't timed.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from m1.bench.models import SHAPES
from m1.bench.options import DecodeOptions, EngineOptions
from m1.engine import Engine, Request, SamplingParams
from m1.engine.slots import PAGE_SIZE, sequences_that_fit
from m1.errors import UserError
from m1.model import M1Config, M1ForCausalLM
from m1.model.cache_layout import AttentionCache
from m1.model.configuration import ATTENTION, MAMBA
from m1.peers.vllm_client import find_python, start_vllm

STEPS, WARMUPS = 24, 4  # timed steps at each context, and untimed steps before them


class TimedRun(NamedTuple):
    """One timed run of a batch by one engine.

    Attributes:
        seconds: time from the first prompt's submission to the last token.
        together: number of samples that were decoded in parallel.
        largest: the largest batch that fits into memory, None if unknown.
        peak_bytes: peak memory in bytes, None if unknown.
        versions: of a peer and its libraries, None for this engine.
    """

    seconds: float
    together: int
    largest: int | None = None
    peak_bytes: int | None = None
    versions: dict[str, str] | None = None


Timed = TypeVar("Timed")
Decoder = Callable[[int, int], TimedRun]  # arguments: batch, new tokens per sample


def make_model(shape: str, dtype: torch.dtype, hybrid: bool, max_model_len: int) -> PreTrainedModel:
    """A model of one of SHAPES with random weights, on torch's default device. Without `hybrid` it is a Llama."""
    sizes = dict(SHAPES[shape], max_position_embeddings=max_model_len)
    attention = sizes.pop("attention")
    torch.manual_seed(0)
    if not hybrid:
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).eval()
    kinds = [ATTENTION if i in attention else MAMBA for i in range(sizes["num_hidden_layers"])]
    return M1ForCausalLM(M1Config(**sizes, layer_types=kinds)).to(dtype).eval()


def model_on_device(options: EngineOptions, hybrid: bool) -> PreTrainedModel:
    """The benchmark's model on its device."""
    with torch.device(options.device):
        return make_model(options.shape, options.torch_dtype, hybrid, options.max_model_len)


def random_prompts(shape: str, count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` random tokens, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(SHAPES[shape]["vocab_size"], (count, length), generator=generator).tolist()


def take_turns(
    options: EngineOptions,
    works: Sequence[Iterable[int]],
    start: Callable[[str, Any], AbstractContextManager[Callable[..., Timed]]],
    on_run: Callable[[str, int, Timed], None],
) -> list[dict[str, list[Timed]]]:
    """Runs each of `works` `options.repeats` times with each chosen engine.

    On a CPU engines take turns, so that a disturbance affects all of them. On a GPU one engine follows the other,
    because each needs most of the memory.

    Args:
        start: starts an engine by name. It is called with a work's numbers.
        on_run: receives the engine's name, the work's index and the run, after each run.

    Returns:
        For each work, the runs by the engine's name.
    """
    runs: list[dict[str, list[Timed]]] = [{} for _ in works]

    def measure(names: list[str]) -> None:
        with ExitStack() as stack:
            engines = {name: stack.enter_context(start(name, options)) for name in names}
            for i, work in enumerate(works):
                for _ in range(options.repeats):
                    for name, run in engines.items():
                        runs[i].setdefault(name, []).append(run(*work))
                        on_run(name, i, runs[i][name][-1])

    chosen = [name for name in options.chosen_engines() if name != "vllm" or not left_out(options)]
    for names in [[name] for name in chosen] if options.device == "cuda" else [chosen]:
        measure(names)
        free_memory(options)
    return runs


def left_out(options: EngineOptions) -> list[str]:
    """What the result says about vLLM if it was chosen but isn't there: one line or none."""
    if "vllm" not in options.chosen_engines() or find_python(options.vllm_python, options.device):
        return []
    fix = "`make peers` installs it" if options.device == "cpu" else "give --vllm-python"
    return [f"vllm isn't there: {fix}"]


def free_memory(options: EngineOptions) -> None:
    """Returns the memory of deleted models and engines to the GPU."""
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()


def clock(options: EngineOptions) -> float:
    """The clock's seconds, after all queued work on a GPU is done."""
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def start(name: str, options: DecodeOptions) -> Iterator[Decoder]:
    """Starts one of ENGINES. Its processes end with the context."""
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
    """Whether an engine of this name decodes the hybrid model."""
    return name.startswith("ours-hybrid")


def whole_batches(options: DecodeOptions, hybrid: bool, quantize: str | None = None) -> Decoder:
    """A decoder that runs this engine on every token of every sample."""
    model = model_on_device(options, hybrid)
    engine: Engine | None = None

    def decode(engine: Engine, batch: int, new: int) -> None:
        engine.generate(random_prompts(options.shape, batch, options.prompt), SamplingParams(max_tokens=new))

    def run(batch: int, new: int) -> TimedRun:
        nonlocal engine
        length = options.prompt + new
        if engine is None or (engine.num_slots, engine.max_model_len) != (batch, length):
            engine = Engine(model, [], batch, max_model_len=length, prefix_cache=0, quantize=quantize)
            if engine.num_slots < batch:
                raise UserError(f"memory has room for {engine.num_slots} sequences of {length} tokens, not {batch}")
            decode(engine, batch, min(new, 2))
        began = clock(options)
        decode(engine, batch, new)
        return TimedRun(clock(options) - began, batch)

    return run


def at_contexts(options: DecodeOptions, hybrid: bool, quantize: str | None = None) -> Decoder:
    """A decoder that times a few steps of this engine at each of `options.contexts` context lengths.

    The lengths are evenly spread over those of the batch. The batch's time is estimated: the mean step for each new
    token, plus the time of a single prompt for each prompt. If the batch doesn't fit into memory, it counts as several
    parts that do, one after the other. Each batch loads its own model, because a second one would take memory.
    """

    def run(batch: int, new: int) -> TimedRun:
        free_memory(options)
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model = model_on_device(options, hybrid)
        length, parts = options.prompt + new, options.contexts or 1
        largest = sequences_that_fit(model.config, length, PAGE_SIZE, model.dtype, model.device)
        engine = Engine(model, [], min(batch, largest), max_model_len=length, prefix_cache=0, quantize=quantize)
        together = engine.num_slots
        contexts = [options.prompt + (2 * i + 1) * new // (2 * parts) for i in range(parts)]
        step = sum(seconds_of_step(options, engine, context) for context in contexts) / parts
        seconds = together * seconds_of_prompt(options, engine) + new * step
        peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
        return TimedRun(seconds * batch / together, together, largest, peak)

    return run


def seconds_of_step(options: DecodeOptions, engine: Engine, context: int) -> float:
    """Seconds of a step that decodes in all slots, at a context of about `context` tokens."""
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
    unshare_pages(engine)
    for _ in range(WARMUPS):
        engine.step()
    began = clock(options)
    for _ in range(steps):
        engine.step()
    seconds = (clock(options) - began) / steps
    engine.abort(request)
    return seconds


@torch.inference_mode()
def unshare_pages(engine: Engine) -> None:
    """Copies the pages that sequences share with the first one, as if each had a prompt of its own.

    Else a step would read shared keys from a GPU's cache, which is faster than from its memory.
    """
    slots, pages = engine.executor.slots, engine.scheduler.pages
    for sequence in engine.running:
        shared = [page for page in sequence.pages if pages.shared(page)]  # a prompt's full pages, the first ones
        own = pages.take(len(shared))
        source, target = (torch.tensor(p, dtype=torch.long, device=slots.page_table.device) for p in (shared, own))
        for layer in slots.layers:
            if isinstance(layer, AttentionCache):
                for buffer in layer:
                    buffer.index_copy_(0, target, buffer[source])
        slots.page_table[sequence.slot, : len(own)] = target.int()
        sequence.pages[: len(own)] = own
        pages.release(shared)


def seconds_of_prompt(options: DecodeOptions, engine: Engine, count: int = 4) -> float:
    """Seconds of one prompt's prefill, until its first token."""
    began = clock(options)
    engine.generate(random_prompts(options.shape, count, options.prompt), SamplingParams(max_tokens=1))
    return (clock(options) - began) / count


def transformers_generate(options: DecodeOptions) -> Decoder:
    """A decoder that runs transformers' `generate`.

    On a GPU its cache is static, because transformers then compiles the decode step.
    """
    model: Any = model_on_device(options, hybrid=False)
    sampling: dict[str, Any] = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    if options.device == "cuda":
        sampling["cache_implementation"] = "static"
    warm: set[tuple[int, int]] = set()

    def run(batch: int, new: int) -> TimedRun:
        prompts = torch.tensor(random_prompts(options.shape, batch, options.prompt), device=options.device)

        def generate() -> float:
            began = clock(options)
            mask = torch.ones_like(prompts)
            model.generate(prompts, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, **sampling)
            return clock(options) - began

        if (batch, new) not in warm:  # the static cache has the sample's length: each length compiles anew
            generate()
            warm.add((batch, new))
        return TimedRun(generate(), batch)

    return run


@contextmanager
def vllm(options: DecodeOptions) -> Iterator[Decoder]:
    """A decoder that runs the transformer in vLLM."""
    most = max(cell.batch for cell in options.chosen_cells())
    python = find_python(options.vllm_python, options.device)
    with start_vllm(model_on_device(options, hybrid=False), options.max_model_len, most, python) as ask:
        warm: set[int] = set()

        def run(batch: int, new: int) -> TimedRun:
            work = {"batch": batch, "prompt": options.prompt, "new_tokens": new, "seed": 0}
            if batch not in warm:
                ask(work | {"new_tokens": 2})
                warm.add(batch)
            return TimedRun(ask(work)["seconds"], batch, versions=ask.versions)

        yield run
