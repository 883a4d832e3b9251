"""Generation. `Engine` maps tokens to tokens; `LLM` maps text to text."""

from m1.engine.engine import Engine, stop_tokens
from m1.engine.llm import LLM
from m1.engine.sampling import SamplingParams
from m1.engine.sequence import Request, Sequence
from m1.ops.random_bits import fold_in

__all__ = ["LLM", "Engine", "Request", "SamplingParams", "Sequence", "fold_in", "stop_tokens"]
