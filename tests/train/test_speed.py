"""Compiled layers: one graph per kind of layer and shape, no breaks, and the eager path's losses and gradients."""

import pytest
import torch
from checkpoints import scramble
from tolerance import assert_rms_close
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from m1.model import M1ForCausalLM
from m1.model.convert import convert
from m1.model.packed_attention import PACKED, attend_without_mask
from m1.train.speed import compile_layers, speed_up

LENGTHS = (37, 90, 130)  # of Mamba-2 more than a chunk, too
LONG = [pytest.param(kind, marks=pytest.mark.long) for kind in ("mamba2", "llama")]


@pytest.fixture(scope="module", params=["mamba", *LONG])
def checkpoint(request, teacher_dir, tmp_path_factory):
    if request.param == "llama":
        return teacher_dir
    out = tmp_path_factory.mktemp("hybrid")
    convert(teacher_dir, out, [1, 3], mixer=request.param)
    return out


def load(checkpoint, checkpointing=False):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).train()
    if isinstance(model, M1ForCausalLM):
        scramble(model)
    attend_without_mask(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def batch(T, kind):
    g = torch.Generator().manual_seed(T)
    if kind == "padded":
        mask = (torch.arange(T) < torch.tensor([[T], [T - 7]])).long()
        tokens = torch.randint(0, 256, (2, T), generator=g)
        return {"input_ids": tokens, "labels": tokens.masked_fill(mask == 0, -100), "attention_mask": mask}
    edges = torch.tensor([0, 3, T // 2, T], dtype=torch.int32)  # as TRL's collator makes them
    tokens, seq_idx = torch.randint(0, 256, (1, T), generator=g), torch.repeat_interleave(torch.arange(3), edges.diff())
    packed = {"position_ids": (torch.arange(T) - edges[seq_idx])[None], "seq_idx": seq_idx.int()[None]}
    packed |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges} | dict.fromkeys(
        ("max_length_q", "max_length_k"), T - T // 2
    )
    return {"input_ids": tokens, "labels": tokens} | packed


def step(model, inputs, dtype=torch.float32):
    """The loss and all gradients."""
    if not isinstance(model, M1ForCausalLM):
        inputs = {name: value for name, value in inputs.items() if name != "seq_idx"}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        ("packed", False),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("padded", True), ("packed", True), ("padded", False))
        ),
    ],
)
def test_compiled_steps_equal_eager_ones(checkpoint, kind, checkpointing):
    """fullgraph=True raises at a graph break. Lengths differ, so the second one makes the graphs' sizes dynamic."""
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = (load(checkpoint, checkpointing) for _ in range(2))
    compile_layers(compiled, backend="aot_eager", fullgraph=True)
    for T in LENGTHS:
        inputs = batch(T, kind)
        assert_rms_close(step(compiled, inputs), step(eager, inputs), 1e-5)
    kinds = 2 if isinstance(eager, M1ForCausalLM) else 1
    assert counters["stats"]["unique_graphs"] <= 2 * kinds + 1  # one more where Mamba-2 has several chunks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiling to machine code takes minutes on a CPU")
@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_to_machine_code(checkpoint, kind, dtype):
    torch._dynamo.reset()
    eager, compiled = (load(checkpoint) for _ in range(2))
    compile_layers(compiled)
    inputs = batch(37, kind)
    assert_rms_close(
        step(compiled, inputs, dtype), step(eager, inputs, dtype), 1e-5 if dtype == torch.float32 else 5e-3
    )


def test_ddp_leaves_graphs_whole(hybrid_dir):
    """torch.compile would cut them where DDP's buckets of gradients end: here, after each parameter."""
    torch._dynamo.reset()
    graphs = []
    model = load(hybrid_dir)
    compile_layers(model, backend=lambda graph, inputs: graphs.append(graph) or graph)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        DistributedDataParallel(model, bucket_cap_mb=1e-3)(**batch(37, "packed"), use_cache=False)
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == 2  # one per kind of layer


def test_compiles_by_itself_on_a_gpu_only(hybrid):
    speed_up(hybrid, "auto")
    speed_up(hybrid, False)
    assert not any(layer._compiled_call_impl for layer in hybrid.model.layers)
    speed_up(hybrid, True)
    assert all(layer._compiled_call_impl for layer in hybrid.model.layers)
    assert hybrid.config._attn_implementation == PACKED
