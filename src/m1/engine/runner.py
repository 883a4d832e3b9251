"""The network on slots: one sequence's prompt by chunks, or one token of each of many sequences.

Weights come from a loaded model, packed once for products with few rows; Mamba layers are the model's own modules. What
a row computes doesn't depend on the other rows: products and kernels sum in an order of their own, prompts run alone.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from m1.engine.state import LayerState, Slots
from m1.errors import UserError
from m1.model.cache_layout import MambaState
from m1.model.mixer import Constants
from m1.ops import PackedLinear, add_rms_norm, decode_attention, swiglu

MODELS = ("m1", "llama", "qwen2", "qwen3")


class Runner:
    """Runs M1, Llama, Qwen2 and Qwen3 models.

    Args:
        int8: rounds the weights of all linear layers (`PackedLinear`).

    Raises:
        UserError: another architecture, another activation than silu, or sliding-window attention.
    """

    def __init__(self, model: PreTrainedModel, slots: Slots, int8: bool = False):
        config: Any = model.config
        network: Any = model.model
        if config.model_type not in MODELS:
            raise UserError(f"the engine runs {', '.join(MODELS)} models, not {config.model_type!r}")
        if config.hidden_act != "silu":
            raise UserError(f"the engine's MLPs are SwiGLU, with hidden_act 'silu', not {config.hidden_act!r}")
        if getattr(config, "use_sliding_window", False):
            raise UserError(
                "the engine has no sliding-window attention: set use_sliding_window to false, or use generate"
            )
        self.device = model.device
        self.slots = slots
        self.eps = config.rms_norm_eps
        self.embedding: Tensor = network.embed_tokens.weight
        self.rotary = network.rotary_emb
        pack = partial(packed, int8=int8)
        layers = zip(network.layers, slots.layers, strict=True)
        self.layers = [Layer(layer, state, config, pack) for layer, state in layers]
        self.norm: Tensor = network.norm.weight
        self.head = pack(model.get_output_embeddings())

    def prefill(self, tokens: Tensor, slot: int, start: int) -> Tensor:
        """Logits [V] behind tokens [T], which follow the `start` tokens that the slot has seen."""
        positions = torch.arange(start, start + len(tokens), device=self.device)
        hidden = self._stack(tokens, positions, lambda layer, *inputs: layer.prefill(*inputs, slot, start))
        return self.head(hidden[-1:])[0]

    def decode(self, rows: Tensor) -> Tensor:
        """Logits [b, V] behind a token of each row. rows: [3, b] tokens, their slots, tokens those have seen."""
        tokens, slots, lengths = rows
        return self.head(self._stack(tokens, lengths, lambda layer, *inputs: layer.decode(*inputs, slots, lengths)))

    def _stack(self, tokens: Tensor, positions: Tensor, mix: Any) -> Tensor:
        """All layers and the last norm, [rows, H]."""
        hidden = F.embedding(tokens, self.embedding)
        cos, sin = (t[0, :, None] for t in self.rotary(hidden[None], positions[None]))  # [rows, 1, head_dim]
        update = None
        for layer in self.layers:
            update = mix(layer, add_rms_norm(hidden, update, layer.mixer_norm, self.eps), cos, sin)
            update = layer.mlp(add_rms_norm(hidden, update, layer.mlp_norm, self.eps))
        return add_rms_norm(hidden, update, self.norm, self.eps)


class Layer:
    """One decoder layer: its packed weights and its slots."""

    def __init__(self, layer: Any, state: LayerState, config: Any, pack: Callable[..., PackedLinear]):
        self.state = state
        self.mixer_norm: Tensor = layer.input_layernorm.weight
        self.mlp_norm: Tensor = layer.post_attention_layernorm.weight
        self.gate_up, self.down = pack(layer.mlp.gate_proj, layer.mlp.up_proj), pack(layer.mlp.down_proj)
        if hasattr(layer, "mamba"):
            self.mixer: Any = with_packed_linears(layer.mamba, pack)
            self.constants = Constants(*(t.float().contiguous() for t in layer.mamba.constants()))
            self.prefill, self.decode = self._prefill_mamba, self._decode_mamba
        else:
            attention = layer.self_attn
            self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
            self.head_dim = attention.head_dim
            self.qkv, self.out = pack(attention.q_proj, attention.k_proj, attention.v_proj), pack(attention.o_proj)
            self.q_norm, self.k_norm = (getattr(attention, name, nn.Identity()) for name in ("q_norm", "k_norm"))
            self.prefill, self.decode = self._prefill_attention, self._decode_attention

    def mlp(self, hidden: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(hidden)))

    def queries_keys_values(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, heads or kv_heads, head_dim], queries and keys rotated."""
        heads = self.qkv(hidden).view(len(hidden), -1, self.head_dim)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        first, second = qk.chunk(2, dim=-1)
        qk = qk * cos + torch.cat([-second, first], dim=-1) * sin
        return qk[:, : self.heads], qk[:, self.heads :], v

    def _prefill_attention(self, hidden: Tensor, cos: Tensor, sin: Tensor, slot: int, start: int) -> Tensor:
        q, k, v = self.queries_keys_values(hidden, cos, sin)
        end = start + len(hidden)
        keys, values = self.state.used(slot, end)
        keys[:, start:], values[:, start:] = k.transpose(0, 1), v.transpose(0, 1)
        mask = None
        if start:
            mask = torch.ones(len(hidden), end, dtype=torch.bool, device=hidden.device).tril(start)
        q, keys, values = q.transpose(0, 1)[None], keys[None], values[None]
        out = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=mask is None, enable_gqa=True)
        return self.out(out[0].transpose(0, 1).flatten(1))

    def _decode_attention(self, hidden: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = self.queries_keys_values(hidden, cos, sin)
        keys, values = self.state.first, self.state.second
        keys[slots, :, lengths] = k
        values[slots, :, lengths] = v
        return self.out(decode_attention(q, keys, values, lengths + 1, slots).flatten(1))

    def _prefill_mamba(self, hidden: Tensor, cos: Tensor, sin: Tensor, slot: int, start: int) -> Tensor:
        conv_state, ssm_state = self.state.used(slot, start)
        activations = self.mixer.activations(hidden)
        inputs = torch.cat([conv_state, self.mixer.conv_inputs(activations).T], dim=1)
        sequence = activations._make(t[None] for t in activations)
        y, last = self.mixer.scan(sequence, self.constants, None, MambaState(conv_state[None], ssm_state[None]))
        conv_state.copy_(inputs[:, inputs.shape[1] - conv_state.shape[1] :])
        ssm_state.copy_(last[0])
        return self.mixer.out_proj(y[0])

    def _decode_mamba(self, hidden: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
        activations = self.mixer.activations(hidden)
        y = self.mixer.step(activations, self.constants, MambaState(self.state.first, self.state.second), slots)
        return self.mixer.out_proj(y)


def packed(*linears: nn.Linear, int8: bool) -> PackedLinear:
    """Linear layers of one input as one."""
    weights = [linear.weight.detach() for linear in linears]
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    # a single weight isn't copied: a GPU's product takes it as it is
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return PackedLinear(weight, torch.cat(biases) if biases else None, int8=int8)


def with_packed_linears(module: nn.Module, pack: Callable[..., PackedLinear]) -> nn.Module:
    """A copy that shares all parameters but those of its linear layers, which are packed."""
    if type(module) is nn.Linear:
        return pack(module)
    clone = copy.copy(module)
    clone._modules = {name: with_packed_linears(child, pack) for name, child in module.named_children()}
    return clone
