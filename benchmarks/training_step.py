"""Where the time of a training step of a 100M-parameter hybrid goes: writes results/training-step.json.

    python benchmarks/training_step.py

The shape is that of `m1 bench scan` (D 768, Dx 256, 16 states) in 12 layers, every fourth one attention; two sequences
of 1024 tokens, AdamW, float32 weights, bfloat16 where the processor has it. The scan's operators hold the convolution.
"""

import platform
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from m1 import M1Config, M1ForCausalLM
from m1.jsonl import write_json

OUT = Path(__file__).parents[1] / "results/training-step.json"
SHARES = {"scan and convolution": ("m1::",), "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::")}
REPEATS = 3


def main() -> None:
    torch.manual_seed(0)
    config = M1Config(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(12)],
    )
    model = M1ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(config.vocab_size, (2, 1024))
    step(model, optimizer, tokens)  # compiles and allocates

    seconds, shares = [], []
    for _ in range(REPEATS):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            step(model, optimizer, tokens)
            seconds.append(time.perf_counter() - start)
        times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
        total = sum(times.values())
        shares.append(
            {name: sum(t for key, t in times.items() if key.startswith(keys)) / total for name, keys in SHARES.items()}
        )
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens.numel(),
        "seconds": statistics.median(seconds),
        "shares": {name: statistics.median(share[name] for share in shares) for name in SHARES},
    }
    write_json(OUT, result)
    print(result)


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
        model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main()
