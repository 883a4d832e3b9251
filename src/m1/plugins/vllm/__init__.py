"""M1 models in vLLM, which finds `register` by the entry point `vllm.general_plugins`."""

import logging

TESTED = (0, 25), (0, 32)  # the first and the last version, as in pyproject.toml

logger = logging.getLogger(__name__)


def register() -> None:
    """Registers M1's configuration and model with vLLM, which calls this in each of its processes.

    The model is given by name: importing it would initialise CUDA too early.
    """
    import vllm

    import m1.model.configuration  # noqa: F401 (importing m1.model registers the configuration)

    numbers = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdecimal())
    if not TESTED[0] <= numbers <= TESTED[1]:
        logger.warning(
            "M1's plugin is tested with vLLM 0.%d to 0.%d, not %s", TESTED[0][1], TESTED[1][1], vllm.__version__
        )
    vllm.ModelRegistry.register_model("M1ForCausalLM", "m1.plugins.vllm.model:M1ForCausalLM")
