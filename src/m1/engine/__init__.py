"""Generation. Token-only: text, voting and HTTP are other rooms."""

from m1.engine.engine import Completion, Engine
from m1.engine.sampling import SamplingParams

__all__ = ["Completion", "Engine", "SamplingParams"]
