"""Generation: `Engine` knows tokens alone, `LLM` text. Voting and HTTP are other rooms."""

from m1.engine.engine import Engine, max_len_for, stop_tokens
from m1.engine.llm import LLM
from m1.engine.sampling import SamplingParams
from m1.engine.sequence import Completion, Request

__all__ = ["LLM", "Completion", "Engine", "Request", "SamplingParams", "max_len_for", "stop_tokens"]
