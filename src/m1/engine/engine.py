"""Continuous batching: tokens in, tokens out. Each step draws one token of every sequence that has a slot.

The scheduler decides a step on integers (scheduler.py). The executor runs it on tensors (executor.py). Text is left to
`LLM` (llm.py).
"""

import math
from collections import deque
from collections.abc import Generator, Iterable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m1.engine.executor import Drawn, Executor
from m1.engine.pages import Pages
from m1.engine.plan import Plan
from m1.engine.sampling import SamplingParams
from m1.engine.scheduler import Scheduler
from m1.engine.sequence import Request, Sequence, requests_for, shortened
from m1.engine.slots import PAGE_SIZE
from m1.errors import UserError
from m1.options import Quantization, fitted

DEFAULT_MAX_MODEL_LEN = 8192
# Prompt tokens in a chunk, and between two decode steps. Both are 512 on other devices, where tokens take longer.
PREFILL_CHUNK, PREFILL_BUDGET = {"cuda": 2048}, {"cuda": 16384}


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
    """The end-of-sequence tokens of the model and, if given, of its tokenizer. Raises UserError for others."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    fitted(eos, int | list[int] | None, f"{model.name_or_path}: eos_token_id")
    own = [eos] if isinstance(eos, int) else list(eos or [])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        own.append(tokenizer.eos_token_id)
    return sorted(set(own))


class Engine:
    """Generates token sequences from prompts of token ids, with continuous batching.

    It runs M1, Llama, Qwen2 and Qwen3 models on the model's device. `generate` samples a list of prompts. `run` also
    yields finished sequences and takes new requests while it works. `submit` and `step` are the parts of that loop.

    Results are batch-invariant in float32 on a CPU: a sequence's tokens depend on its prompt, settings and seed, not on
    what else is being decoded. Elsewhere, sums may differ in the last bit.

    Args:
        model: the network. Some of its weights are packed, others shared: after a change, call `load_weights`.
        stop_token_ids: generation stops after any of these tokens; the model's eos tokens when None.
        max_num_seqs: maximum number of sequences decoded together; fewer where they don't fit into memory.
        max_model_len: maximum number of tokens of a prompt and its sequence together, which also ends there, with a
            warning. When None, the model's context, but at most 8192.
        prefill_chunk: maximum number of tokens in a chunk of a prompt. Chunks end at its multiples. When None, 2048 on
            a GPU and 512 on a CPU.
        prefill_budget: number of prompt tokens between two decode steps after which no further chunk is prefilled. When
            None, 16384 on a GPU and 512 on a CPU.
        prefix_cache: number of states kept after prompts and their beginnings, for prompts that begin the same way.
        page_size: tokens per page of keys and values, a power of two from 16. A sequence takes pages as it grows. When
            they run out, the youngest sequence waits with its state in the host's memory.
        quantize: "int8" or "int4" rounds the weights of linear layers, for fewer bytes per step (CPU only). None keeps
            them.

    On a GPU a step is launched before the previous one's tokens are known. So `step` returns a sequence one step after
    it has drawn its last token, and what is done between two steps takes effect with up to two steps in flight.

    Attributes:
        num_slots: maximum number of sequences decoded together, after the memory limit.
        lag: number of steps whose tokens may be unknown when the next one is launched: 1 on a GPU, 0 on a CPU.
        stats: `Stats`, counters of steps and tokens.

    Raises:
        UserError: a model the engine can't run, or an impossible setting.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: PreTrainedModel,
        stop_token_ids: Iterable[int] | None = None,
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        prefill_chunk: int | None = None,
        prefill_budget: int | None = None,
        prefix_cache: int = 8,
        page_size: int = PAGE_SIZE,
        quantize: Quantization | None = None,
    ):
        self.context: int = getattr(model.config, "max_position_embeddings", None) or DEFAULT_MAX_MODEL_LEN
        self.max_model_len = min(self.context, DEFAULT_MAX_MODEL_LEN) if max_model_len is None else max_model_len
        device = model.device.type
        chunk = PREFILL_CHUNK.get(device, 512) if prefill_chunk is None else prefill_chunk
        budget = PREFILL_BUDGET.get(device, 512) if prefill_budget is None else prefill_budget
        sizes = {"max_num_seqs": max_num_seqs, "max_model_len": self.max_model_len}
        sizes |= {"prefill_chunk": chunk, "prefill_budget": budget}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
        if self.max_model_len > self.context:
            raise UserError(f"max_model_len={max_model_len}: the model's context is {self.context} tokens")
        if page_size < 16 or page_size & (page_size - 1):
            raise UserError(f"page_size={page_size}: must be a power of two, at least 16")
        if quantize not in (None, "int8", "int4") or (quantize and device != "cpu"):
            raise UserError(f"quantize={quantize!r} on {device}: must be 'int8' or 'int4', on a CPU only")
        self.vocab_size: int = model.config.vocab_size
        sizing = max_num_seqs, prefix_cache, self.max_model_len, page_size
        self.executor = Executor(model, sizing, quantize)
        capacity = self.executor.capacity
        self.num_slots = capacity.slots
        stop = stop_tokens(model) if stop_token_ids is None else stop_token_ids
        long_prompt = self.executor.runner.rotary.switch or math.inf
        self.scheduler = Scheduler(
            self.num_slots, Pages(capacity.pages, page_size), chunk, budget, prefix_cache, frozenset(stop),
            long_prompt,
        )  # fmt: skip
        self.lag = int(device == "cuda")
        self._flying: deque[tuple[Plan, Drawn]] = deque()  # executed plans whose tokens aren't known yet
        self.stats = self.scheduler.stats

    @property
    def busy(self) -> bool:
        """Whether any sequence is waiting or running."""
        return self.scheduler.busy

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have a slot."""
        return list(self.scheduler.running.values())

    @property
    def free_slots(self) -> int:
        """How many sequences could start at once: the free slots, or 0 if others are waiting."""
        return 0 if self.scheduler.waiting or self.scheduler.swapped else len(self.scheduler.free)

    def submit(self, request: Request) -> None:
        """Queues a request. `step` fills its sequences. Raises UserError as `check`."""
        self.check(request)
        self._add(request)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Decides and executes one step. Returns the sequences that ended by themselves, in it or `lag` steps before.

        A step that fails or is interrupted leaves states that nobody knows, so it ends all requests.
        """
        try:
            plan, flying, ended = self.scheduler.schedule(), self._flying, []
            if not plan.empty:
                flying.append((plan, self.executor.execute(plan)))
            while len(flying) > (0 if plan.empty else self.lag):
                earlier, drawn = flying.popleft()
                ended += self.scheduler.update(earlier, *drawn.wait())
            return ended
        except BaseException:
            self.scheduler.reset()
            self._flying.clear()
            raise

    def run(self, requests: list[Request]) -> Generator[list[Sequence], None, None]:
        """Submits the requests and steps until they are done. After each step, yields their sequences that ended in it.

        You may append to the list: new requests are submitted before the next step. Closing the iterator aborts the
        unfinished requests. Other callers may use the engine at the same time.

        Raises:
            UserError: as `check`. None of the requests added since the last step is submitted then.
        """
        mine: set[Request] = set()
        done = 0  # number of requests at the front of the list that are done
        try:
            while True:
                fresh = requests[len(mine) :]
                for request in fresh:
                    self.check(request)
                mine.update(fresh)
                for request in fresh:
                    self._add(request)
                while done < len(requests) and requests[done].done:
                    done += 1
                if done == len(requests):
                    return
                yield [sequence for sequence in self.step() if sequence.request in mine]
        finally:
            for request in requests[: len(mine)]:
                if not request.done:
                    self.abort(request)

    def generate(self, prompts: Iterable[list[int]], params: SamplingParams) -> list[Sequence]:
        """Samples `params.n` sequences of each prompt, in the order of the prompts. `requests_for` sets the seeds.

        Raises:
            UserError: as `check`. Nothing is generated then.
        """
        requests = requests_for(prompts, params)
        for _ in self.run(requests):
            pass
        return [sequence for request in requests for sequence in request.sequences]

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends a sequence for a reason of the caller, such as a stop string that its last token has completed."""
        self.scheduler.finish(sequence, reason)

    @torch.inference_mode()
    def load_weights(self, model: PreTrainedModel) -> None:
        """Takes over the weights of a model with the same configuration, such as one that is being trained.

        CUDA graphs stay. All requests end, and the prefix cache is emptied, since its states came from other weights.
        """
        self.scheduler.reset()
        self.executor.runner.load_weights(model)

    def abort(self, request: Request) -> None:
        """Ends the request's unfinished sequences with reason "abort". Their slots are free at once."""
        self.scheduler.abort(request)

    def check(self, request: Request) -> None:
        """Raises UserError for an empty prompt, a token outside the vocabulary, or a prompt that leaves no room.

        Also for `logit_bias` or a stop token outside the vocabulary, or `logprobs` of more tokens than it has.
        """
        tokens, name = request.tokens, f"prompt {request.id}"
        if not tokens:
            raise UserError(f"{name} is empty")
        if not (min(tokens) >= 0 and max(tokens) < self.vocab_size):
            unknown = next(token for token in tokens if not 0 <= token < self.vocab_size)
            raise UserError(f"{name} has token {unknown}; the vocabulary is 0 to {self.vocab_size - 1}")
        for field in ("logit_bias", "stop_token_ids"):
            for token in getattr(request.params, field):
                if not 0 <= token < self.vocab_size:
                    fix = f"the vocabulary is 0 to {self.vocab_size - 1}"
                    raise UserError(f"{name} has {field} of token {token}; {fix}")
        if (asked := request.params.logprobs) > self.vocab_size:
            raise UserError(f"{name} has logprobs={asked}; the vocabulary has {self.vocab_size} tokens")
        if len(tokens) >= self.max_model_len:
            fix = "shorten it"
            if self.max_model_len < self.context:
                fix += f", or raise max_model_len up to {self.context}"
            raise UserError(f"{name} has {len(tokens)} tokens, which leaves no room in {self._limit}: {fix}")

    @property
    def _limit(self) -> str:
        """What limits the tokens of a prompt and its sequence together."""
        if self.max_model_len < self.context:
            return f"the engine's max_model_len of {self.max_model_len} tokens"
        return f"the model's context of {self.context} tokens"

    def _add(self, request: Request) -> None:
        """Queues a request. Its max_tokens becomes at most what its prompt leaves."""
        request.params = shortened(request.params, self.max_model_len - len(request.tokens), self._limit)
        self.scheduler.add(request)
