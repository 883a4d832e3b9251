"""The shapes of the models that benchmarks build, with random weights."""

from typing import Any

# Arguments of LlamaConfig and M1Config, and `attention`: the layers that stay attention in the hybrid.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=1000, attention=(1, 3),
    ),
    "30m": dict(
        hidden_size=512, intermediate_size=1344, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, vocab_size=16000, attention=(3, 7),
    ),
    "100m": dict(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
        head_dim=64, vocab_size=16000, attention=(3, 7, 11),
    ),
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        head_dim=64, vocab_size=49152, attention=(3, 7, 11, 15, 19, 23, 27), tie_word_embeddings=True,
    ),
    "llama-1b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128256, attention=(3, 7, 11, 15), tie_word_embeddings=True,
    ),
    "m1-3b": dict(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, attention=(3, 8, 13, 18, 23, 27), tie_word_embeddings=True,
    ),
}  # fmt: skip
