"""M1 models in vLLM 0.25 to 0.32, which finds `register` by the entry point `vllm.general_plugins`."""


def register() -> None:
    """Registers M1's configuration and model with vLLM, which calls this in each of its processes.

    The model is given by name: importing it would initialise CUDA too early.
    """
    from vllm import ModelRegistry

    import m1.model.configuration  # noqa: F401 (importing m1.model registers the configuration)

    ModelRegistry.register_model("M1ForCausalLM", "m1.plugins.vllm.model:M1ForCausalLM")
