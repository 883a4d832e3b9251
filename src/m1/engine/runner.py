"""The network on slots: prefills chunks of many prompts, or decodes one token of each of many sequences.

Weights come from a loaded model. Linear layers are packed once, for products with few rows; Mamba layers reuse the
model's modules. Results are batch-invariant in float32 on a CPU: the order of each sum is fixed.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from m1.engine.rotary import Rotary
from m1.engine.slots import Slots
from m1.errors import UserError
from m1.model.cache_layout import AttentionCache, MambaState
from m1.model.checkpoint import refuse_quantized_model
from m1.model.configuration import ATTENTION, layer_kinds
from m1.model.mixer import AlignedLinear
from m1.model.parallelize import whole
from m1.ops import PackedLinear, add_rms_norm, decode_attention, embedding, prefill_attention, rotate_and_cache
from m1.options import Quantization

MODELS = ("m1", "llama", "qwen2", "qwen3")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LINEAR = (nn.Linear, AlignedLinear)  # not their subclasses, whose weights may be stored otherwise


class DecodeBatch(NamedTuple):
    """The input of a decode step: one token of each of b sequences.

    Attributes:
        tokens: [b] int64, the tokens to run.
        slots: [b] int64, the slots of their sequences; -1 leaves every slot as it is.
        lengths: [b] int64, how many tokens the slots have seen, which is the position of the new ones.
        keys: [b] int64, lengths + 1, how many keys the new ones see.
    """

    tokens: Tensor
    slots: Tensor
    lengths: Tensor
    keys: Tensor


class PrefillBatch(NamedTuple):
    """The input of a prefill: chunks of c prompts, one after another, T tokens together.

    Attributes:
        tokens: [T] int64, the tokens to run.
        positions: [T] int64, their positions in their prompts.
        totals: [T] int64, the numbers of tokens in their prompts.
        slots: [c] int64, the slots of the prompts.
        starts: [c] int64, how many tokens the slots have seen.
        cu_seqlens: [c + 1] int64, where each chunk begins, and T.
        owners: [T] int64, the slot of each token.
        max_length: number of tokens of the longest chunk.
    """

    tokens: Tensor
    positions: Tensor
    totals: Tensor
    slots: Tensor
    starts: Tensor
    cu_seqlens: Tensor
    owners: Tensor
    max_length: int


class Runner:
    """Runs an M1, Llama, Qwen2 or Qwen3 model on caches in slots, for inference.

    `prefill` runs chunks of prompts and returns hidden states, which `head` makes into logits. `decode` runs one token
    of each of many sequences and returns logits. Call `attach` before. It comes later, because packing takes memory,
    and the caches may have what is left.

    Args:
        model: the network, whose weights mustn't change afterwards.
        quantization: rounds the weights of all linear layers (`PackedLinear`); the head's to 8 bits at least.

    Raises:
        UserError: another architecture, another activation than silu, sliding-window attention, or weights that aren't
            plain float32, bfloat16 or float16: quantized ones, or adapters.
    """

    def __init__(self, model: PreTrainedModel, quantization: Quantization | None = None):
        config: Any = model.config
        network: Any = model.model
        if config.model_type not in MODELS:
            raise UserError(f"the engine runs {', '.join(MODELS)} models, not {config.model_type!r}")
        refuse_quantized_model(model)
        if config.hidden_act != "silu":
            raise UserError(f"the engine's MLPs are SwiGLU, with hidden_act 'silu', not {config.hidden_act!r}")
        if getattr(config, "use_sliding_window", False):
            raise UserError(
                "the engine has no sliding-window attention: set use_sliding_window to false, or use generate"
            )
        if other := {p.dtype for p in model.parameters()} - set(DTYPES):
            raise _other_weights(str(other.pop()))
        self.device = model.device
        self.eps = config.rms_norm_eps
        self.embedding: Tensor = network.embed_tokens.weight
        self.model = model
        pack = Packer(quantization)
        self._pack = pack
        self.layers: list[AttentionLayer | MambaLayer] = [
            AttentionLayer(layer, config, pack) if kind == ATTENTION else MambaLayer(layer, pack)
            for layer, kind in zip(network.layers, layer_kinds(config), strict=True)
        ]
        self.norm: Tensor = network.norm.weight
        self.head = pack(model.get_output_embeddings(), bits=8)

    def attach(self, slots: Slots) -> None:
        """Makes `prefill` and `decode` read and update the caches in these slots."""
        network: Any = self.model.model
        self.rotary = Rotary(network.rotary_emb, slots.max_length, self.embedding.dtype)
        for layer, cache in zip(self.layers, slots.layers, strict=True):
            if isinstance(layer, AttentionLayer):
                layer.page_table = slots.page_table
            layer.cache = cache

    def load_weights(self, model: PreTrainedModel) -> None:
        """Takes over the weights of a model with the same configuration. They go into the runner's own model, too."""
        own = self.model.state_dict(keep_vars=True)
        for name, new in model.state_dict(keep_vars=True).items():
            if own[name] is not new:
                own[name].data.copy_(whole(new))  # a sharded model is gathered weight by weight
        self._pack.repeat()
        for layer in self.layers:
            if isinstance(layer, MambaLayer):
                layer.load_constants()

    def prefill(self, batch: PrefillBatch) -> Tensor:
        """Runs chunks of prompts. Returns the hidden states [T, H] after the final norm."""
        rotation = self.rotary(batch.positions, batch.totals)
        return self._stack(batch.tokens, lambda layer, hidden: layer.prefill(hidden, *rotation, batch))

    def decode(self, rows: DecodeBatch) -> Tensor:
        """Runs one token per row. Returns the logits [b, V] after it."""
        rotation = self.rotary(rows.lengths, rows.keys)
        hidden = self._stack(rows.tokens, lambda layer, hidden: layer.decode(hidden, *rotation, rows))
        return self.head(hidden)

    def _stack(self, tokens: Tensor, mix: Any) -> Tensor:
        """Runs all layers and the final norm on tokens [rows]. Returns hidden states [rows, H]."""
        hidden = embedding(tokens, self.embedding)
        update = None
        for layer in self.layers:
            update = mix(layer, add_rms_norm(hidden, update, layer.mixer_norm, self.eps))
            update = layer.mlp(add_rms_norm(hidden, update, layer.mlp_norm, self.eps))
        return add_rms_norm(hidden, update, self.norm, self.eps)


class DecoderLayer:
    """Base class of `AttentionLayer` and `MambaLayer`: two norms and an MLP.

    Args:
        layer: the model's decoder layer.
        pack: packs linear layers into a `PackedLinear`.

    Attributes:
        cache: what the layer keeps of all sequences, given by `Runner.attach`.
    """

    cache: Any

    def __init__(self, layer: Any, pack: "Packer"):
        self.mixer_norm: Tensor = layer.input_layernorm.weight
        self.mlp_norm: Tensor = layer.post_attention_layernorm.weight
        self.gate_up = pack(layer.mlp.gate_proj, layer.mlp.up_proj, gated=True)
        self.down = pack(layer.mlp.down_proj)

    def mlp(self, hidden: Tensor) -> Tensor:
        """The gated MLP: hidden states [..., H] -> [..., H], without norm and residual."""
        return self.down(self.gate_up(hidden))


class AttentionLayer(DecoderLayer):
    """Rotary grouped-query attention over the keys and values in the slots.

    Args:
        layer: the model's decoder layer.
        config: the model's configuration.
        pack: packs linear layers into a `PackedLinear`.

    Attributes:
        cache: keys and values of all pages, [pages, kv_heads, page_size, head_dim] each.
        page_table: [slots, max_pages] int32, the pages of each slot.
    """

    cache: AttentionCache[Tensor]
    page_table: Tensor

    def __init__(self, layer: Any, config: Any, pack: "Packer"):
        super().__init__(layer, pack)
        attention = layer.self_attn
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = attention.head_dim
        self.qkv, self.out = pack(attention.q_proj, attention.k_proj, attention.v_proj), pack(attention.o_proj)
        norms = [getattr(attention, name, nn.Identity()) for name in ("q_norm", "k_norm")]
        self.norms = [] if all(type(norm) is nn.Identity for norm in norms) else norms

    def prefill(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: PrefillBatch) -> Tensor:
        """Runs chunks of prompts, hidden [T, H]. Returns [T, H]."""
        q = self.queries(hidden, cos, sin, batch.owners, batch.positions)
        y = prefill_attention(
            q, *self.cache, batch.starts, batch.cu_seqlens, self.page_table, batch.slots, batch.max_length
        )
        return self.out(y.flatten(1))

    def decode(self, hidden: Tensor, cos: Tensor, sin: Tensor, rows: DecodeBatch) -> Tensor:
        """Runs one token per row, hidden [b, H]. Returns [b, H]."""
        q = self.queries(hidden, cos, sin, rows.slots, rows.lengths)
        return self.out(decode_attention(q, *self.cache, rows.keys, self.page_table, rows.slots).flatten(1))

    def queries(self, hidden: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """hidden [rows, H] -> rotated queries [rows, heads, head_dim]. Keys and values go into the cache."""
        qkv = self.qkv(hidden).view(len(hidden), -1, self.head_dim)
        if self.norms:
            parts = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            qkv = torch.cat([*(norm(part) for norm, part in zip(self.norms, parts, strict=False)), parts[2]], dim=1)
        return rotate_and_cache(qkv, cos, sin, *self.cache, self.page_table, slots, positions)


class MambaLayer(DecoderLayer):
    """The model's Mamba-1 or Mamba-2 mixer on the states in the slots.

    Args:
        layer: the model's decoder layer.
        pack: packs linear layers into a `PackedLinear`.

    Attributes:
        cache: convolution inputs [slots, channels, K-1] and recurrent states [slots, ...] of all slots.
    """

    cache: MambaState[Tensor]

    def __init__(self, layer: Any, pack: "Packer"):
        super().__init__(layer, pack)
        self.mixer: Any = with_packed_linears(layer.mamba, pack)
        constants = layer.mamba.constants()
        self.constants = type(constants)(*(t.float().clone() for t in constants))

    def load_constants(self) -> None:
        """Computes the constants again, from other weights."""
        for own, new in zip(self.constants, self.mixer.constants(), strict=True):
            own.copy_(new)

    def prefill(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: PrefillBatch) -> Tensor:
        """Runs chunks of prompts, hidden [T, H]. Returns [T, H]."""
        chunks = batch.slots, batch.cu_seqlens, batch.max_length
        y = self.mixer.prefill(self.mixer.activations(hidden), self.constants, self.cache, *chunks)
        return self.mixer.out_proj(y)

    def decode(self, hidden: Tensor, cos: Tensor, sin: Tensor, rows: DecodeBatch) -> Tensor:
        """Runs one token per row, hidden [b, H]. Returns [b, H]."""
        y = self.mixer.step(self.mixer.activations(hidden), self.constants, self.cache, rows.slots)
        return self.mixer.out_proj(y)


class Packer:
    """Packs linear layers that share an input into one, whose outputs are theirs in order.

    Args:
        quantization: rounds the weights (`PackedLinear`).
    """

    def __init__(self, quantization: Quantization | None):
        self.quantization = quantization
        self._packed: list[tuple[PackedLinear, tuple[nn.Linear, ...]]] = []

    def __call__(self, *linears: nn.Linear, gated: bool = False, bits: int = 4) -> PackedLinear:
        """Packs these layers.

        Args:
            linears: those that share an input.
            gated: makes a gated layer of two.
            bits: the fewest to which weights are rounded.

        Raises:
            UserError: another kind of layer, such as a quantized one or one with an adapter.
        """
        for linear in linears:
            if type(linear) not in LINEAR:
                raise _other_weights(type(linear).__name__)
        quantization: Quantization | None = "int8" if self.quantization and bits > 4 else self.quantization
        layer = PackedLinear(*_joined(linears), quantization=quantization, gated=gated)
        self._packed.append((layer, linears))
        return layer

    def repeat(self) -> None:
        """Packs all layers again, after their weights have changed."""
        for layer, linears in self._packed:
            layer.load(*_joined(linears))


def _joined(linears: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor | None]:
    weights = [linear.weight.detach() for linear in linears]
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    # don't copy a single weight: GPU products use it without packing
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return weight, torch.cat(biases) if biases else None


def _other_weights(found: str) -> UserError:
    return UserError(
        f"the engine runs plain float32, bfloat16 or float16 weights, not {found}: merge adapters and load the model "
        "unquantized in one of these dtypes, or use generate"
    )


def with_packed_linears(module: nn.Module, pack: "Packer") -> nn.Module:
    """A copy of the module with packed linear layers. It shares all other parameters."""
    if isinstance(module, LINEAR) and type(module) in LINEAR:
        return pack(module)
    clone = copy.copy(module)
    clone._modules = {name: with_packed_linears(child, pack) for name, child in module.named_children()}
    return clone
