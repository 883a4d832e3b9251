"""Measures how much a model needs the attention of each layer, to choose the layers that stay attention.

A cost is a KL divergence from the teacher, in nats per token. Without `aligned`, a layer's cost is that of a model in
which only this layer is converted.

That can mislead: distillation soon teaches a mixer some of what a raw conversion loses, and never the rest. So with
`aligned`, mixers are those that `m1 align` trained, one for every layer. Beginning with attention everywhere, the layer
whose mixer costs least is replaced, again and again; the last one ranks first. A layer's cost is then that of the model
in which all layers from it to the ranking's end are replaced. That is still a cost before distillation, which can
mislead, too; choose_layers.py trains the whole model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m1.errors import UserError
from m1.jsonl import read_json, write_json
from m1.model.checkpoint import load_config, load_tokenizer, read_weights
from m1.model.configuration import ATTENTION, MAMBA, TEACHERS
from m1.model.convert import hybrid_config, mixer_from_attention, model_from_weights, with_mixers_of
from m1.model.gguf import teacher_folder
from m1.model.modeling import M1ForCausalLM
from m1.model.tokenizer import encode_chat
from m1.ops.backend import default_device
from m1.progress import Progress, silent
from m1.recipe import RankLayersStage
from m1.runs import Run, sha256
from m1.train.data import all_conversations
from m1.train.divergence import divergence_from_states

Batch = tuple[Tensor, Tensor]  # input ids and attention mask, [b, T] each


@torch.no_grad()
def run(stage: RankLayersStage, force: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Runs the rank-layers stage of a recipe, and `m1 rank-layers`. An interrupted run resumes with the missing layers.

    Returns:
        The content of OUT: {"settings", "tokens", "kl": {layer: nats per token}, "ranking": [...]}. The
        ranking lists the layers, the one that most needs its attention first.

    Raises:
        UserError: a bad checkpoint or data file, a tokenizer that doesn't fit the model, an `out` that holds anything
            but this ranking, or as `with_mixers_of`.
    """
    with teacher_folder(stage.teacher) as teacher:
        return _rank(stage, teacher, force, progress)


def _rank(stage: RankLayersStage, teacher: Path, force: bool, progress: Progress) -> dict[str, Any]:
    """`run` with the folder of the teacher's checkpoint."""
    config = load_config(teacher, TEACHERS)
    layers = config.num_hidden_layers
    settings = stage.settings() | {"weights": _fingerprint(teacher)}
    if stage.aligned:
        settings["aligned_weights"] = _fingerprint(Path(stage.aligned))
    with Run(stage.kind, stage.out, settings, is_file=True, force=force) as folder:
        if folder.finished:
            return read_json(stage.out)
        rows = folder.read("layers.jsonl", {"replaced": list[int], "kl": float})
        measured = {tuple(row["replaced"]): row["kl"] for row in rows}
        options: dict[str, Any] = {"mixer": stage.mixer, "head_alignment": stage.head_alignment}
        model_config = hybrid_config(config, range(layers), **options)
        model = model_from_weights(model_config, read_weights(teacher), teacher).eval()
        mamba_config = hybrid_config(config, [], **options)
        for i, layer in enumerate(model.model.layers):
            torch.manual_seed(stage.seed % 2**64)
            layer.mamba = mixer_from_attention(layer.self_attn.state_dict(), mamba_config, i)
        if stage.aligned:
            model.load_state_dict(with_mixers_of(stage.aligned, model.state_dict(), mamba_config))
        model.to(default_device())
        batches = _batches(stage, load_tokenizer(teacher))
        if (largest := max(int(ids.max()) for ids, _ in batches)) >= config.vocab_size:
            raise UserError(
                f"{teacher}: its tokenizer gives token {largest}, but its vocabulary has {config.vocab_size} tokens"
            )
        tokens = sum(int(mask.sum()) for _, mask in batches)
        targets = [model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state for ids, mask in batches]
        total = layers * (layers + 1) // 2 if stage.aligned else layers
        with progress(stage.kind, "models") as on_progress:

            def cost(*replaced: int) -> float:
                """Nats per token with mixers in these layers."""
                on_progress(len(measured), total)
                if replaced not in measured:
                    for i, layer in enumerate(model.model.layers):
                        layer.layer_type = MAMBA if i in replaced else ATTENTION
                    measured[replaced] = _divergence(model, batches, targets) / tokens
                    folder.append("layers.jsonl", {"replaced": replaced, "kl": measured[replaced]})
                return measured[replaced]

            kl = _greedy(layers, cost) if stage.aligned else {i: cost(i) for i in range(layers)}
            on_progress(total, total)
        ranking = [*reversed(kl)] if stage.aligned else sorted(kl, key=lambda i: -kl[i])
        costs = {str(i): kl[i] for i in range(layers)}
        result = {"settings": folder.settings, "tokens": tokens, "kl": costs, "ranking": ranking}
        write_json(stage.out, result)
        folder.finish()
    return result


def _greedy(layers: int, cost: Callable[..., float]) -> dict[int, float]:
    """Replaces the cheapest layer until all are. Returns the layers in that order, each with the cost of doing so."""
    replaced: dict[int, float] = {}
    while len(replaced) < layers:
        costs = {i: cost(*replaced, i) for i in range(layers) if i not in replaced}
        cheapest = min(costs, key=costs.__getitem__)
        replaced[cheapest] = costs[cheapest]
    return replaced


def _divergence(model: M1ForCausalLM, batches: list[Batch], targets: list[Tensor]) -> float:
    """The sum over all tokens of KL(teacher || model), in nats."""
    head, total = model.lm_head.weight, 0.0
    for (ids, mask), target in zip(batches, targets, strict=True):
        states = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        real = mask.bool()
        total += divergence_from_states(states[real], head, target[real], head, "forward_kl").item()
    return total


def _batches(stage: RankLayersStage, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    stage.use_chat_template(tokenizer)
    rows = all_conversations(stage.data)
    encoded = [encode_chat(tokenizer, row, add_generation_prompt=False)[: stage.max_length] for row in rows]
    encoded.sort(key=len)
    batches = []
    for start in range(0, len(encoded), stage.batch_size):
        group = encoded[start : start + stage.batch_size]
        ids = torch.zeros(len(group), len(group[-1]), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(group):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        batches.append((ids.to(default_device()), mask.to(default_device())))
    return batches


def _fingerprint(teacher: Path) -> dict[str, str | None]:
    """The sha256 of each weight file, by name."""
    files = [path for pattern in ("*.safetensors*", "*.bin") for path in sorted(teacher.glob(pattern))]
    return {path.name: sha256(path) for path in files}
