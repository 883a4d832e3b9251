"""m1 inspect: its numbers are those of the loaded model and of the caches it fills."""

import pytest
import torch
from checkpoints import FAMILIES, save_checkpoint, tiny_teacher
from rich.console import Console
from transformers import DynamicCache

from m1.cli import render
from m1.errors import UserError
from m1.model.summary import plot_summary, summarize


@torch.no_grad()
def test_numbers_are_the_models(hybrid, tokens, tmp_path):
    hybrid.save_pretrained(tmp_path)
    context = tokens.shape[1]
    summary = summarize(tmp_path, context)
    assert summary.parameters == sum(p.numel() for p in hybrid.parameters())
    assert [layer.kind for layer in summary.layers] == [hybrid.config.mixer, "attention"] * 2
    cache = DynamicCache(config=hybrid.config)
    hybrid(tokens[:1], past_key_values=cache)
    for layer, module, held in zip(summary.layers, hybrid.model.layers, cache.layers, strict=True):
        mixer = module.self_attn if layer.kind == "attention" else module.mamba
        assert layer.mixer_parameters == sum(p.numel() for p in mixer.parameters())
        assert layer.mixer_parameters + layer.mlp_parameters == sum(p.numel() for p in module.parameters())
        tensors = (
            [held.keys, held.values] if layer.kind == "attention" else [held.conv_states[0], held.recurrent_states[0]]
        )
        assert layer.cache_bytes == sum(t.nbytes for t in tensors)
    assert summary.cache_bytes(context) == sum(layer.cache_bytes for layer in summary.layers)
    smaller_from = next(n for n in range(1, 10_000) if summary.cache_bytes(n) < summary.teacher_cache_bytes(n))
    assert summary.break_even == smaller_from


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hybrids_teacher_is_the_teacher(family, tmp_path):
    from m1.model.convert import convert

    teacher = tiny_teacher(family)
    save_checkpoint(teacher, tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "out", [1])
    before, after = summarize(tmp_path / "teacher"), summarize(tmp_path / "out")
    assert before.parameters == before.teacher_parameters == after.teacher_parameters == teacher.num_parameters()
    assert before.cache_bytes(100) == before.teacher_cache_bytes(100) == after.teacher_cache_bytes(100)
    assert before.break_even is None


def test_table_and_plot(variant_dir, tmp_path, monkeypatch):
    console = Console(record=True, width=120)
    monkeypatch.setattr(render, "console", console)
    summary = summarize(variant_dir)
    render.model_summary(summary)
    text = console.export_text()
    lines = [line.split() for line in text.splitlines()]
    for i, layer in enumerate(summary.layers):
        row = next(cells for cells in lines if cells[1:2] == [str(i)])
        assert row[3] == layer.kind and row[5] == f"{layer.mixer_parameters:,}"
    assert f"{summary.parameters:,}" in text and f"smaller from {summary.break_even} tokens on" in text
    plot_summary(summary, tmp_path / "cache.png")
    assert (tmp_path / "cache.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="can't write the plot"):
        plot_summary(summary, tmp_path / "cache.nonsense")


def test_no_length_that_the_model_does_not_have(variant_dir, tmp_path):
    """Its context is 512 tokens."""
    summary = summarize(variant_dir)
    assert summary.config.max_position_embeddings == summary.context == 512
    assert summary.contexts(1024, 4) == [512] and summary.contexts(128, 2) == [128, 256, 512]
    assert summary.contexts(100, 2) == [100, 200, 400, 512]
    for context in (0, 513):
        with pytest.raises(UserError, match=f"a context of {context} tokens: expected 1 to 512, the model's context"):
            summarize(variant_dir, context)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1024, "1.0 KiB"), ((1 << 20) - 1, "1.0 MiB"), (5 << 40, "5,120.0 GiB")],
)
def test_human_bytes(size, text):
    assert render.human_bytes(size) == text
