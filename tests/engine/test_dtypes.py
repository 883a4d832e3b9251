"""The engine runs checkpoints of every family and mixer in float32, bfloat16 and float16, and refuses other weights."""

import pytest
import torch
from checkpoints import FAMILIES, save_checkpoint, scramble, tiny_teacher

from m1.engine import Engine, SamplingParams
from m1.engine.plan import Chunk, Placed, Plan
from m1.errors import UserError
from m1.model.checkpoint import load_model
from m1.model.convert import convert

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PROMPTS = [[5, 6, 7], [8] * 11, list(range(1, 30))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a family's teacher (mixer None) or of its hybrid, saved in float32."""
    folders = {}

    def get(family, mixer):
        if (family, mixer) not in folders:
            out = folders[family, mixer] = tmp_path_factory.mktemp(f"{family}-{mixer}")
            if mixer is None:
                save_checkpoint(tiny_teacher(family), out)
            else:
                save_checkpoint(scramble(convert(get(family, None), out / "plain", [1, 3], mixer=mixer)), out)
        return folders[family, mixer]

    return get


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixer", [None, "mamba", "mamba2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logprobs_are_the_full_forwards(checkpoint, family, mixer, dtype):
    model, _ = load_model(checkpoint(family, mixer), dtype=dtype)
    assert model.dtype == dtype
    params = SamplingParams(max_tokens=12, temperature=0)
    gaps, errors = [], []
    for sequence, prompt in zip(Engine(model, [], max_model_len=64).generate(PROMPTS, params), PROMPTS, strict=True):
        tokens = torch.tensor(sequence.token_ids)
        logits = model(torch.tensor([[*prompt, *tokens]], device=model.device)).logits[0, len(prompt) - 1 : -1].cpu()
        logprobs = logits.float().log_softmax(-1)
        own = logprobs.gather(1, tokens[:, None])[:, 0]
        errors.append((torch.tensor(sequence.logprobs) - own).abs())
        gaps.append(logprobs.amax(-1) - own)  # 0 where the token is the forward's own
    # float32: rounding in the order of sums; else a few roundings of the hidden states, which halves share
    limit = 1e-5 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps
    assert torch.cat(errors).mean() < limit and torch.cat(gaps).mean() < limit


def test_a_low_dtype_is_near_float32(checkpoint):
    """The halves' own forwards could be as wrong as the engine."""
    prompt = PROMPTS[2]
    for mixer in (None, "mamba", "mamba2"):
        logprobs = {}
        for dtype in DTYPES:
            model, _ = load_model(checkpoint("llama", mixer), dtype=dtype)
            executor = Engine(model, [], max_model_len=64).executor
            with torch.inference_mode():
                executor.execute(Plan(place=[Placed(0, 0, 0)], prefill=[Chunk(0, 0, prompt, len(prompt), None)]))
                logits = executor.logits[0][0][0]
            logprobs[dtype] = logits.float().log_softmax(-1)
        for dtype in DTYPES[1:]:
            error = (logprobs[dtype] - logprobs[torch.float32]).abs().mean()
            assert error < 10 * torch.finfo(dtype).eps, (mixer, dtype, error)


def test_other_weights_are_refused(checkpoint):
    model, _ = load_model(checkpoint("llama", None), dtype=torch.float64)
    with pytest.raises(UserError, match=r"plain float32, bfloat16 or float16 weights, not torch.float64"):
        Engine(model)


def test_adapters_are_refused(hybrid):
    """A layer that computes more than its `weight` says would be packed without the rest."""

    class Adapted(torch.nn.Linear):
        pass

    mlp = hybrid.model.layers[0].mlp
    mlp.up_proj = Adapted(64, 96, bias=False)
    with pytest.raises(UserError, match="weights, not Adapted: merge adapters"):
        Engine(hybrid)
