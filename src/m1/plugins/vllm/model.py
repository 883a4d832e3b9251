"""M1ForCausalLM in vLLM: its Llama, with Mamba mixers in most layers, and QK-norm as in Qwen3.

vLLM's Llama provides embeddings, MLPs, norms, the head, compilation, adapters and weight loading.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.utils import extract_layer_index

from m1.model.configuration import ATTENTION, M1Config
from m1.plugins.vllm.mixer import PagedMamba, PagedMamba2, page_bytes


class M1Attention(LlamaAttention):
    """Rotary grouped-query attention of Llama, Qwen2 and Qwen3 teachers: [T, H] -> [T, H].

    Args:
        vllm_config: of the engine.
        prefix: the layer's name in the checkpoint, which has its number.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        config: M1Config = vllm_config.model_config.hf_config
        super().__init__(
            config, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
            config.max_position_embeddings, vllm_config.quant_config, config.attention_bias, config.attention_out_bias,
            vllm_config.cache_config, prefix,
        )  # fmt: skip
        norms = (RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2))
        self.q_norm, self.k_norm = norms

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """positions [T], hidden_states [T, H] -> [T, H]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = (
            norm(t.unflatten(-1, (-1, self.head_dim))).flatten(-2) for norm, t in ((self.q_norm, q), (self.k_norm, k))
        )
        output, _ = self.o_proj(self.attn(*self.rotary_emb(positions, q, k), v))
        return output


class M1DecoderLayer(LlamaDecoderLayer):
    """A decoder layer: norm -> attention or Mamba -> residual, norm -> MLP -> residual.

    Args:
        vllm_config: of the engine.
        prefix: the layer's name in the checkpoint, which has its number.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str = ""):
        nn.Module.__init__(self)
        config: M1Config = vllm_config.model_config.hf_config
        self.is_attention = config.layer_types[extract_layer_index(prefix)] == ATTENTION
        if self.is_attention:
            self.self_attn = M1Attention(vllm_config, f"{prefix}.self_attn")
        else:
            self.mamba = (PagedMamba2 if config.mixer == "mamba2" else PagedMamba)(vllm_config, f"{prefix}.mamba")
        self.mlp = LlamaMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, vllm_config.quant_config, config.mlp_bias,
            f"{prefix}.mlp",
        )  # fmt: skip
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """positions [T], hidden_states and residual [T, H], None before the first layer -> the next two."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states) if self.is_attention else self.mamba(hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class M1ForCausalLM(LlamaForCausalLM, HasInnerState, IsHybrid):
    """An M1 model in vLLM: token ids [T] -> logits [T, V].

    Args:
        vllm_config: of the engine.
        prefix: of the names of its weights.

    Raises:
        ValueError: settings that it can't follow: `mixer.state_layout`, `mixer.shared_config`, and adapters of Mamba-1
            layers with several ranks.
    """

    supports_pp: ClassVar[Any] = False  # untested
    packed_modules_mapping = LlamaForCausalLM.packed_modules_mapping | {"in_proj": ["in_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        ranks = vllm_config.parallel_config.tensor_parallel_size
        if vllm_config.lora_config and ranks > 1 and vllm_config.model_config.hf_config.mixer == "mamba":
            # vLLM would give each rank its share of the adapter's rows for dt, which every rank needs all of
            raise ValueError("adapters of Mamba-1 layers need tensor_parallel_size 1: merge the adapter")
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=M1DecoderLayer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads weights, also new ones into a running engine, some at a time. Returns the names of the parameters."""
        loaded = super().load_weights(weights)
        mixers = {name.partition(".mamba.")[0] for name in loaded if ".mamba." in name}
        for prefix in mixers:
            mixer = self.get_submodule(f"{prefix}.mamba")
            # vLLM holds back weights that it renews by chunks: until a layer has all of its own, they are on "meta".
            if not any(parameter.is_meta for parameter in mixer.parameters()):
                mixer.fix_constants()
        return loaded

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """The shape of a page of states, on one rank."""
        return ((page_bytes(vllm_config),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Its dtype: bytes."""
        return (torch.int8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How the prefix cache copies it: whole."""
        return (get_temporal_copy_spec,)
