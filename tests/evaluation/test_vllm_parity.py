"""The comparison of `m1 check-vllm`, with this project's engine in vLLM's place."""

import pytest
import torch
from checkpoints import LLAMA3_ROPE, tiny_teacher

from m1.engine import Engine, SamplingParams
from m1.errors import UserError
from m1.evaluation.vllm_parity import check_vllm, compare

PROMPT, TOLERANCE = list(range(100)), 1e-3


def test_what_differs_is_seen():
    """Another model's samples, and a log-probability that is off by more than the tolerance."""
    model, other = tiny_teacher(), tiny_teacher(rope_parameters=LLAMA3_ROPE)
    params = SamplingParams(max_tokens=8, temperature=0)
    (sample,) = Engine(other, [], 1, max_model_len=300).generate([PROMPT], params)
    answer = {"token_ids": sample.token_ids, "logprobs": sample.logprobs}
    off = {**answer, "logprobs": [sample.logprobs[0] - 0.01, *sample.logprobs[1:]]}
    (same,) = compare(other, [PROMPT], [answer])
    (differs,) = compare(model, [PROMPT], [answer])
    (wrong,) = compare(other, [PROMPT], [off])
    assert same.agrees(TOLERANCE) and same.equal == same.tokens == 8
    assert not differs.agrees(TOLERANCE) and differs.equal < 8 and differs.missed > TOLERANCE
    assert not wrong.agrees(TOLERANCE) and wrong.difference == pytest.approx(0.01, abs=1e-4) and wrong.equal == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "--dtype int8: choose float32"),
        pytest.param({"tensor_parallel_size": 2}, "on GPUs only", marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="there are GPUs"
        )),
        ({"vllm_python": "/nowhere"}, "--vllm-python /nowhere: no such file"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(hybrid_dir, options, message):
    with pytest.raises(UserError, match=message):
        check_vllm(str(hybrid_dir), **options)
