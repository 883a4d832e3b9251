"""The network: its configuration, one stack for training and decoding, and conversion from and to other layouts."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from m1.model.configuration import M1Config
from m1.model.modeling import M1ForCausalLM, M1Model

AutoConfig.register("m1", M1Config, exist_ok=True)
AutoModel.register(M1Config, M1Model, exist_ok=True)
AutoModelForCausalLM.register(M1Config, M1ForCausalLM, exist_ok=True)
# pipelines, label smoothing and the lm-evaluation-harness recognise causal LMs by this mapping
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["m1"] = "M1ForCausalLM"

__all__ = ["M1Config", "M1ForCausalLM", "M1Model"]
