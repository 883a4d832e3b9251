"""M1ForCausalLM: a Llama-style decoder with Mamba mixers in most layers. One stack for training and decoding.

Norms, rotary attention and MLPs are transformers' modules, so a model with attention in every layer *is* the teacher.
This file adds a mixer per layer. packing.py makes packed and padded batches exact.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from m1.model.configuration import ATTENTION, MAMBA, M1Config
from m1.model.mamba import MambaMixer
from m1.model.mamba2 import Mamba2Mixer
from m1.model.mixer import Mixer
from m1.model.packed_attention import Documents
from m1.model.packing import Padding, prepare

CACHE = fields(BaseModelOutputWithPast)[1].name  # transformers calls it past_key_values, newer ones cache


def new_mixer(config: M1Config, layer_idx: int) -> Mixer:
    """The mixer that `config.mixer` names, for a Mamba layer."""
    return Mamba2Mixer(config, layer_idx) if config.mixer == "mamba2" else MambaMixer(config, layer_idx)


class M1Attention(Qwen3Attention):
    """Rotary grouped-query attention of Llama, Qwen2 and Qwen3 teachers.

    It is transformers' `Qwen3Attention`, without the QK-norm and the biases that the teacher doesn't have.

    Args:
        config: `M1Config`; `qk_norm`, `attention_bias` and `attention_out_bias` choose the variant.
        layer_idx: number of the layer, its place in a cache.
    """

    def __init__(self, config: M1Config, layer_idx: int):
        super().__init__(config, layer_idx)
        if not config.qk_norm:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.attention_out_bias != config.attention_bias:
            self.o_proj = nn.Linear(config.mamba_size, config.hidden_size, bias=config.attention_out_bias)


class M1DecoderLayer(GradientCheckpointingLayer):
    """A decoder layer: norm -> attention or Mamba -> residual, norm -> MLP -> residual. [b, T, H] -> [b, T, H].

    Args:
        config: `M1Config`.
        layer_idx: number of the layer. `config.layer_types[layer_idx]` chooses attention or Mamba.
    """

    def __init__(self, config: M1Config, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        if self.layer_type == ATTENTION:
            self.self_attn = M1Attention(config, layer_idx)
        else:
            self.mamba = new_mixer(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        padding: Padding | None,
        position_embeddings: tuple[Tensor, Tensor],
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [b, T, H] -> [b, T, H]. The other arguments are those of `packing.Packing`."""
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        if self.layer_type == ATTENTION:
            hidden_states, _ = self.self_attn(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        else:
            hidden_states = self.mamba(hidden_states, seq_idx, padding, cache)
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class M1PreTrainedModel(PreTrainedModel):
    """Base class of `M1Model` and `M1ForCausalLM`: loading, saving, initialisation, and what transformers may use."""

    config_class = M1Config
    config: M1Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["M1DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": M1DecoderLayer, "attentions": M1Attention}  # noqa: RUF012

    @property
    def _is_stateful(self) -> bool:
        """Whether transformers must refuse assisted generation: a recurrent state can't be rolled back."""
        return MAMBA in self.config.layer_types

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mixer):
            module.reset_parameters()


class M1Model(M1PreTrainedModel):
    """The decoder without a language-model head: token ids [b, T] -> hidden states [b, T, H].

    Args:
        config: `M1Config`.
    """

    def __init__(self, config: M1Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(M1DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Returns the last hidden states [b, T, H]. Packing, padding and caches work as `packing.prepare` says.

        Args:
            input_ids: [b, T] token ids, or give inputs_embeds.
            attention_mask: [b, T] zero at padding (with a cache, over its tokens too), or masks made by `generate`.
            position_ids: [b, T] positions, which are counted when None.
            past_key_values: the cache to continue and update.
            inputs_embeds: [b, T, H] embeddings, in place of input_ids.
            use_cache: makes a cache if none is given.
            seq_idx: [b, T] integers, the document of each token in packed rows.
            cache: the newer name of past_key_values.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds; a cache with gradient checkpointing; as
                `packing.prepare`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        cache = past_key_values if cache is None else cache
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError("gradient checkpointing would update the cache twice: disable it, or give no cache")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cu_seqlens, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")  # as TRL's collator names them
        documents = None if cu_seqlens is None or longest is None else Documents(cu_seqlens, longest)
        packing = prepare(
            self.config, inputs_embeds, attention_mask, position_ids, cache, seq_idx, bool(use_cache), documents
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=packing.position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer while `generate` exits early
            hidden_states = layer(hidden_states, position_embeddings=position_embeddings, **packing._asdict(), **kwargs)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(hidden_states, packing.cache)


class M1ForCausalLM(M1PreTrainedModel, GenerationMixin):
    """The language model, for training and generation: token ids [b, T] -> logits [b, T, V].

    A Llama-style decoder whose layers are full attention or Mamba. `save_pretrained`, `from_pretrained`, `generate` and
    the Auto classes work as for any transformers model.

    Args:
        config: `M1Config`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: M1Config):
        super().__init__(config)
        self.model = M1Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Returns the logits and, if labels are given, the next-token loss. Other arguments are those of `M1Model`.

        Args:
            labels: [b, T] token ids; -100 is ignored.
            logits_to_keep: return logits [b, logits_to_keep, V] of the last tokens only; 0 for all. A tensor holds the
                positions to keep.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            cache=cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss, logits, getattr(outputs, CACHE), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
