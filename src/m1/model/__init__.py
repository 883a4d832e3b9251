"""The network: configuration, one stack for training and decoding, conversion from and to other layouts."""

from transformers import AutoConfig, AutoModelForCausalLM

from m1.model.configuration import M1Config
from m1.model.modeling import M1ForCausalLM, M1Model

AutoConfig.register("m1", M1Config, exist_ok=True)
AutoModelForCausalLM.register(M1Config, M1ForCausalLM, exist_ok=True)

__all__ = ["M1Config", "M1ForCausalLM", "M1Model"]
