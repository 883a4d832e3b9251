"""Generation: `Engine` knows tokens alone, `LLM` text. Voting and HTTP are other rooms."""

from m1.engine.engine import Engine, stop_tokens
from m1.engine.llm import LLM
from m1.engine.sampling import SamplingParams, fold_in
from m1.engine.sequence import Request, Sequence

__all__ = ["LLM", "Engine", "Request", "SamplingParams", "Sequence", "fold_in", "stop_tokens"]
