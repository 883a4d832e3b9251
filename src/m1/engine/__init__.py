"""Generation. Token-only: text is LLM's; voting and HTTP are other rooms."""

from m1.engine.engine import Engine
from m1.engine.sampling import SamplingParams
from m1.engine.sequence import Completion, Request

__all__ = ["Completion", "Engine", "Request", "SamplingParams"]
