"""Records what every command gives on tiny models, so that two versions of the code can be compared number by number.

    python tests/golden/record.py OUT.json               # every command, every mixer
    python tests/golden/record.py --small OUT.json       # what golden.json keeps
    python tests/golden/record.py --trajectories OUT.json  # 20 steps of training: trajectories.json
    python tests/golden/record.py --compare A.json B.json

Everything goes through the command line and its files: names inside the package may change in between. Seconds, paths
and versions are left out. On one machine two recordings of the same behaviour are equal to the last bit.
"""

import json
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from golden_commands import (
    budget,
    checkpoint,
    convert,
    evaluate,
    generate,
    m1,
    official,
    pipeline,
    resumed,
    solve,
    training,
)
from safetensors.torch import load_file, save_file

MIXERS = ("mamba", "mamba2")
FAMILIES = ("llama", "qwen2", "qwen3")
# name: (options, samples decoded together)
GENERATE = {
    "sampled": ("--n 3 --max-new-tokens 48 --temperature 0.8 --seed 1", 4),
    "hot": ("--n 3 --max-new-tokens 40 --temperature 1.8 --seed 9", 7),
    "stop strings": (
        "--n 3 --max-new-tokens 48 --temperature 1.2 --top-k 100 --top-p 0.95 --stop ed --stop 7} --seed 3",
        5,
    ),
    "truncated": ("--n 3 --max-new-tokens 24 --temperature 0.8 --top-k 20 --top-p 0.9 --min-p 0.02 --seed 2", 256),
    "greedy": ("--n 1 --max-new-tokens 24 --temperature 0", 3),
    "top-k": ("--n 2 --max-new-tokens 16 --temperature 0.8 --top-k 5 --seed 4", 8),
    "top-p": ("--n 2 --max-new-tokens 16 --temperature 0.8 --top-p 0.8 --seed 5", 8),
    "min-p": ("--n 2 --max-new-tokens 16 --temperature 0.8 --min-p 0.1 --seed 6", 8),
    "one at a time": ("--n 3 --max-new-tokens 16 --temperature 0.8 --seed 7", 1),
    "int8": ("--n 2 --max-new-tokens 24 --temperature 0.8 --quantize int8 --seed 8", 8),
}
SOLVE = {
    f"{rule}, {weights}": f"--n 40 --rule {rule} --weights {weights} --max-new-tokens 32 --temperature 1.0 --seed 5"
    for rule in ("none", "decided", "confident")
    for weights in ("uniform", "logprob")
} | {"within seconds": "--n 6 --seconds 1000 --max-new-tokens 32 --seed 6"}


def talker(family, folder):
    r"""A transformer whose answers are mostly like \boxed{3} or \boxed{7}, now and then longer or without an end."""
    from checkpoints import byte_tokenizer, save_checkpoint, tiny_teacher

    model = tiny_teacher(family, max_position_embeddings=2048, tie_word_embeddings=False)
    token = byte_tokenizer().convert_tokens_to_ids
    chain = ["<|assistant|>", *r"\boxed{"]
    follows = [(a, b, 1.6) for a, b in pairwise(chain)]
    follows += [("{", str(digit), 1.5 - 0.2 * abs(digit - 5)) for digit in range(10)]
    follows += [(str(digit), "}", 1.4) for digit in range(10)] + [("}", "<|end|>", 1.3), ("}", "\\", 1.2)]
    with torch.no_grad():
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embeddings *= 40  # what the layers add doesn't drown the last token
        for before, after, strength in follows:
            head[token(after)] += strength * embeddings[token(before)] / embeddings[token(before)].norm()
    return save_checkpoint(model, folder)


def scrambled(folder):
    """The checkpoint, what conversion leaves at its initial values made random."""
    from checkpoints import scramble

    weights = load_file(folder / "model.safetensors")
    scramble(SimpleNamespace(named_parameters=lambda: sorted(weights.items())))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reward_model(folder):
    from checkpoints import save_checkpoint, tiny_teacher
    from transformers import LlamaForSequenceClassification

    config = tiny_teacher().config
    config.num_labels = 1
    torch.manual_seed(2)
    return save_checkpoint(LlamaForSequenceClassification(config), folder)


def conversions(teachers, data, folder):
    """Every mixer and option on every family; what layers cost; the released layout and back."""
    made = {}
    mixers = {
        "mamba": (), "mamba2": ("--mixer", "mamba2"), "aligned": ("--head-alignment", "attention"),
        "8 states": ("--state-size", 8, "--seed", 3),
    }  # fmt: skip
    for family, teacher in teachers.items():
        for name, options in mixers.items():
            out = convert(teacher, folder / f"convert {family} {name}", "--attention-ratio", 0.5, *options)
            made[f"convert/{family}/{name}"] = checkpoint(out)
        ranking = folder / f"{family}.json"
        for mixer in ("mamba", "mamba2"):
            ranking.unlink(missing_ok=True)
            m1("rank-layers", "--teacher", teacher, "--data", data, "--out", ranking, "--mixer", mixer)
            result = json.loads(ranking.read_text())
            made[f"rank-layers/{family}/{mixer}"] = {key: result[key] for key in ("kl", "ranking", "tokens")}
        out = convert(teacher, folder / f"convert {family} ranked", "--keep-attention", f"@{ranking}:2")
        made[f"convert/{family}/ranked"] = checkpoint(out)
        made[f"inspect/{family}"] = [m1("inspect", path).splitlines() for path in (teacher, out)]
    return made


def record(folder, small=False):
    """Everything, as JSON: {"command/model/case": ...}."""
    teachers = {family: talker(family, folder / family) for family in (("llama",) if small else FAMILIES)}
    models = {"transformer": teachers["llama"]}
    models |= {
        m: scrambled(convert(teachers["llama"], folder / m, "--keep-attention", "1,3", "--mixer", m)) for m in MIXERS
    }
    golden = {}
    for name, model in models.items():
        cases = list(GENERATE)[:3] if small else GENERATE
        for case in cases:
            golden[f"generate/{name}/{case}"] = generate(model, folder / f"{name} {case}.jsonl", *GENERATE[case])
        for case in ("decided, logprob",) if small else SOLVE:
            golden[f"solve/{name}/{case}"] = solve(model, folder / f"{name} {case}.json", SOLVE[case])
        golden[f"eval/{name}/engine"] = evaluate(model, folder / f"eval {name}")
        if name in MIXERS:
            stages = ("distill", "grpo") if small else ("sft", "sft packed", "distill", "distill jsd", "grpo")
            for stage, result in training(stages, name, model, teachers["llama"], folder).items():
                golden[f"{stage}/{name}"] = {"metrics": result["metrics"]} if small else result
    if small:
        return golden
    data = folder / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"problem": f"{i}+{i * i}", "solution": f"{i + i * i}"}) + "\n" for i in range(24))
    )
    golden |= conversions(teachers, data, folder)
    scores = reward_model(folder / "reward")
    for name, model in models.items():
        options = f"--n 12 --max-new-tokens 32 --seed 7 --weights {scores}"
        golden[f"solve/{name}/reward model"] = solve(model, folder / f"{name} reward.json", options)
        golden[f"generate/{name}/resumed"] = resumed(model, folder / f"{name} resumed.jsonl", *GENERATE["sampled"])
        for kind in ("--sampler", "transformers"), ("--quantize", "int8"), ("--period", 3, "--seed", 4):
            out = folder / f"eval {name} {kind[-1]}"
            golden[f"eval/{name}/{' '.join(map(str, kind))}"] = evaluate(model, out, *kind)
        if name in MIXERS:
            golden[f"official/{name}"] = official(model, name, folder)
            compared = m1("eval", "compare", folder / "eval transformer", folder / f"eval {name}")
            golden[f"eval compare/{name}"] = json.loads(compared.splitlines()[-1])
    for family in ("qwen2", "qwen3"):
        for mixer in MIXERS:
            path = folder / f"{family} {mixer}"
            model = scrambled(convert(teachers[family], path, "--keep-attention", "1,3", "--mixer", mixer))
            out = folder / f"{family} {mixer}.jsonl"
            golden[f"generate/{family} {mixer}/sampled"] = generate(model, out, *GENERATE["sampled"])
    golden["budget"] = budget(models, folder / "budget")
    golden["pipeline"] = pipeline(folder / "pipeline")
    return golden


def trajectories(folder):
    """20 steps of every training stage on every mixer: {"stage/mixer": [step's loss, gradient norm and reward]}."""
    teacher, made = talker("llama", folder / "llama"), {}
    for mixer in MIXERS:
        model = scrambled(convert(teacher, folder / mixer, "--keep-attention", "1,3", "--mixer", mixer))
        stages = ("sft", "sft packed", "distill", "distill jsd", "grpo")
        for stage, result in training(stages, mixer, model, teacher, folder, max_steps=20).items():
            steps = [row for row in result["metrics"] if "loss" in row]
            made[f"{stage}/{mixer}"] = [
                [row[key] for key in ("loss", "grad_norm", "reward") if key in row] for row in steps
            ]
    return made


def leaves(value, path=""):
    """(path, value) of everything that is neither a dict nor a list."""
    if isinstance(value, dict | list) and value:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{path}/{key}")
    else:
        yield path, value


def differences(a, b):
    """(path, in a, in b) of what differs; None stands for what is missing."""
    a, b = dict(leaves(a)), dict(leaves(b))
    return [(path, a.get(path), b.get(path)) for path in a | b if json.dumps(a.get(path)) != json.dumps(b.get(path))]


def main(arguments):
    sys.path.append(str(Path(__file__).parents[1]))
    match arguments:
        case ["--compare", a, b]:
            found = differences(*(json.loads(Path(path).read_text()) for path in (a, b)))
            for path, *values in found:
                print(path, *map(repr, values), sep="\n    ")
            print(f"{len(found)} differences")
            return int(bool(found))
        case ["--small" | "--trajectories" as kind, out] | [out, *kind]:
            os.environ["COLUMNS"] = "200"
            torch.set_num_threads(2)
            with tempfile.TemporaryDirectory() as folder:
                made = trajectories(Path(folder)) if kind == "--trajectories" else record(Path(folder), bool(kind))
                text = json.dumps(made, indent=1, ensure_ascii=False)
            Path(out).write_text(text.replace(folder, "FOLDER") + "\n")
            return 0
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
