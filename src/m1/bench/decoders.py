"""The engines that `m1 bench decode` times: this one and its peers, with one type of function for all, `Decoder`.

A decoder warms up before its first run of a batch, so that compiling, capturing and allocating aren't timed.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, get_args

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from m1.bench.models import SHAPES
from m1.bench.options import VLLM, DecodeOptions, EngineOptions
from m1.engine import Engine, Request, SamplingParams
from m1.errors import UserError
from m1.model import M1Config, M1ForCausalLM
from m1.model.cache_layout import AttentionCache
from m1.model.configuration import ATTENTION, MAMBA
from m1.options import Quantization
from m1.peers.vllm_client import find_python, start_vllm

STEPS, WARMUPS = 24, 4  # timed steps at each context, and untimed steps before them


class TimedRun(NamedTuple):
    """One timed run of a batch by one engine.

    Attributes:
        seconds: time from the first prompt's submission to the last token.
        together: context lengths, and how many samples were decoded in parallel at each.
        peak_bytes: peak memory in bytes, None if unknown.
        versions: of a peer and its libraries, None for this engine.
    """

    seconds: float
    together: dict[int, int]
    peak_bytes: int | None = None
    versions: dict[str, str] | None = None


class Timed(Protocol):
    """A timed run of any benchmark of engines."""

    @property
    def seconds(self) -> float: ...


TimedT = TypeVar("TimedT", bound=Timed)
Work = TypeVar("Work", bound=tuple[int, ...])
OnRun = Callable[[str, dict[str, Any]], None]  # arguments: a line of text, the result so far
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


def measure_engines(
    options: EngineOptions,
    works: Sequence[Work],
    start: Callable[[str, Any], AbstractContextManager[Callable[..., TimedT]]],
    rows_of: Callable[[Work, dict[str, list[TimedT]]], list[dict[str, Any]]],
    result: dict[str, Any],
    on_run: OnRun,
) -> dict[str, Any]:
    """Runs each of `works` `options.repeats` times with each chosen engine.

    On a CPU engines take turns, so that a disturbance affects all of them. On a GPU one engine follows the other,
    because each needs most of the memory.

    Args:
        start: starts an engine by name. It is called with a work's numbers.
        rows_of: makes the rows of one work from its runs by the engine's name.
        result: the head of the result.
        on_run: receives a line of text and the result so far, after each run.

    Returns:
        The result.
    """
    runs: list[dict[str, list[TimedT]]] = [{} for _ in works]

    def so_far() -> dict[str, Any]:
        rows = [row for work, taken in zip(works, runs, strict=True) for row in rows_of(work, taken)]
        return result | {"skipped": left_out(options), "rows": rows}

    def measure(names: list[str]) -> None:
        with ExitStack() as stack:
            engines = {name: stack.enter_context(start(name, options)) for name in names}
            for work, taken in zip(works, runs, strict=True):
                for _ in range(options.repeats):
                    for name, run in engines.items():
                        taken.setdefault(name, []).append(run(*work))
                        on_run(f"{name}: {'x'.join(map(str, work))} in {taken[name][-1].seconds:.2f} s", so_far())

    chosen = [name for name in options.chosen_engines() if name not in VLLM or not left_out(options)]
    for names in [[name] for name in chosen] if options.device == "cuda" else [chosen]:
        measure(names)
        free_memory(options)
    return so_far()


def ignore(line: str, result: dict[str, Any]) -> None:
    """What hears of each run, if nobody does."""


def left_out(options: EngineOptions) -> list[str]:
    """What the result says about vLLM if it was chosen but isn't there: one line or none."""
    if not set(VLLM) & set(options.chosen_engines()) or find_python(options.vllm_python, options.device):
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
        case "vllm" | "vllm-hybrid":
            with vllm(options, is_hybrid(name)) as decoder:
                yield decoder
        case "transformers":
            yield transformers_generate(options)
        case _:
            measure = at_contexts if options.contexts else whole_batches
            yield measure(options, is_hybrid(name), quantization_of(name))


def quantization_of(name: str) -> Quantization | None:
    """How an engine of this name rounds the weights."""
    return next((kind for kind in get_args(Quantization) if name.endswith(f"-{kind}")), None)


def is_hybrid(name: str) -> bool:
    """Whether an engine of this name decodes the hybrid model."""
    return name.startswith(("ours-hybrid", "vllm-hybrid"))


def whole_batches(options: DecodeOptions, hybrid: bool, quantize: Quantization | None = None) -> Decoder:
    """A decoder that runs this engine on every token of every sample."""
    model = model_on_device(options, hybrid)
    engine: Engine | None = None

    def decode(engine: Engine, batch: int, new: int) -> None:
        engine.generate(random_prompts(options.shape, batch, options.prompt), SamplingParams(max_tokens=new))

    def run(batch: int, new: int) -> TimedRun:
        nonlocal engine
        length = options.prompt + new
        if engine is None or (engine.num_slots, engine.max_model_len) != (batch, length):
            engine = None
            free_memory(options)
            engine = Engine(model, [], batch, max_model_len=length, prefix_cache=0, quantize=quantize)
            if engine.num_slots < batch:
                raise UserError(f"memory has room for {engine.num_slots} sequences of {length} tokens, not {batch}")
            decode(engine, batch, min(new, 2))
        began = clock(options)
        decode(engine, batch, new)
        return TimedRun(clock(options) - began, whole(options, batch, new))

    return run


def at_contexts(options: DecodeOptions, hybrid: bool, quantize: Quantization | None = None) -> Decoder:
    """A decoder that times a few steps of this engine at some context lengths of the batch, see `estimate`.

    Each batch loads its own model, because a second one would take memory.
    """

    def run(batch: int, new: int) -> TimedRun:
        free_memory(options)
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model, length = model_on_device(options, hybrid), options.prompt + new
        engine = Engine(model, [], batch, max_model_len=length, prefix_cache=0, quantize=quantize)
        taken = estimate(
            options, batch, new, seconds_of_prompts(options, engine, batch), partial(seconds_of_step, options, engine)
        )
        return taken._replace(peak_bytes=torch.cuda.max_memory_allocated() if options.device == "cuda" else None)

    return run


def estimate(
    options: DecodeOptions, batch: int, new: int, prompts: float, time_steps: Callable[[int], tuple[float, int]]
) -> TimedRun:
    """The time of a batch from a few steps at each of `options.contexts` context lengths, evenly spread over its own.

    Where memory has no room for the whole batch at a context, the step counts as often as parts of the batch that fit.

    Args:
        prompts: seconds until each prompt of the batch has its first token.
        time_steps: called with a context. Returns the seconds of a step, and how many samples it decoded.
    """
    parts = options.contexts or 1
    contexts = [options.prompt + (2 * i + 1) * new // (2 * parts) for i in range(parts)]
    steps = {context: time_steps(context) for context in contexts}
    mean = sum(seconds * batch / together for seconds, together in steps.values()) / parts
    return TimedRun(prompts + new * mean, {context: together for context, (_, together) in steps.items()})


def seconds_of_step(options: DecodeOptions, engine: Engine, context: int) -> tuple[float, int]:
    """Seconds of a step at a context of about `context` tokens, and of how many samples: as many as have room."""
    steps = min(STEPS, 2 * (engine.max_model_len - context - WARMUPS) - 2)
    if steps < 1:
        raise UserError(
            f"--contexts: no room for timed steps at {context} of {engine.max_model_len} tokens; give fewer"
        )
    (prompt,) = random_prompts(options.shape, 1, max(1, context - WARMUPS - steps // 2))
    new, pages = WARMUPS + steps + 1, engine.scheduler.pages
    together = min(engine.num_slots, len(pages.free) // pages.for_tokens(len(prompt) + new))
    request = Request(prompt, SamplingParams(n=together, max_tokens=new))
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
    return seconds, together


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


def seconds_of_prompts(options: DecodeOptions, engine: Engine, batch: int) -> float:
    """Seconds until each prompt of a batch has its first token, after a warm-up."""
    for count in (1, batch):
        began = clock(options)
        engine.generate(random_prompts(options.shape, count, options.prompt), SamplingParams(max_tokens=1))
    return clock(options) - began


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
        return TimedRun(generate(), whole(options, batch, new))

    return run


@contextmanager
def vllm(options: DecodeOptions, hybrid: bool) -> Iterator[Decoder]:
    """A decoder that runs a model in vLLM: every token, or with `--contexts` a few steps, see `estimate`."""
    most = max(cell.batch for cell in options.chosen_cells())
    python = find_python(options.vllm_python, options.device)
    with start_vllm(model_on_device(options, hybrid), options.max_model_len, most, python) as ask:
        warm: set[int] = set()

        def seconds(batch: int, new: int) -> float:
            work = {"batch": batch, "prompt": options.prompt, "new_tokens": new, "seed": 0}
            if batch not in warm:
                ask(work | {"new_tokens": 2})
                warm.add(batch)
            return float(ask(work)["seconds"])

        def time_steps(batch: int, context: int) -> tuple[float, int]:
            answer = ask({"batch": batch, "context": context, "warmups": WARMUPS, "steps": STEPS, "seed": 0})
            return answer["seconds"], answer["together"]

        def run(batch: int, new: int) -> TimedRun:
            if options.contexts:
                taken = estimate(options, batch, new, seconds(batch, 1), partial(time_steps, batch))
            else:
                taken = TimedRun(seconds(batch, new), whole(options, batch, new))
            return taken._replace(versions=ask.versions)

        yield run


def whole(options: DecodeOptions, batch: int, new: int) -> dict[int, int]:
    """`TimedRun.together` of a batch that was decoded whole: the mean context."""
    return {options.prompt + new // 2: batch}
