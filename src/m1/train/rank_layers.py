"""Which layers need their attention most: each is replaced alone by its conversion, and the damage is measured.

The cost of a layer is the KL divergence, in nats a token, of the model with that one layer replaced from the teacher:
where distillation would start if only this layer were converted.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m1.errors import UserError
from m1.jsonl import read_json, write_json
from m1.model.checkpoint import default_device, load_tokenizer, read_weights
from m1.model.configuration import ATTENTION, MAMBA
from m1.model.convert import hybrid_config, mixer_from_attention, model_from_weights, read_teacher_config
from m1.model.modeling import M1ForCausalLM
from m1.model.tokenizer import encode_chat
from m1.recipe import Data
from m1.train.data import conversations
from m1.train.distill import divergence_from_states

Batch = tuple[Tensor, Tensor]  # input ids and attention mask, [b, T] each


@torch.no_grad()
def rank_layers(
    teacher: str | Path,
    data: Data,
    out: str | Path,
    mixer: str = "mamba",
    head_alignment: str = "official",
    max_length: int = 1024,
    batch_size: int = 8,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures every layer and writes `out`, after each of them: cut off, the same call goes on.

    Args:
        max_length: tokens of a conversation that count.
        on_progress: called with (layers done, layers).

    Returns:
        What `out` holds: {"settings", "tokens", "kl": {layer: nats a token}, "ranking": layers, the most costly first}.

    Raises:
        UserError: a bad checkpoint or data file, or an `out` that was measured with other settings.
    """
    teacher, out = Path(teacher), Path(out)
    teacher_config = read_teacher_config(teacher)
    layers = teacher_config.num_hidden_layers
    weight_files = [path for pattern in ("config.json", "*.safetensors*", "*.bin") for path in teacher.glob(pattern)]
    settings = {
        "teacher": str(teacher), "teacher_sha256": _fingerprint(weight_files),
        "data": dataclasses.asdict(data), "data_sha256": _fingerprint([Path(data.path)] if data.path else []),
        "mixer": mixer, "head_alignment": head_alignment, "max_length": max_length, "seed": seed,
    }  # fmt: skip
    result: dict[str, Any] = read_json(out) if out.exists() else {"settings": settings, "kl": {}}
    if result.get("settings") != settings:
        raise UserError(f"{out} was measured with other settings: delete it, or write to another file")
    if "ranking" in result:
        return result

    config = hybrid_config(teacher_config, range(layers), mixer=mixer, head_alignment=head_alignment)
    mamba_config = hybrid_config(teacher_config, range(1, layers), mixer=mixer, head_alignment=head_alignment)
    model = model_from_weights(config, read_weights(teacher), teacher).eval()
    model.to(default_device())
    batches = _batches(data, load_tokenizer(teacher), max_length, batch_size)
    if (largest := max(int(ids.max()) for ids, _ in batches)) >= config.vocab_size:
        raise UserError(f"{teacher}: its tokenizer makes the token {largest}, its vocabulary has {config.vocab_size}")
    try:
        write_json(out, result)
    except OSError as error:
        raise UserError(f"can't write to {out}: {error.strerror}") from None
    result["tokens"] = sum(int(mask.sum()) for _, mask in batches)
    targets = [model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state for ids, mask in batches]
    for i in range(layers):
        if on_progress:
            on_progress(i, layers)
        if str(i) in result["kl"]:
            continue
        torch.manual_seed(seed % 2**64)
        layer = model.model.layers[i]
        layer.mamba = mixer_from_attention(layer.self_attn.state_dict(), mamba_config, i).to(default_device())
        layer.layer_type = MAMBA
        result["kl"][str(i)] = _divergence(model, batches, targets) / result["tokens"]
        del layer.mamba
        layer.layer_type = ATTENTION
        write_json(out, result)
    if on_progress:
        on_progress(layers, layers)
    result["ranking"] = sorted(range(layers), key=lambda i: -result["kl"][str(i)])
    write_json(out, result)
    return result


def _divergence(model: M1ForCausalLM, batches: list[Batch], targets: list[Tensor]) -> float:
    """Sum over all tokens of KL(teacher || model), nats."""
    head, total = model.lm_head.weight, 0.0
    for (ids, mask), target in zip(batches, targets, strict=True):
        states = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        real = mask.bool()
        total += divergence_from_states(states[real], head, target[real], head, "forward_kl").item()
    return total


def _batches(data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int) -> list[Batch]:
    rows = conversations(data)["messages"]
    encoded = [encode_chat(tokenizer, row, add_generation_prompt=False)[:max_length] for row in rows]
    encoded.sort(key=len)
    batches = []
    for start in range(0, len(encoded), batch_size):
        group = encoded[start : start + batch_size]
        ids = torch.zeros(len(group), len(group[-1]), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(group):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        batches.append((ids.to(default_device()), mask.to(default_device())))
    return batches


def _fingerprint(paths: Iterable[Path]) -> str:
    """Of the files' contents; files that are missing are reported by those who read them."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
