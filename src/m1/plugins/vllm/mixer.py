"""The Mamba mixers of M1 on vLLM's pages of states, split over tensor-parallel ranks.

They are the model's own mixers (`m1.model.mamba`, `m1.model.mamba2`) and run M1's ops. vLLM provides the projections,
so that adapters and tensor parallelism work; the pages; and, for each step, which rows belong to which sequence. With
several ranks, each has a share of the KV heads and the query heads that they serve: a mixer with fewer heads.
Several layers share a page (pages.py).
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba import mamba_mixer  # noqa: F401 (registers the operator that runs `forward_impl`)
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backends.mamba1_attn import (
    Mamba1AttentionBackend,
    Mamba1AttentionMetadata,
    Mamba1AttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from m1.model.cache_layout import Buffer, MambaState, layer_layout
from m1.model.configuration import MAMBA, M1Config
from m1.model.mamba import MambaMixer
from m1.model.mamba2 import Mamba2Mixer
from m1.model.mixer import Constants, Mixer
from m1.plugins.vllm.pages import aligned_bytes, shared_pages


@dataclass
class PromptLengths(Mamba1AttentionMetadata):
    """vLLM's description of a step, and the length of its longest chunk of a prompt.

    Attributes:
        max_length: number of tokens, known on the host.
    """

    max_length: int = 0


class PromptLengthsBuilder(Mamba1AttentionMetadataBuilder):
    """Makes the `PromptLengths` of a step."""

    metadata_cls = PromptLengths
    needs_causal_conv1d_metadata = False

    def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> PromptLengths:
        """vLLM calls it once per step and group of layers."""
        metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
        if metadata.num_prefills:
            edges = common_attn_metadata.query_start_loc_cpu[-metadata.num_prefills - 1 :]
            metadata.max_length = int(edges.diff().max())
        return metadata


class M1Backend(Mamba1AttentionBackend):
    """Tells vLLM how to describe a step to M1's mixers, of either kind."""

    @staticmethod
    def get_builder_cls() -> type[PromptLengthsBuilder]:
        """The builder of a step's metadata."""
        return PromptLengthsBuilder


def shared_config(config: M1Config, ranks: int) -> M1Config:
    """The configuration of a mixer's share on one of several tensor-parallel ranks.

    Raises:
        ValueError: KV heads that can't be shared evenly.
    """
    if config.num_key_value_heads % ranks:
        raise ValueError(
            f"the Mamba layers' {config.num_key_value_heads} KV heads can't be split over {ranks} ranks: choose a "
            "tensor_parallel_size that divides them"
        )
    share = copy.copy(config)
    share.num_attention_heads //= ranks
    share.num_key_value_heads //= ranks
    return share


def state_layout(vllm_config: VllmConfig) -> MambaState[Buffer]:
    """What a rank keeps of a sequence in a Mamba layer. The recurrent state is float32, as rounding errors add up.

    Raises:
        ValueError: another dtype for the states, or speculative decoding, which would have to roll them back.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if cache.mamba_ssm_cache_dtype not in ("auto", "float32") or cache.mamba_cache_dtype != "auto":
        raise ValueError(
            f"mamba_ssm_cache_dtype {cache.mamba_ssm_cache_dtype}, mamba_cache_dtype {cache.mamba_cache_dtype}: M1 "
            "models have float32 states, and convolution inputs in the weights' dtype; leave both at auto"
        )
    if vllm_config.speculative_config is not None:
        raise ValueError("M1 models have no speculative decoding in vLLM: their states can't be rolled back")
    config = shared_config(model.hf_config, vllm_config.parallel_config.tensor_parallel_size)
    return layer_layout(config, MAMBA, 0, model.dtype)  # type: ignore[return-value]


def page_layers(vllm_config: VllmConfig) -> list[list[int]]:
    """The Mamba layers that share pages."""
    model, ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    return shared_pages(shared_config(model.hf_config, ranks), state_layout(vllm_config), model.dtype)


def page_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of a page of states."""
    return max(map(len, page_layers(vllm_config))) * sum(map(aligned_bytes, state_layout(vllm_config)))


class States(MambaBase):
    """What vLLM takes for a Mamba layer: the pages of a few layers' states. A page has those of one sequence.

    Args:
        vllm_config: of the engine.
        prefix: a name of its own, with the number of the first of these layers.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        self.prefix, self.bytes, self.layout = prefix, page_bytes(vllm_config), state_layout(vllm_config)
        self.kv_cache = (torch.empty(0),)
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property  # type: ignore[override]
    def kv_cache(self) -> Sequence[Tensor]:
        """All pages [pages, bytes], alone in a sequence. vLLM sets it, and sets it anew."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, kv_cache: Sequence[Tensor]) -> None:
        self._kv_cache, self._views = kv_cache, dict[int, MambaState[Tensor]]()  # views would keep old pages alive

    def of_layer(self, place: int) -> MambaState[Tensor]:
        """All pages' states of the layer at this place among those that share them, without a copy."""
        if place not in self._views:
            (pages,), views = self.kv_cache, []
            start = place * sum(map(aligned_bytes, self.layout))
            for buffer in self.layout:
                own = pages[:, start : start + math.prod(buffer.shape) * buffer.dtype.itemsize]
                views.append(own.view(buffer.dtype).view(-1, *buffer.shape))
                start += aligned_bytes(buffer)
            self._views[place] = MambaState(*views)
        return self._views[place]

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """The shape of a page."""
        return ((self.bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Its dtype: bytes."""
        return (torch.int8,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """What vLLM takes both kinds of mixer for: it chooses how pages are copied, which `M1ForCausalLM` says."""
        return MambaAttentionBackendEnum.MAMBA1

    def get_attn_backend(self) -> type[M1Backend]:
        """What describes a step to the layers."""
        return M1Backend


class PagedMixer(Mixer):
    """What M1's two mixers need in vLLM: its linear layers, its pages, and its steps with several prompts and rows.

    Args:
        vllm_config: of the engine.
        prefix: the layer's name in the checkpoint, which has its number.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        config, ranks = vllm_config.model_config.hf_config, get_tensor_model_parallel_world_size()
        share, layer = shared_config(config, ranks), extract_layer_index(prefix)
        super().__init__(share, layer)  # type: ignore[call-arg]
        self.prefix = prefix
        layers = next(layers for layers in page_layers(vllm_config) if layer in layers)
        self.place, first = layers.index(layer), f"{prefix}.states".replace(f".{layer}.", f".{layers[0]}.")
        context = vllm_config.compilation_config.static_forward_context
        self.states: States = context[first] if self.place else States(vllm_config, first)
        self.fixed: Constants | None = None
        self.has_adapters = vllm_config.lora_config is not None
        parallel: Any = {"quant_config": vllm_config.quant_config, "return_bias": False}
        self.in_proj = InProjection(config, ranks, prefix=f"{prefix}.in_proj", **parallel)
        self.out_proj = RowParallelLinear(
            config.mamba_size, config.hidden_size, config.attention_out_bias, prefix=f"{prefix}.out_proj", **parallel
        )
        if hasattr(self, "dt_proj"):
            self.dt_proj = ColumnParallelLinear(
                config.time_step_rank, config.mamba_size, prefix=f"{prefix}.dt_proj", **parallel
            )
        for name, parameter in self.named_parameters():
            if not hasattr(parameter, "weight_loader"):
                parts = getattr(self, "conv_widths", None) if name.startswith("conv1d") else None
                parameter.weight_loader = share_loader(parts or [len(parameter)])  # type: ignore[attr-defined]
        context[prefix] = self

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states [T, H] -> [T, H]. One operator, on whose name vLLM splits compiled graphs."""
        output = torch.empty_like(hidden_states)
        torch.ops.vllm.mamba_mixer(hidden_states, output, _encode_layer_name(self.prefix))
        return output

    def forward_impl(self, hidden_states: Tensor, output: Tensor) -> None:
        """Fills output [T, H]. Decoded rows come first, then chunks of prompts, then padding."""
        if self.fixed is None:
            self.fix_constants()
        batches = get_forward_context().attn_metadata
        batch = batches.get(self.states.prefix) if isinstance(batches, dict) else None
        if batch is None:  # a dummy run, which measures memory
            output.copy_(self.out_proj(self.activations(hidden_states).z.contiguous()))
            return
        rows, tokens = batch.num_decode_tokens, batch.num_decode_tokens + batch.num_prefill_tokens
        activations = self.activations(hidden_states[:tokens])
        parts = []
        if rows:
            parts.append(self.decode_rows(activations._make(t[:rows] for t in activations), batch))
        if rows < tokens:
            parts.append(self.prefill_chunks(activations._make(t[rows:] for t in activations), batch))
        output[:tokens] = self.out_proj(parts[0] if len(parts) == 1 else torch.cat(parts))

    def decode_rows(self, activations: Any, batch: PromptLengths) -> Tensor:
        """One token per row: activations [b, ...] -> y [b, D]. The rows' pages are updated in place.

        Rows that pad a CUDA graph have page 0, which is nobody's.
        """
        pages = batch.state_indices_tensor_d[: len(activations.z), 0]
        return self.step(activations, self.fixed, self.state, pages)

    def prefill_chunks(self, activations: Any, batch: PromptLengths) -> Tensor:
        """Chunks of prompts, one after another: activations [T, ...] -> y [T, D].

        They run on copies of the pages' states. A prompt's first chunk starts from zero: its page isn't cleared.
        """
        pages, first = batch.state_indices_tensor_p.long(), ~batch.has_initial_states_p
        state = MambaState(*(t[pages].masked_fill(first.view(-1, *[1] * (t.dim() - 1)), 0) for t in self.state))
        own = torch.arange(len(pages), device=pages.device)
        y = self.prefill(activations, self.fixed, state, own, batch.query_start_loc_p, batch.max_length)
        for paged, new in zip(self.state, state, strict=True):
            paged[pages] = new
        return y

    @property
    def state(self) -> MambaState[Tensor]:
        """All pages' states of this layer."""
        return self.states.of_layer(self.place)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `Mixer.project`; dt is contiguous, as an adapter of dt_proj requires."""
        *others, dt = super().project(hidden_states)
        return (*others, dt.contiguous() if self.has_adapters else dt)  # type: ignore[return-value]

    @torch.no_grad()
    def fix_constants(self) -> None:
        """Makes the scan's constants of the parameters, again in place: recorded CUDA graphs read them."""
        constants = self.constants()
        if self.fixed is None:
            self.fixed = Constants(*(t.float().clone() for t in constants))
        for fixed, new in zip(self.fixed, constants, strict=True):
            fixed.copy_(new)


class PagedMamba(PagedMixer, MambaMixer):
    """The Mamba-1 mixer in vLLM."""


class PagedMamba2(PagedMixer, Mamba2Mixer):
    """The Mamba-2 mixer in vLLM."""


class InProjection(MergedColumnParallelLinear):
    """in_proj with its five parts z, x, B, C and dt, each split over the ranks. All ranks have all of Mamba-1's dt.

    Args:
        config: of the whole model.
        ranks: number of tensor-parallel ranks.
        options: of `MergedColumnParallelLinear`.
    """

    def __init__(self, config: M1Config, ranks: int, **options: Any):
        *split, dt = config.mamba_widths
        self.repeats = 1 if config.mixer == "mamba2" else ranks
        self.dt_width = dt
        super().__init__(config.hidden_size, [*split, dt * self.repeats], config.attention_bias, **options)

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
        """Loads this rank's share of in_proj's weight or bias."""
        super().weight_loader(param, self._with_dt_for_all(loaded_weight, loaded_shard_id), loaded_shard_id)

    def weight_loader_v2(self, param: Any, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
        """The same, for vLLM's newer parameters."""
        super().weight_loader_v2(param, self._with_dt_for_all(loaded_weight, loaded_shard_id), loaded_shard_id)

    def _with_dt_for_all(self, loaded: Tensor, part: Any) -> Tensor:
        """The whole weight with dt's rows once per rank, so that each rank's share of them is all."""
        return loaded if part is not None else torch.cat([loaded, *[loaded[-self.dt_width :]] * (self.repeats - 1)])


def share_loader(share: list[int]) -> Callable[[nn.Parameter, Tensor], None]:
    """A loader of a rank's share of a parameter, which is a share of the rows of each of its parts, one after another.

    It is a function of `param`, as vLLM's own are. vLLM calls it twice for new weights on a server, the second time
    with another parameter under that name.

    Args:
        share: the rank's number of rows of each part.
    """

    def load(param: nn.Parameter, loaded_weight: Tensor) -> None:
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        parts = loaded_weight.split([rows * ranks for rows in share])
        param.data.copy_(torch.cat([part.chunk(ranks)[rank] for part in parts]))

    return load
