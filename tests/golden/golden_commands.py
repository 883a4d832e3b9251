"""Runs each command on small inputs, through the command line alone, and reads what it printed and wrote."""

import functools
import hashlib
import json
import re

import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

# Samples decoded together: the first of these spellings that the command line has.
BATCH_OPTIONS = ("--max-num-seqs", "--max-batch")
TIMES = re.compile("second|time|version|mfu|memory", re.IGNORECASE)
BUDGET_SAMPLES = 16  # samples of a run that are compared; how many more there are is up to the clock

LONG = " ".join(f"{i}: 7+{i}*3-4 mod 10;" for i in range(80))  # some 1500 tokens: three chunks of prefill
PROMPTS = [
    {"id": "problem", "problem": "7+5*3-4 mod 10"},
    {"id": "text", "prompt": "A box"},
    {"id": "messages", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]},
    {"id": "long", "problem": LONG[:700]},
    {"id": "problem again", "problem": "7+5*3-4 mod 10"},
    {"id": "long again", "problem": LONG[:700]},
    {"id": "longer, same beginning", "problem": LONG},
    {"id": "other end", "problem": LONG[:600] + " or else?"},
    {"id": "whole chunk", "prompt": LONG[:512]},
    {"id": "turns", "messages": [{"role": r, "content": "2"} for r in ("user", "assistant", "user")]},
]  # fmt: skip
CHAIN = {"task": "chain", "count": 64, "min_steps": 1, "max_steps": 2, "seed": 3}
TRAINER = {
    "max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "bf16": False,
    "gradient_checkpointing": False, "seed": 0,
    "adam_epsilon": 1e-4,  # a gradient of nothing but rounding moves no weight
}  # fmt: skip
RL = {"num_generations": 4, "per_device_train_batch_size": 16, "max_completion_length": 16, "temperature": 1.0}


def m1(*arguments):
    """What the command prints."""
    from m1.cli import app

    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exit_code or done.exception:
        raise RuntimeError(f"m1 {' '.join(map(str, arguments))}\n{done.output}") from done.exception
    return done.stdout


@functools.cache
def batch_option():
    text = m1("generate", "--help")
    return next(option for option in BATCH_OPTIONS if option in text)


def convert(teacher, out, *options):
    m1("convert", "--teacher", teacher, "--out", out, *(options or ("--keep-attention", "1,3")))
    return out


def weights_of(folder):
    """One hash of all tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checkpoint(folder):
    """Weights, and the JSON files beside them but the tokenizer's."""
    configs = {p.name: json.loads(p.read_text()) for p in sorted(folder.glob("*config.json")) if "token" not in p.name}
    return {"weights": weights_of(folder), **configs}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steady(value):
    """Without what a clock or an installation says."""
    if isinstance(value, dict):
        kept = {key: v for key, v in value.items() if isinstance(v, dict | list) or not TIMES.search(str(key))}
        return {key: steady(v) for key, v in kept.items() if key != "machine"}
    return [steady(v) for v in value] if isinstance(value, list) else value


def generate(model, out, options, batch, count=None):
    prompts = out.with_suffix(".prompts")
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS[:count]))
    m1("generate", "--model", model, "--prompts", prompts, "--out", out, *options.split(), batch_option(), batch)
    return {
        f"{row.pop('id')}/{row.pop('sample')}": row for row in sorted(rows(out), key=lambda r: (r["id"], r["sample"]))
    }


def resumed(model, out, options, batch):
    """A run that was interrupted when all samples of the first four prompts were written, and one of the fifth."""
    generate(model, out, options, batch)
    done = {prompt["id"] for prompt in PROMPTS[:5]}
    lines = [row for row in rows(out) if row["id"] in done and (row["id"] != PROMPTS[4]["id"] or row["sample"] == 0)]
    out.write_text("".join(json.dumps(row) + "\n" for row in lines) + '{"id": "torn')
    return generate(model, out, options, batch)


def solve(model, out, options):
    as_it_is = ("--prompt-template", "{problem}") if "--prompt-template" in m1("solve", "--help") else ()
    problem = ("7+5*3-4 mod 10", *as_it_is)
    m1("solve", *problem, "--model", model, "--json", out, *options.split(), batch_option(), 8)
    answer = json.loads(out.read_text())
    kept = ("answer", "reason", "tokens", "finished", "aborted", "tally", "abstained", "samples", "grading")
    return steady({key: answer[key] for key in kept})


def evaluate(model, out, *options):
    sizes = ("--task", "chain", "--limit", 6, "--n", 4, "--max-new-tokens", 32, "--temperature", 1.0)
    m1("eval", "--model", model, "--out", out, *sizes, batch_option(), 5, *options)
    samples = {f"{row['problem']}/{row['round']}": steady(row) for row in rows(out / "samples.jsonl")}
    result = json.loads((out / "result.json").read_text())
    del result["settings"], result["model"], result["versions"]  # what was asked for, and of what
    return {"samples": dict(sorted(samples.items())), "result": steady(result)}


def budget(models, out):
    sizes = ("--seconds", 2.5, "--limit", 2, "--seeds", 1, "--max-new-tokens", 32, batch_option(), 4, "--out", out)
    m1("budget", *(part for name, folder in models.items() for part in ("--model", f"{name}={folder}")), *sizes)
    runs = {f"{row['model']}/{row['problem']}/{row['seed']}": row["samples"] for row in rows(out / "runs.jsonl")}
    if short := [name for name, samples in runs.items() if len(samples) < BUDGET_SAMPLES]:
        raise RuntimeError(f"{short[0]} has fewer than {BUDGET_SAMPLES} samples: record on an idle machine")
    return {name: [sample[1:] for sample in samples[:BUDGET_SAMPLES]] for name, samples in runs.items()}


def write_recipe(path, stage, **keys):
    """Tables come last in a TOML file."""
    tables = {key: value for key, value in keys.items() if isinstance(value, dict)}
    lines = [f'stage = "{stage}"'] if stage else []
    lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items() if key not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def train(stage, out, **keys):
    keys = {"data": CHAIN, "trainer": TRAINER} | keys
    m1(stage, write_recipe(out.with_suffix(".toml"), stage, out=str(out), **keys))
    return {"metrics": steady(rows(out / "metrics.jsonl")), "weights": weights_of(out)}


def training(stages, name, model, teacher, folder, **trainer):
    """Each stage by itself, from the same model. `trainer` changes its arguments."""
    batch = {batch_option().strip("-").replace("-", "_"): 6}
    options = {
        "sft": {},
        "sft packed": {"trainer": {"packing": True, "max_length": 128}},
        "distill": {"teacher": str(teacher), "forward_kl_steps": 2},
        "distill jsd": {"teacher": str(teacher), "divergence": "jsd"},
        "grpo": {"trainer": RL, **batch},
    }
    made = {}
    for stage in stages:
        keys = options[stage] | {"trainer": TRAINER | options[stage].get("trainer", {}) | trainer}
        made[stage] = train(stage.split()[0], folder / f"{stage} {name}", model=str(model), **keys)
    return made


def pipeline(folder):
    """A new transformer, its hybrid and what becomes of it, in two steps each."""
    folder.mkdir()
    runs, two = folder / "runs", {"data": CHAIN, "trainer": TRAINER | {"max_steps": 2}}
    new = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
           "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.1, "tie_word_embeddings": True}  # fmt: skip
    out = {name: str(runs / name) for name in ("teacher", "hybrid", "distilled", "eval")}
    stages = {
        "teacher": ("sft", {"init": new, **two}),
        "hybrid": ("convert", {"teacher": out["teacher"], "keep_attention": [1]}),
        "distilled": ("distill", {"model": out["hybrid"], "teacher": out["teacher"], **two}),
        "eval": ("eval", {"models": {n: out[n] for n in list(out)[:3]}, "limit": 4, "n": 2, "max_new_tokens": 8}),
    }
    write_recipe(folder / "pipeline.toml", "", name="golden", out=str(runs), stages=list(stages))
    for name, (stage, keys) in stages.items():
        write_recipe(folder / f"{name}.toml", stage, out=out[name], **keys)
    m1("pipeline", folder)
    made = {name: weights_of(runs / name) for name in list(out)[:3]}
    metrics = {name: steady(rows(runs / name / "metrics.jsonl")) for name in ("teacher", "distilled")}
    return {"report": steady(json.loads((runs / "report.json").read_text())), "weights": made, "metrics": metrics}


def official(model, name, folder):
    released, back = folder / f"released {name}", folder / f"imported {name}"
    m1("export-official", model, released)
    m1("import-official", released, back)
    file = hashlib.sha256((released / "model.safetensors").read_bytes()).hexdigest()
    return {"exported": checkpoint(released), "file": file, "imported": checkpoint(back)}
