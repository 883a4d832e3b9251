"""What the training stages of a recipe will take, before anything is loaded: memory per GPU, tokens, steps and hours.

All of it is computed, nothing measured. Bytes per GPU, where P counts the model's parameters, layer those of its
largest layer and root those of its embedding, last norm and head. A pass has T tokens; H, I and V are the sizes of the
hidden states, the MLP and the vocabulary, W the width of a mixer's projections. n is the number of GPUs if the stage
shards, else 1:

    weights       4 P / n              float32
    gradients     4 P / n              of what is trained: all, or the mixers
    optimizer     8 P / n              AdamW's two moments
    gathered      8 layer + 8 root     if sharded: two layers' weights, the root's and its gradients
    buckets       4 P                  if replicated on several GPUs: DDP's gradients
    teacher       2 P / n              in its own dtype; if sharded, two layers and the root besides
    activations   4 T H a layer        the layers' inputs, with gradient checkpointing, and twice one layer's inside:
                                       T (8 I + 6 W + 16 H); without checkpointing that of every layer
    loss          10 T H + 4 V H       last states and their gradients, the gradient of the head, and 1 GiB of tiles
    engine        2 P + a sequence     for grpo; the cache of as many sequences as fit decides the rollouts' speed
    vllm          a share of the card  in place of the engine, if rollouts come from a vLLM in this process
    rest          3 GiB                CUDA's context, workspaces, what the allocator can't use

Hours are those of the products and attention scores at `mfu` of the card's bfloat16 rate, and of rollouts at half of
what the card's memory allows. Completions and rows count with their full length, so hours of RL are an upper bound.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from m1.errors import UserError
from m1.hub import checkpoint_folder
from m1.layer_choice import choose_layers
from m1.model.cache_layout import slot_bytes
from m1.model.checkpoint import load_config, model_without_weights
from m1.model.configuration import ATTENTION, MAMBA, MODEL_TYPES, layer_kinds
from m1.model.convert import hybrid_config
from m1.recipe import ChooseLayersStage, ConvertStage, GRPOStage, SFTStage, Stage, TaughtStage, TrainedStage
from m1.train.distributed import split_batch

GIB = 2**30
TILES, REST = 1 * GIB, 3 * GIB
ROLLOUT_SHARE = (
    0.5  # of the memory's rate that decoding reaches, as it does at 3B on an H200 (results/gpu-decode-*.json)
)
PER_DEVICE = 8  # rows per pass, transformers' default
VLLM_SHARE = 0.3  # of a GPU's memory that TRL gives a vLLM in this process


@dataclass(frozen=True)
class Card:
    """A GPU: usable bytes of memory, dense bfloat16 operations per second, and bytes per second of its memory."""

    memory: float
    flops: float
    bandwidth: float


CARDS = {  # of the makers' data sheets; memory as PyTorch sees it
    "a100": Card(79 * GIB, 312e12, 2.04e12),
    "h100": Card(79 * GIB, 989e12, 3.35e12),
    "h200": Card(140 * GIB, 989e12, 4.8e12),
    "b200": Card(178 * GIB, 2250e12, 8.0e12),
}


@dataclass(frozen=True)
class Size:
    """What a formula needs of a model.

    Attributes:
        config: the model's.
        parameters, largest_layer, root, mixers: numbers of parameters: all, one layer's, those in no layer, Mamba's.
        products: weights that a token is multiplied with.
        widths: channels of a mixer's projections, the widest's.
        attention: query channels of all attention layers.
    """

    config: PreTrainedConfig
    parameters: int
    largest_layer: int
    root: int
    mixers: int
    products: int
    widths: int
    attention: int


@dataclass(frozen=True)
class StagePlan:
    """What a stage takes.

    Attributes:
        name: the stage's.
        parameters: the model's.
        memory: bytes per GPU by what they are for.
        rows: rows of a pass on one GPU, and number of passes per step.
        steps: None if only the data tells.
        tokens: of all steps, at most.
        hours: likewise.
    """

    name: str
    parameters: int
    memory: Mapping[str, float]
    rows: tuple[int, int]
    steps: int | None
    tokens: float | None
    hours: float | None


def plan(stages: Mapping[str, Stage], gpus: int, card_name: str, mfu: float) -> Iterator[StagePlan]:
    """Plans the training stages of a recipe, in their order.

    Args:
        stages: all stages by name.
        gpus: number of GPUs that train.
        card_name: one of CARDS.
        mfu: share of the card's rate that training is assumed to reach.

    Raises:
        UserError: a stage needs more memory than a GPU has, its batch can't be split, or a model can't be found.
    """
    if card_name not in CARDS:
        raise UserError(f"card {card_name!r}: choose one of {', '.join(CARDS)}")
    if gpus < 1 or not 0 < mfu <= 1:
        raise UserError(f"{gpus} GPUs at {mfu} of their rate: need at least one, and a share above 0, at most 1")
    card, configs = CARDS[card_name], dict[str, PreTrainedConfig]()

    def config_of(name: str) -> PreTrainedConfig:
        if name not in configs:
            configs[name] = load_config(checkpoint_folder(name, config_only=True), MODEL_TYPES)
        return configs[name]

    for name, stage in stages.items():
        if isinstance(stage, ConvertStage):
            teacher = config_of(stage.teacher)
            kept = choose_layers(teacher.num_hidden_layers, stage.keep_attention, stage.attention_ratio)
            options: dict[str, Any] = {"mixer": stage.mixer, "head_alignment": stage.head_alignment}
            configs[stage.out] = hybrid_config(teacher, kept, state_size=stage.state_size, **options)
        elif isinstance(stage, TrainedStage):
            configs[stage.out] = _config(stage) or config_of(str(getattr(stage, "model", None)))
            taught = size_of(config_of(stage.teacher)) if isinstance(stage, TaughtStage) else None
            size = size_of(configs[stage.out])
            if isinstance(stage, ChooseLayersStage):
                size = with_attention(size)
            planned = plan_stage(name, stage, size, taught, gpus, card, mfu)
            refuse_too_large(planned, card_name, "max_length" in stage.trainer or isinstance(stage, GRPOStage))
            yield planned


def _config(stage: TrainedStage) -> PreTrainedConfig | None:
    """The configuration of a new model; None for a stage that begins from a checkpoint."""
    if not isinstance(stage, SFTStage) or stage.model:
        return None
    from m1.train.sft import new_config  # imports TRL

    return new_config(stage.init)[0]


def size_of(config: PreTrainedConfig) -> Size:
    """Counts a model's parameters, without making them."""
    model = model_without_weights(config, Path(config.name_or_path or "the model"))
    layers = list(model.get_decoder().layers)
    counts = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    mixers = [layer.mamba for layer in layers if hasattr(layer, "mamba")]
    total, embedding = model.num_parameters(), model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding or config.tie_word_embeddings
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads * head_dim
    return Size(
        config=config,
        parameters=total,
        largest_layer=max(counts),
        root=total - sum(counts),
        mixers=sum(p.numel() for mixer in mixers for p in mixer.parameters()),
        products=total if tied else total - embedding.numel(),
        widths=max([mixer.in_proj.out_features for mixer in mixers], default=2 * queries + 2 * config.hidden_size),
        attention=queries * layer_kinds(config).count(ATTENTION),
    )


def with_attention(size: Size) -> Size:
    """The size of a model whose Mamba layers have attention, too."""
    config, layers = size.config, layer_kinds(size.config).count(MAMBA)
    width = 2 * (config.mamba_size + config.mamba_kv_size)  # of attention's four projections, too
    one = width * config.hidden_size
    return replace(
        size,
        parameters=size.parameters + layers * one,
        largest_layer=size.largest_layer + one,
        products=size.products + layers * one,
        widths=size.widths + width,
        attention=size.attention + layers * config.mamba_size,
    )


def plan_stage(
    name: str, stage: TrainedStage, model: Size, teacher: Size | None, gpus: int, card: Card, mfu: float
) -> StagePlan:
    """Plans one stage. Raises UserError if its batch can't be split over the GPUs."""
    given = stage.trainer
    most = given.get("per_device_train_batch_size", PER_DEVICE)
    batch = stage.global_batch or most * given.get("gradient_accumulation_steps", 1) * gpus
    try:
        rows = split_batch(batch, most, gpus)
    except UserError as error:
        raise UserError(f"{name}.toml: {error}") from None
    longest = model.config.max_position_embeddings
    length = (
        given.get("max_completion_length", 256) if isinstance(stage, GRPOStage) else given.get("max_length") or longest
    )
    memory = memory_of(stage, model, teacher, rows[0] * length, gpus, card)
    steps = _steps(stage, batch)
    tokens = None if steps is None else float(steps) * batch * length
    seconds = 0.0
    if tokens is not None:
        recomputed = int(_checkpoints(stage))
        passes = 3 + recomputed + isinstance(stage, GRPOStage)  # RL compares the engine's probabilities first
        work = passes * _operations(model, length) + (_operations(teacher, length) if teacher else 0)
        seconds = tokens * work / (gpus * card.flops * mfu)
    if isinstance(stage, GRPOStage) and tokens is not None:
        resident = sum(
            memory[part] for part in ("weights", "gradients", "optimizer", "engine", "vllm", "rest") if part in memory
        )
        seconds += (
            tokens / gpus / _decoding_rate(stage, model.config, model.parameters, length, card, card.memory - resident)
        )
    return StagePlan(name, model.parameters, memory, rows, steps, tokens, None if tokens is None else seconds / 3600)


def memory_of(
    stage: TrainedStage, model: Size, teacher: Size | None, tokens: int, gpus: int, card: Card
) -> dict[str, float]:
    """Bytes per GPU of a stage, by the parts that the module's formula names. `tokens` are those of a pass."""
    config, layers = model.config, model.config.num_hidden_layers
    sharded, align = stage.shard and gpus > 1, stage.kind == "align"
    n = gpus if sharded else 1
    trained = model.mixers if align else model.parameters
    inside = tokens * (8 * config.intermediate_size + 6 * model.widths + 16 * config.hidden_size)
    inputs = 4 * tokens * config.hidden_size * layers
    parts: dict[str, float] = {
        "weights": 4 * model.parameters / n,
        "gradients": 4 * trained / n,
        "optimizer": 8 * trained / n,
        "gathered": 8 * (model.largest_layer + model.root) if sharded else 0,
        "buckets": 4 * trained if gpus > 1 and not sharded else 0,
        "activations": inputs + 2 * inside if _checkpoints(stage) else layers * inside,
        "loss": 10 * tokens * config.hidden_size + 4 * config.vocab_size * config.hidden_size + TILES,
        "rest": REST,
    }
    if isinstance(stage, TaughtStage) and teacher and stage.teacher_device is None:
        width = 4 if stage.teacher_dtype == "float32" else 2
        gathered = 2 * teacher.largest_layer + teacher.root if sharded else 0
        parts["teacher"] = width * (teacher.parameters / n + gathered)
    if isinstance(stage, GRPOStage) and stage.rollout == "engine":
        parts["engine"] = 2 * model.parameters + slot_bytes(config, tokens, torch.bfloat16)
    elif isinstance(stage, GRPOStage) and stage.trainer.get("vllm_mode", "colocate") == "colocate":
        parts["vllm"] = stage.trainer.get("vllm_gpu_memory_utilization", VLLM_SHARE) * card.memory
    return {part: size for part, size in parts.items() if size}


def refuse_too_large(planned: StagePlan, card_name: str, limited: bool) -> None:
    """Raises UserError if the stage needs more memory than the card has. `limited`: the length of rows is given."""
    total, has = sum(planned.memory.values()), CARDS[card_name].memory
    if total > has:
        largest = sorted(planned.memory, key=lambda part: -planned.memory[part])[:3]
        parts = ", ".join(f"{part} {planned.memory[part] / GIB:.1f}" for part in largest)
        raise UserError(
            f"{planned.name}.toml needs {total / GIB:.1f} GiB per GPU (above all {parts}), and {card_name} has "
            f"{has / GIB:.0f}: set shard = true, or take more GPUs, fewer rows per pass or shorter ones"
            + ("" if limited else "; without max_length in [trainer], rows count with the model's whole context")
        )


def _checkpoints(stage: TrainedStage) -> bool:
    """Whether layers are computed again in the backward pass: TRL's default, but not in RL."""
    return stage.kind != "align" and stage.trainer.get("gradient_checkpointing", stage.kind != "grpo")


def _steps(stage: TrainedStage, batch: int) -> int | None:
    if (steps := stage.trainer.get("max_steps", -1)) > 0:
        return steps
    if stage.data.task is None:
        return None
    samples = stage.trainer.get("num_generations", 8) if isinstance(stage, GRPOStage) else 1
    return math.ceil(stage.trainer.get("num_train_epochs", 3) * (stage.data.count - stage.eval_rows) * samples / batch)


def _operations(model: Size, length: int) -> float:
    """Operations per token of a forward pass over rows of this length, of which a token sees half."""
    return 2 * model.products + 2 * model.attention * length


def _decoding_rate(
    stage: GRPOStage, config: PreTrainedConfig, parameters: int, length: int, card: Card, free: float
) -> float:
    """Tokens per second of the rollouts on one GPU with this much memory for caches: bounded by its memory's rate."""
    cache = slot_bytes(config, length, torch.bfloat16)
    sequences = max(1, min(stage.max_num_seqs, int(free // cache)))
    read = 2 * parameters + sequences * slot_bytes(config, length // 2, torch.bfloat16)
    return ROLLOUT_SHARE * sequences * card.bandwidth / read
