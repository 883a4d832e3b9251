"""The options of every benchmark, declared once, with defaults and help texts. Impossible values are refused.

The command line is made of these classes, and `m1 --help` must not wait for torch. So torch, and whatever imports it,
is imported inside functions only.
"""

import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

from m1.bench.models import SHAPES
from m1.errors import UserError
from m1.jsonl import read_jsonl
from m1.options import MAX_SHOWN, option

if TYPE_CHECKING:
    import torch

    from m1.ops.backend import Backend

Dtype = Literal["float32", "bfloat16"]
LARGEST = 2**31 - 1  # of any size; larger ones never end
STATE = 16  # states per channel of Mamba-1; a Mamba-2 head has head_dim x head_dim states
OURS = tuple(f"ours-{kind}{bits}" for bits in ("", "-int8", "-int4") for kind in ("hybrid", "transformer"))
VLLM = ("vllm", "vllm-hybrid")
ENGINES = (*OURS, "transformers", *VLLM)

# Help texts of options that several benchmarks share, with different defaults.
DTYPE = "Data type of the activations: float32 or bfloat16."
INNER = "Channels of the layer."
KV = "Channels of x and B, before they are repeated."


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that all benchmarks share. The options of one benchmark are a subclass.

    Creating an instance checks all values.

    Attributes:
        name: the benchmark's name on the command line.
        dtype: data type of the activations. The kernels' arithmetic and states are float32.
        device: "cpu" or "cuda". None becomes "cuda" if there is a GPU, else "cpu".
        repeats: timed calls per row of the result. Slow rows have fewer.

    Raises:
        UserError: a value that is impossible or can't run on this machine. It names the option and the value.
    """

    name: ClassVar[str]

    dtype: Dtype = option("float32", DTYPE)
    device: str = option(None, "cpu or cuda. Default: cuda if there is a GPU.")
    repeats: int = option(7, "Timed calls per row. Slow rows have fewer.")

    def __post_init__(self) -> None:
        from m1.ops.backend import default_device  # heavy: see the module's docstring

        if self.device is None:
            object.__setattr__(self, "device", default_device())
        for name, value in asdict(self).items():
            if isinstance(value, int):
                self.require(1 <= value <= LARGEST, name, f"must be at least 1 and at most {LARGEST}")
        self.require(self.dtype in get_args(Dtype), "dtype", f"choose {' or '.join(get_args(Dtype))}")
        self.require(self.device in ("cpu", "cuda"), "device", "choose cpu or cuda")
        if self.device == "cuda":
            self.require(default_device() == "cuda", "device", "torch finds no GPU here; use --device cpu")

    @property
    def torch_dtype(self) -> "torch.dtype":
        """`dtype` as PyTorch's object."""
        import torch  # heavy: see the module's docstring

        return getattr(torch, self.dtype)

    def require(self, holds: bool, name: str, demand: str) -> None:
        """Raises UserError unless `holds`. The message names the option, its value and the demand."""
        if not holds:
            value = str(getattr(self, name))[:MAX_SHOWN]
            raise UserError(f"--{name.replace('_', '-')} {value}: {demand}")


@dataclass(frozen=True, kw_only=True)
class KernelOptions(Options):
    """The options of benchmarks that compare this package's backends with each other and with peers.

    Attributes:
        backends: names of the backends to time, separated by commas. None means all that run on the device.
    """

    backends: str | None = option(None, "Backends to time, e.g. cpu,reference. Default: all that run on the device.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chosen_backends()

    @property
    def own(self) -> "Backend":
        """The backend with this package's kernels for the device."""
        from m1.ops.backend import own_backend  # heavy: see the module's docstring

        return own_backend(self.device)

    def chosen_backends(self) -> "list[Backend]":
        """The backends to time, in a fixed order.

        Raises:
            UserError: an unknown name, or a backend that can't run here.
        """
        from m1.ops.backend import Backend, available  # heavy: see the module's docstring

        here: list[Backend] = [backend for backend in (self.own, "reference") if available(backend)]
        chosen = here if self.backends is None else self.backends.split(",")
        for name in chosen:
            known = name in get_args(Backend) and name != "auto"
            self.require(known, "backends", f"no backend {name!r}; choose from cpu, triton, reference")
            where = f"{name} can't run on {self.device} here; choose from {', '.join(here)}"
            self.require(name in here, "backends", where)
        return [backend for backend in here if backend in chosen]

    def require_for_kernels(self, holds: bool, name: str, demand: str) -> None:
        """As `require`, unless the backend `reference` alone is timed: it has no such limits."""
        kernels = [backend for backend in self.chosen_backends() if backend != "reference"]
        self.require(holds or not kernels, name, f"{demand} for the {self.own} kernel; or use --backends reference")


@dataclass(frozen=True, kw_only=True)
class ScanOptions(KernelOptions):
    """The options of `m1 bench scan`: the sizes of a Mamba-1 layer and of its batch.

    Attributes:
        inner: channels D of the layer.
        kv: channels X of x and B, before they are repeated to D.
        state: states N per channel.
        batch: number of sequences.
        length: tokens per sequence.
    """

    name = "scan"

    inner: int = option(768, INNER)
    kv: int = option(256, KV)
    state: int = option(16, "States per channel.")
    batch: int = option(8, "Number of sequences.")
    length: int = option(1024, "Tokens per sequence.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.inner % self.kv == 0, "kv", f"must divide --inner {self.inner}")
        self.require(self.kv % self.state == 0, "state", f"must divide --kv {self.kv}")
        self.require_for_kernels(self.state == STATE, "state", f"must be {STATE}")


@dataclass(frozen=True, kw_only=True)
class StateOptions(KernelOptions):
    """The options of `m1 bench state`: the sizes of a Mamba layer and the number of sequences in a decode step.

    Attributes:
        mixer: "mamba" (Mamba-1) or "mamba2".
        slots: number of sequences.
        inner: channels D of the layer.
        kv: channels X of x and B, before they are repeated to D.
        head_dim: channels per head of Mamba-2.
    """

    name = "state"

    mixer: Literal["mamba", "mamba2"] = option("mamba", "mamba (Mamba-1) or mamba2.")
    slots: int = option(64, "Number of sequences.")
    inner: int = option(768, INNER)
    kv: int = option(256, KV)
    head_dim: int = option(64, "Channels per head of Mamba-2.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.mixer in ("mamba", "mamba2"), "mixer", "choose mamba or mamba2")
        self.require(self.inner % self.kv == 0, "kv", f"must divide --inner {self.inner}")
        if self.mixer == "mamba":
            self.require(self.kv % STATE == 0, "kv", f"must be a multiple of {STATE}, the states per channel")
        else:
            self.require(self.kv % self.head_dim == 0, "head_dim", f"must divide --kv {self.kv}")
            self.require_for_kernels(self.head_dim % 16 == 0, "head_dim", "must be a multiple of 16")


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(KernelOptions):
    """The options of `m1 bench attention`: the sizes of an attention layer and of its key-value cache.

    Attributes:
        batch: number of sequences.
        kv_heads: heads of keys and values.
        group: query heads per head of keys and values.
        keys: cached keys per sequence.
        head_dim: channels per head.
    """

    name = "attention"

    batch: int = option(64, "Number of sequences.")
    kv_heads: int = option(4, "Heads of keys and values.")
    group: int = option(3, "Query heads per head of keys and values.")
    keys: int = option(4096, "Cached keys per sequence.")
    head_dim: int = option(64, "Channels per head.")
    dtype: Dtype = option("bfloat16", DTYPE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_for_kernels(self.head_dim % 16 == 0, "head_dim", "must be a multiple of 16")


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Options):
    """The options of benchmarks that compare whole engines on one model.

    Attributes:
        shape: the model's shape, a key of `SHAPES`.
        engines: some of `known`, separated by commas.
        vllm_python: the Python of an environment with vLLM. None: see `vllm_client.find_python`.
        known: the engines that this benchmark can run.
    """

    known: ClassVar[tuple[str, ...]]

    shape: str = option("30m", f"Shape of the model: {', '.join(SHAPES)}.")
    engines: str = option(
        "ours-hybrid,ours-transformer,vllm",
        "Engines to compare, separated by commas: ours-hybrid, ours-transformer (each also with -int8 or -int4), vllm, "
        "vllm-hybrid, and for decode transformers.",
    )
    dtype: Dtype = option("float32", "Data type of weights and activations: float32 or bfloat16.")
    repeats: int = option(3, "Timed runs per batch and engine. On a CPU, engines take turns.")
    vllm_python: str | None = option(
        None, "Python of an environment with vLLM. Default: that of `make peers` on a CPU, else the one that runs M1."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.shape in SHAPES, "shape", f"choose {', '.join(SHAPES)}")
        for engine in self.chosen_engines():
            self.require(engine in self.known, "engines", f"no engine {engine!r}; choose from {', '.join(self.known)}")

    def chosen_engines(self) -> list[str]:
        """The names of the engines to time."""
        return self.engines.split(",")

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest prompt and sample together."""
        raise NotImplementedError


class Cell(NamedTuple):
    """One batch that `m1 bench decode` times: `batch` samples of `new_tokens` tokens each."""

    batch: int
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(EngineOptions):
    """The options of `m1 bench decode`: a model, the batches to decode, and the engines to compare.

    Attributes:
        cells: the batches as text: "16x512,64x2048" is 16 samples of 512 new tokens, then 64 of 2048.
        prompt: tokens per prompt.
        contexts: time a few steps at this many context lengths of each batch. None: decode every token.
    """

    name = "decode"
    known = ENGINES

    cells: str = option("16x512,64x512,64x2048,16x8192", "Batches, as BATCHxNEW_TOKENS separated by commas.")
    prompt: int = option(128, "Tokens per prompt.")
    contexts: int | None = option(
        None, "Time a few steps at this many context lengths of each batch, instead of decoding every token."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1 = all(number >= 1 for cell in self.chosen_cells() for number in cell)
        self.require(at_least_1, "cells", "each number must be at least 1")
        if self.contexts and "transformers" in self.chosen_engines():
            raise UserError("--contexts can't time steps of transformers: choose other --engines")

    def chosen_cells(self) -> list[Cell]:
        """The batches to decode. Raises UserError if `cells` isn't of the form BATCHxNEW_TOKENS,..."""
        try:
            return [Cell(int(batch), int(new)) for batch, new in (cell.split("x") for cell in self.cells.split(","))]
        except ValueError:
            raise UserError(f"--cells {self.cells}: give BATCHxNEW_TOKENS, such as 16x512,64x2048") from None

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest prompt and sample together."""
        return self.prompt + max(cell.new_tokens for cell in self.chosen_cells())


class Job(NamedTuple):
    """One job that `m1 bench jobs` times, all of it submitted at once.

    Attributes:
        prompts: number of prompts, all different.
        tokens: tokens per prompt.
        samples: sequences sampled from each prompt.
        new_tokens: maximum number of new tokens per sequence.
    """

    prompts: int
    tokens: int
    samples: int
    new_tokens: int

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its longest sample together."""
        return self.tokens + self.new_tokens


@dataclass(frozen=True, kw_only=True)
class JobsOptions(EngineOptions):
    """The options of `m1 bench jobs`: a model, the jobs, and the engines to compare.

    Attributes:
        jobs: the jobs as text: "512x128x1x256" is 512 prompts of 128 tokens, one sample of each, 256 new tokens.
        max_num_seqs: maximum number of sequences decoded together. None: all of a job's.
        lengths: a JSONL file whose rows have `tokens`, such as the output of `m1 generate`. New tokens are drawn from
            them for each prompt, at most the job's. None: each sequence has the job's.
    """

    name = "jobs"
    known = (*OURS, *VLLM)

    jobs: str = option("32x128x1x128,1x512x16x64", "Jobs, as PROMPTSxTOKENSxSAMPLESxNEW_TOKENS separated by commas.")
    max_num_seqs: int | None = option(None, "Maximum number of sequences decoded together. Default: all of a job's.")
    lengths: str | None = option(
        None,
        "Draw each prompt's new tokens from the field `tokens` of this JSONL file's rows, at most NEW_TOKENS. "
        "Default: NEW_TOKENS each.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for job in self.chosen_jobs():
            self.require(min(job) >= 1, "jobs", "each number must be at least 1")
            self.require(job.new_tokens >= 2, "jobs", "NEW_TOKENS must be at least 2: one comes with the prefill")
            self.new_tokens(job)

    def chosen_jobs(self) -> list[Job]:
        """The jobs to time. Raises UserError if `jobs` isn't of the form PROMPTSxTOKENSxSAMPLESxNEW_TOKENS,..."""
        try:
            return [Job(*map(int, job.split("x"))) for job in self.jobs.split(",")]
        except (TypeError, ValueError):
            form = "give PROMPTSxTOKENSxSAMPLESxNEW_TOKENS, such as 512x128x1x256"
            raise UserError(f"--jobs {self.jobs}: {form}") from None

    def num_seqs(self, job: Job) -> int:
        """Maximum number of the job's sequences decoded together."""
        return min(job.prompts * job.samples, self.max_num_seqs or job.prompts * job.samples)

    def new_tokens(self, job: Job) -> list[int]:
        """New tokens of each prompt's samples, the same in every call.

        Raises:
            UserError: the file of lengths has no rows, or one without a positive integer `tokens`.
        """
        if self.lengths is None:
            return [job.new_tokens] * job.prompts
        counts: list[int] = []
        for row in read_jsonl(self.lengths):
            count, number = row.get("tokens"), len(counts) + 1
            valid = isinstance(count, int) and count >= 1
            self.require(valid, "lengths", f"row {number} has tokens={count!r}; give the number of its tokens")
            counts.append(row["tokens"])
        self.require(bool(counts), "lengths", "the file has no rows")
        return [min(count, job.new_tokens) for count in random.Random(0).choices(counts, k=job.prompts)]

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest prompt and sample together."""
        return max(job.max_model_len for job in self.chosen_jobs())


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Options):
    """The options of `m1 bench chat`: a real model, the numbers of chats, and the engines to compare, on a CPU.

    Attributes:
        model: a transformer's checkpoint folder, Hub id or GGUF file.
        hybrid: the checkpoint folder of a hybrid, for the engines whose names begin with ours-hybrid.
        gguf: the file that llama.cpp runs; `model` when None.
        chats: numbers of chats at the same time, as text.
        prompt: tokens per prompt.
        new_tokens: tokens per answer.
    """

    name = "chat"
    known: ClassVar[tuple[str, ...]] = (*OURS, "llama.cpp", "vllm")

    model: str = option("", "Checkpoint folder, Hub id or GGUF file of a transformer.")
    hybrid: str | None = option(None, "Checkpoint folder of a hybrid, for ours-hybrid.")
    gguf: str | None = option(None, "GGUF file for llama.cpp. Default: --model.")
    engines: str = option(
        "ours-transformer,ours-transformer-int4,llama.cpp,vllm",
        "Engines to compare, separated by commas: ours-hybrid, ours-transformer (each also with -int8 or -int4), "
        "llama.cpp, vllm.",
    )
    chats: str = option("1,8,32,64", "Numbers of chats at the same time, separated by commas.")
    prompt: int = option(160, "Tokens per prompt.")
    new_tokens: int = option(256, "New tokens per answer.")
    dtype: Dtype = option("bfloat16", "Data type of weights and activations: float32 or bfloat16.")
    repeats: int = option(5, "Timed runs per row. Engines take turns.")
    vllm_python: str | None = option(None, "Python of an environment with the peers. Default: that of `make peers`.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.device == "cpu", "device", "this benchmark runs on a CPU")
        self.require(bool(self.model), "model", "give a checkpoint folder or a GGUF file")
        self.require(self.new_tokens >= 2, "new_tokens", "must be at least 2: one comes with the prefill")
        for engine in self.chosen_engines():
            self.require(engine in self.known, "engines", f"no engine {engine!r}; choose from {', '.join(self.known)}")
            needs = self.hybrid or not engine.startswith("ours-hybrid")
            self.require(bool(needs), "engines", f"{engine} needs --hybrid")
            file = self.gguf or self.model
            self.require(engine != "llama.cpp" or file.endswith(".gguf"), "engines", "llama.cpp needs --gguf")
        self.chosen_chats()

    def chosen_engines(self) -> list[str]:
        """The names of the engines to time."""
        return self.engines.split(",")

    def chosen_chats(self) -> list[int]:
        """The numbers of chats. Raises UserError if `chats` isn't positive integers."""
        numbers = [int(number) for number in self.chats.split(",") if number.isdecimal() and int(number) > 0]
        self.require(len(numbers) == len(self.chats.split(",")), "chats", "give numbers such as 1,8,64")
        return numbers
