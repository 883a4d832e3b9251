"""Runs vLLM on jobs, under the Python of an environment that has it; the tests compare what it answers.

    python vllm_run.py JOBS.json ANSWERS.json

JOBS is a list of {"model": folder, "prompts": [[token, ...], ...], "settings": arguments of vLLM's `LLM`, "adapter":
folder or null, "renewed": folder of other weights or null}. Each answer has greedy tokens and their log-probabilities:
of "all" prompts together, of all "again" in reverse after requests were aborted, with the adapter ("adapted"), and with
the other weights ("renewed"), and how many "groups" of layers there are; or why vLLM has "refused" to start.
"""

import gc
import json
import sys
import time
from pathlib import Path

NEW = 64


def greedy(llm, prompts, adapter=None):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=NEW, logprobs=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False, lora_request=adapter)
    return [answer(output.outputs[0]) | {"cached": output.num_cached_tokens} for output in outputs]


def answer(sample):
    tokens = list(sample.token_ids)
    logprobs = [row[token].logprob for row, token in zip(sample.logprobs, tokens, strict=True)]
    return {"token_ids": tokens, "logprobs": logprobs}


def abort_some(llm, prompts):
    """Decodes all prompts for a few steps, and aborts them while some are still waiting."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    for i, prompt in enumerate(prompts):
        engine.add_request(
            f"aborted-{i}", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=NEW, ignore_eos=True)
        )
    for _ in range(5):
        engine.step()
    engine.abort_request([f"aborted-{i}" for i in range(len(prompts))])
    while engine.has_unfinished_requests():
        engine.step()


def use_weights_as_they_are():
    """Without packing copies of them, which vLLM doesn't renew on a CPU."""
    from torch.nn.functional import linear
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(layer, "cpu_linear", linear)


def renew(llm, folder, count=5):
    """Does what a server does that takes weights from a trainer, some at a time."""
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import layerwise

    engine, weights = llm.llm_engine, list(load_file(Path(folder, "model.safetensors")).items())
    model = engine.model_executor.driver_worker.model_runner.model
    with set_current_vllm_config(engine.vllm_config):
        layerwise.initialize_layerwise_reload(model)
        for i in range(0, len(weights), count):
            model.load_weights(weights[i : i + count])
        layerwise.finalize_layerwise_reload(model, engine.model_config)
    llm.reset_prefix_cache()


def groups(llm):
    """How many groups of layers the scheduler manages; None if it runs in another process."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    return core and len(core.scheduler.kv_cache_config.kv_cache_groups)


def run(job):
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    began = time.perf_counter()
    if job["renewed"]:
        use_weights_as_they_are()
    try:
        llm = LLM(job["model"], dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **job["settings"])
    except ValueError as error:
        return {"refused": str(error)}
    started = time.perf_counter() - began
    answers = {"all": greedy(llm, job["prompts"]), "groups": groups(llm)}
    abort_some(llm, job["prompts"])
    answers["again"] = greedy(llm, job["prompts"][::-1])[::-1]
    if job["adapter"]:
        answers["adapted"] = greedy(llm, job["prompts"], LoRARequest("adapter", 1, job["adapter"]))
    if job["renewed"]:
        renew(llm, job["renewed"])
        answers["renewed"] = greedy(llm, job["prompts"])
    print(f"{job['model']}: started in {started:.1f} s, all in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    del llm
    gc.collect()
    return answers


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps([run(job) for job in json.loads(Path(sys.argv[1]).read_text())]))
