"""M1: turn a pretrained transformer into a hybrid Mamba reasoning model and make its test-time compute cheap."""

from m1.engine import LLM, Engine, Request, SamplingParams
from m1.evaluation.evaluate import evaluate
from m1.model import M1Config, M1ForCausalLM
from m1.model.convert import convert
from m1.reasoning.voting import vote

__all__ = ["LLM", "Engine", "M1Config", "M1ForCausalLM", "Request", "SamplingParams", "convert", "evaluate", "vote"]
