"""M1Config: a Llama-style decoder whose layers are full attention or Mamba."""

from collections.abc import Mapping
from math import ceil
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from m1.options import shown

ATTENTION, MAMBA = "full_attention", "linear_attention"  # the names in transformers' caches and masks

# Supported teachers, with the settings that their architecture implies but their config.json leaves out.
TEACHERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"attention_bias": True, "attention_out_bias": False},
    "qwen3": {"qk_norm": True},
}
MODEL_TYPES = ("m1", *TEACHERS)  # the models whose layers M1 knows

# The largest sizes that M1 reads: some times those of the largest models, so that a damaged configuration is refused
# before anything is allocated.
SIZES = {
    "vocab_size": 2**22, "hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 1024,
    "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 2**14, "state_size": 2**14,
    "conv_kernel": 1024, "time_step_rank": 2**17, "max_position_embeddings": 2**31, "num_labels": 2**20,
}  # fmt: skip


@strict
class M1Config(PreTrainedConfig):
    """Configuration of `M1ForCausalLM`, a Llama-style decoder whose layers are full attention or Mamba.

    Fields that aren't listed here mean the same as in `LlamaConfig`.

    Args:
        layer_types: "full_attention" or "linear_attention" (Mamba) per layer; all Mamba when None.
        mixer: "mamba" (Mamba-1) or "mamba2".
        state_size: N, states per channel. Mamba-1: must divide head_dim, as channels work in groups of N; 16 when None.
            Mamba-2: must be head_dim.
        conv_kernel: K, number of taps of the causal convolution.
        time_step_rank: R, rank of Mamba-1's time-step projection; ceil(hidden_size / 16) when None.
        attention_bias: adds biases to q, k, v and o, and to the projections of Mamba layers.
        attention_out_bias: overrides attention_bias for o and the Mamba layers' output projection. The same as
            attention_bias when None (Llama); Qwen2 has biases on q, k and v only.
        qk_norm: applies RMSNorm to each head's queries and keys (Qwen3), and to each head's C and B in Mamba layers.
        head_alignment: order of C and the output projection, recorded at conversion. "official" is the released code's
            order. "attention" pairs each group with the part of the KV head that its query head attended to. Only the
            norms of `qk_norm` depend on it.

    Raises:
        StrictDataclassError: a field that doesn't fit; the message names it.
    """

    model_type = "m1"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    auto_map: ClassVar[dict[str, str]] = {}  # TRL reads it where it loads a reference model

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    qk_norm: bool = False
    attention_dropout: int | float | None = 0.0
    mlp_bias: bool = False
    layer_types: list[str] | None = None
    mixer: str = "mamba"
    state_size: int | None = None
    conv_kernel: int = 4
    time_step_rank: int | None = None
    head_alignment: str = "official"

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        if self.time_step_rank is None:
            self.time_step_rank = ceil(self.hidden_size / 16)
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if self.state_size is None:
            self.state_size = self.head_dim if self.mixer == "mamba2" else 16
        check_sizes(self)  # before lists of these sizes are made
        if self.layer_types is None:
            self.layer_types = [MAMBA] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @property
    def mamba_size(self) -> int:
        """D, the inner width of a Mamba mixer."""
        return self.num_attention_heads * self.head_dim

    @property
    def mamba_kv_size(self) -> int:
        """X, the width of x and B before they are repeated to width D."""
        return self.num_key_value_heads * self.head_dim

    @property
    def mamba_widths(self) -> list[int]:
        """Widths of z, x, B, C and dt, the outputs of a Mamba layer's input projection."""
        steps = self.num_attention_heads if self.mixer == "mamba2" else self.time_step_rank
        return [self.mamba_size, self.mamba_kv_size, self.mamba_kv_size, self.mamba_size, steps]

    @property
    def conv_cache_size(self) -> int:
        """Number of channels of the cached convolution inputs: those of x, or of x | B | C in Mamba-2."""
        return 2 * self.mamba_kv_size + self.mamba_size if self.mixer == "mamba2" else self.mamba_kv_size

    @property
    def attention_layers(self) -> list[int]:
        """Numbers of the layers that are attention, from 0."""
        return [i for i, kind in enumerate(self.layer_types) if kind == ATTENTION]

    def validate_architecture(self) -> None:
        """Checks the fields on construction. Raises ValueError naming the field that doesn't fit."""
        check_sizes(self)
        if len(self.layer_types) != self.num_hidden_layers or set(self.layer_types) - {ATTENTION, MAMBA}:
            raise ValueError(
                f"layer_types must name {ATTENTION!r} or {MAMBA!r} for each of the {self.num_hidden_layers} layers, "
                f"got {self.layer_types}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.mixer not in ("mamba", "mamba2"):
            raise ValueError(f"mixer must be 'mamba' or 'mamba2', got {self.mixer!r}")
        if self.mixer == "mamba2" and self.state_size != self.head_dim:
            raise ValueError(f"state_size ({self.state_size}) must be head_dim ({self.head_dim}) with mixer 'mamba2'")
        if MAMBA in self.layer_types and self.head_dim % self.state_size:
            raise ValueError(
                f"head_dim ({self.head_dim}) must be a multiple of state_size ({self.state_size}): Mamba channels work "
                "in groups of state_size inside each head; choose a state_size that divides head_dim"
            )
        if self.head_alignment not in ("attention", "official"):
            raise ValueError(f"head_alignment must be 'attention' or 'official', got {self.head_alignment!r}")


def check_sizes(config: PreTrainedConfig | Mapping[str, Any]) -> None:
    """Raises ValueError naming the first size, of a configuration or its JSON, that isn't 1 to its SIZES.

    Missing fields are skipped, and those of another type, which transformers refuses.
    """
    for name, most in SIZES.items():
        size = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if isinstance(size, int | float) and not 1 <= size <= most:
            raise ValueError(f"{name} ({shown(size)}) must be at least 1 and at most {most}")


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """The kind of each layer of an M1 model or a transformer, such as ATTENTION or MAMBA."""
    return getattr(config, "layer_types", None) or [ATTENTION] * config.num_hidden_layers
