"""Writes the tables of README.md, docs/ and recipes/, and results/gpu-decode.png, from the files in results/.

`--check` only compares the tables.

python benchmarks/tables.py [--check]
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from m1.bench.decode import plot_result
from m1.evaluation.curves import POINTS
from m1.evaluation.intervals import percent

ROOT = Path(__file__).parents[1]


def result(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def processor(machine: dict) -> str:
    return f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"


def pocket() -> str:
    """`make demo`'s runs/pocket/report.json."""
    report = result("pocket")
    rows = []
    for name, m in report["models"].items():
        accuracy = [percent(m[key], m[key + "_ci95"]) for key in ("pass@1", "maj@32")]
        cache = f"{m['cache_bytes_per_sequence_at_4k'] / 1024:,.0f} KiB"
        rows.append([name, *accuracy, f"{m['tokens_per_second']:,.0f}", f"{m['parameters']:,}", cache])
    count = next(iter(report["models"].values()))["n_problems"]
    columns = ["model", "pass@1", "maj@32", "tokens/s", "parameters", "cache at 4k tokens"]
    return markdown(columns, rows) + (
        f"\n{count} held-out problems, 32 samples each at temperature 1, 95 % intervals over problems; "
        f"all stages took {report['seconds'] / 60:.1f} minutes on {processor(report['machine'])}.\n"
    )


def pocket_budget() -> str:
    """`make demo`'s runs/pocket/budget/budget.json."""
    bench = result("pocket-budget")
    rows = []
    for name, m in bench["models"].items():
        wait = m["seconds_to_samples"]["16"]
        row = [name, f"{100 * m['sample_accuracy']:.0f} %", f"{m['points'][-1]['samples']:.0f}", f"{wait:.2f} s"]
        row.append(f"{100 * m['points'][-1]['accuracy']:.0f} %")
        if lead := bench["leads"].get(name):
            differences = [point["value"] for point in lead["points"]]
            ahead, behind = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
            row += [lead_in_points(lead["value"], lead["ci95"]), f"{ahead}, {behind}"]
        rows.append(row + [""] * (7 - len(row)))
    settings = bench["settings"]
    columns = ["model", "one sample right", "samples in the vote", "16 samples after", "vote right", "lead, points"]
    return markdown([*columns, "budgets ahead, behind"], rows) + (
        f"\n{processor(bench['machine'])}; {bench['problems']} problems, {settings['seconds']:g} s each, up to "
        f"{settings['max_num_seqs']} samples decoded together. Lead: how much more often the vote is right than the "
        f"first model's, mean over {POINTS} budgets from a 64th of the longest up to it, with its 95 % interval over "
        "problems.\n"
    )


def smollm2_cpu() -> str:
    """`benchmarks/smollm2.py` on the recipe for two cores."""
    bench = result("smollm2-cpu")
    rows = []
    for text, numbers in bench["divergence"]["distilled"].items():
        more = f"{100 * (numbers['ratio'] - 1):+.0f} %"
        same = f"{100 * numbers['same']:.0f} %"
        rows.append(
            [text, f"{numbers['kl']:.2f}", f"{numbers['perplexity']:.2f}", more, same, f"{numbers['tokens']:,}"]
        )
    columns = ["text", "KL", "perplexity", "than the teacher's", "same likeliest token", "tokens"]
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in bench["seconds"].items())
    return markdown(columns, rows) + f"\n{processor(bench['machine'])}. Stages: {took}.\n"


def kernels() -> str:
    """`m1 bench scan|state|attention` on a CPU and on a GPU."""
    rows, machines = [], []
    for device in ("cpu", "cuda"):
        for benchmark in ("scan", "state", "attention"):
            bench = result(f"bench-{benchmark}-{device}")
            for row in bench["rows"]:
                what = " ".join(filter(None, [device, benchmark, row.get("pass"), "—", row["name"]]))
                per_token = f"{row['microseconds_per_token']:,.3g} µs"
                rows.append([what, per_token, f"{100 * row['share_of_copy']:.1f} %", f"{row['ratio_to_ours']:,.3g}"])
        machine, limits = bench["machine"], bench["limits"]
        name = machine.get("gpu") or processor(machine)
        machines.append(f"{device}: {name}, copies {limits['copy_bytes_per_second'] / 1e9:,.0f} GB/s")
    columns = ["kernel", "a token and layer", "of the copy bandwidth", "time / ours"]
    return markdown(columns, rows) + "\n" + "; ".join(machines) + ".\n"


def decode() -> str:
    """`m1 bench decode` on a CPU."""
    bench = result("bench-decode-cpu")
    rows = []
    for row in bench["rows"]:
        floor = f"{100 * row['share_of_floor']:.0f} %" if "share_of_floor" in row else ""
        times = f"{row['times_vllm']:.2f}" if "times_vllm" in row else ""
        cell = f"{row['batch']} x {row['new_tokens']:,}"
        rows.append([cell, row["name"], f"{row['tokens_per_second']:,.0f}", times, floor, f"{row['seconds']:.1f} s"])
    limits, options = bench["limits"], bench["options"]
    conditions = [
        f"{processor(bench['machine'])}, {options['dtype']}, shape {options['shape']}",
        f"prompts of {options['prompt']} tokens, runs a row: {bench['rows'][0]['runs']}",
        f"copies {limits['copy_bytes_per_second'] / 1e9:.1f} GB/s",
        f"matrix products {limits['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s",
    ]
    columns = ["batch x new tokens", "engine", "tokens/s", "times vLLM", "of floor", "time"]
    return markdown(columns, rows) + "\n" + "; ".join(conditions) + ".\n"


def chat() -> str:
    """`m1 bench chat`."""
    return chat_table(result("bench-chat-cpu"))


def chat_table(bench: dict) -> str:
    rows = []
    for row in bench["rows"]:
        times = [f"{row[key]:.2f}" if key in row else "" for key in ("times_vllm", "times_llama_cpp")]
        prefill = f"{row['prefill_tokens_per_second']:,.0f}"
        facts = [f"{row['first_token_seconds']:.2f} s", f"{row['peak_memory_bytes'] / 2**30:.2f} GiB"]
        rows.append([row["name"], str(row["chats"]), f"{row['tokens_per_second']:,.0f}", *times, prefill, *facts])
    limits, options = bench["limits"], bench["options"]
    peers = {name: number for row in bench["rows"] for name, number in row["versions"].items() if "cpp" in name}
    peers |= {name: number for row in bench["rows"] for name, number in row["versions"].items() if "vllm" in name}
    conditions = [
        processor(bench["machine"]),
        f"prompts of {options['prompt']} tokens, {options['new_tokens']} new ones",
        f"medians of {bench['rows'][0]['runs']} runs",
        f"copies {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s",
        f"{options['dtype']} matrix products {limits['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s",
        ", ".join(f"{name} {number}" for name, number in peers.items()),
    ]
    columns = [
        "engine",
        "chats",
        "tokens/s",
        "times vLLM",
        "times llama.cpp",
        "prompt tokens/s",
        "first token",
        "memory",
    ]
    return markdown(columns, rows) + "\n" + "; ".join(conditions) + ".\n"


def quantization() -> str:
    """`benchmarks/quantization.py`."""
    bench, rows = result("quantization"), []
    for row in bench["rows"]:
        apart = [f"{row['mean_difference']:.3f}", f"{row['largest_difference']:.1f}"]
        shares = [f"{100 * row['same_likeliest']:.1f} %", f"{row['right']} of {bench['problems']}"]
        rows.append([row["name"], f"{row['perplexity']:.2f}", *apart, *shares])
    columns = ["weights", "perplexity", "mean difference", "largest", "same likeliest token", "right, greedily"]
    what = f"{bench['tokens']:,} tokens of {bench['data']}; {processor(bench['machine'])}"
    return markdown(columns, rows) + f"\n{what}; differences are of log-probabilities, from float32's.\n"


def serve() -> str:
    """`benchmarks/serve_load.py`."""
    bench, rows = result("serve"), []
    for name, runs in bench["servers"].items():
        rate = statistics.median(run["tokens_per_second"] for run in runs)
        latencies = [
            f"{statistics.median(run[key][p] for run in runs):.2g} s"
            for key in ("seconds_to_first_token", "seconds_between_tokens")
            for p in ("p50", "p99")
        ]
        rows.append([name, f"{rate:,.0f}", *latencies, str(len(runs))])
    columns = ["server", "tokens/s", "first token, p50", "p99", "between tokens, p50", "p99", "runs"]
    return markdown(columns, rows) + f"\n{processor(bench['machine'])}; medians over runs.\n"


def decode_step() -> str:
    """`benchmarks/decode_step.py`."""
    bench = result("decode-step")
    rows = [[r["name"], f"{1000 * r['seconds']:.2f} ms", f"{1000 * r['floor_seconds']:.2f} ms"] for r in bench["rows"]]
    rates = f"copies {bench['copy_bytes_per_second'] / 1e9:.1f} GB/s, "
    rates += f"products {bench['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s"
    what = f"{bench['batch']} rows at {bench['context']:,} tokens"
    return markdown([what, "takes", "at least"], rows) + f"\n{processor(bench['machine'])}, float32, {rates}.\n"


def grading() -> str:
    """`benchmarks/grading.py`."""
    names = {
        "graded_outputs": "graded_outputs (Qwen2.5-Math's, short)",
        "reasoning_samples": "reasoning_samples (R1, its distillations, QwQ)",
        "grading_cases": "grading_cases (math-verify's own tests)",
        "gsm8k_solutions": "GSM8K solutions (OpenAI's 6B and 175B models)",
    }
    rows = []
    for kind in ("tuned", "unseen"):
        for name, measured in result("grading")[kind]["files"].items():
            rates = [f"{measured[key]:.3f}" for key in ("precision", "recall")]
            counts = [f"{measured[key]:,}" for key in ("rows", "agreed", "audit_agreed")]
            rows.append([names[name], kind, *counts[:2], *rates, counts[2]])
    head = ["labelled answers", "rules are", "rows", "agreement", "precision", "recall", "audit's agreement"]
    return markdown(head, rows)


def intervals() -> str:
    """`benchmarks/intervals.py`: coverage."""
    rows = []
    for row in result("intervals")["coverage"]:
        if row["rates"][0] == 0.05:
            shares = [f"{100 * row[key]:.1f} %" for key in ("worst", "mean", "worst_of_normal")]
            width = [f"{ratio:.2f}" for ratio in row["width_to_student"]] if row["width_to_student"] else ["", ""]
            rows.append([row["measure"], str(row["problems"]), *shares, *width])
    columns = ["measure", "problems", "coverage", "mean coverage", "normal approximation's", "width", "at most"]
    return markdown(columns, rows)


def differences() -> str:
    """`benchmarks/intervals.py`: false alarms and power."""
    rows = []
    for row in result("intervals")["differences"]:
        cells = [row[key][kind] for key in ("worst_false_alarms", "mean_power") for kind in ("p", "bootstrap")]
        shares = [f"{100 * share:.1f} %" for share in (cells[0], cells[1], row["worst_coverage"], *cells[2:])]
        rows.append([row["measure"], str(row["problems"]), *shares])
    columns = [
        "measure",
        "problems",
        "false alarms",
        "bootstrap's alarms",
        "interval's coverage",
        "power",
        "bootstrap's power",
    ]
    return markdown(columns, rows)


def long_chains() -> str:
    """`benchmarks/long_chains.py measure`."""
    bench = result("long-chains")
    both = ("transformer", "hybrid")
    rows = []
    for steps, measured in bench["lengths"].items():
        transformer, hybrid = (measured["models"][name] for name in both)
        right = [f"{100 * m['sample_accuracy']:.0f} %" for m in (transformer, hybrid)]
        ended = [f"{m['points'][-1]['samples']:.0f}" for m in (transformer, hybrid)]
        lead = measured["leads"]["hybrid"]
        row = [f"{steps} ({hybrid['tokens_per_sample']:,.0f})", *right, f"{measured['seconds']:g} s", *ended]
        row += [*after_16(transformer, hybrid), lead_in_points(lead["value"], lead["ci95"])]
        rows.append([*row, ", ".join(f"{100 * value:+.1f}" for value in leads_of_seeds(transformer, hybrid))])
    columns = ["steps (tokens)", *(f"one sample right, {m}" for m in both), "budget", *(f"samples, {m}" for m in both)]
    columns += [*(f"16 samples after, {m}" for m in both), "ratio", "lead of the hybrid, points", "of each training"]
    return markdown(columns, rows) + (
        f"\n{processor(bench['machine'])}; {bench['problems']} problems, each with the models of {bench['seeds']} "
        f"trainings, up to {bench['max_num_seqs']} samples decoded together. Lead: how much more often the hybrid's "
        "vote is right, mean over budgets from a 64th of the longest up to it, with its 95 % interval over "
        "problems for these trainings (±: by the normal approximation).\n"
    )


def after_16(slow: dict, fast: dict) -> list[str]:
    """Median seconds after which 16 samples had ended, and their ratio; empty where a budget was too short for it."""
    waits = [model["seconds_to_samples"]["16"] for model in (slow, fast)]
    return [*(f"{wait:.2f} s" if wait else "" for wait in waits), f"{waits[0] / waits[1]:.2f}" if all(waits) else ""]


def lead_in_points(value: float, ci95: float | list[float]) -> str:
    """A lead and its interval. results/long-chains.json has the half-widths of before the intervals had two ends."""
    ends = [f"{100 * end:.1f}" for end in (ci95 if isinstance(ci95, list) else [ci95])]
    return f"{100 * value:+.1f} " + (f"[{', '.join(ends)}]" if len(ends) == 2 else f"± {ends[0]}")


def leads_of_seeds(other: dict, own: dict) -> list[float]:
    pairs = [(b["of_seeds"], a["of_seeds"]) for a, b in zip(other["points"], own["points"], strict=True)]
    return [sum(own[i] - other[i] for own, other in pairs) / len(pairs) for i in range(len(pairs[0][0]))]


def long_chains_vllm() -> str:
    """`benchmarks/long_chains.py vllm`."""
    bench = result("long-chains-vllm")
    rows = []
    for steps, measured in bench["lengths"].items():
        own, vllm = (measured["models"][name] for name in ("transformer", "transformer, vLLM"))
        ended = [f"{m['points'][-1]['samples']:.0f}" for m in (vllm, own)]
        rows.append([steps, f"{measured['seconds']:g} s", *ended, *after_16(vllm, own)])
    seconds = "a client of its server's" if bench.get("served") else "of sampling alone, without a server and votes"
    both = ("vLLM", "this engine")
    columns = ["steps", "budget", *(f"samples, {m}" for m in both), *(f"16 samples after, {m}" for m in both), "ratio"]
    return markdown(columns, rows) + (
        f"\nvLLM {bench['vllm']}, {bench['problems']} problems, the transformer of the first training; means of "
        f"samples, medians of seconds. vLLM's seconds are {seconds}.\n"
    )


ENGINES = {"ours-hybrid": "hybrid", "ours-transformer": "transformer", "vllm": "transformer, vLLM"}
# Speed against the transformer of the same size, by (batch, new tokens): arXiv 2504.10449, on an H100 under vLLM 0.6.3.
PAPER = {
    (8, 4096): 1.11, (16, 4096): 1.27, (32, 4096): 1.43, (64, 4096): 1.73, (128, 4096): 2.15, (256, 4096): 2.64,
    (512, 4096): 3.01, (128, 8192): 2.47, (128, 16384): 2.56, (128, 20480): 2.64,
}  # fmt: skip


def whole_batches() -> list[dict]:
    return [result(f"gpu-decode-{most}") for most in (128, 512, 256)]


def gpu_decode() -> str:
    """`benchmarks/gpu.sh decode-128 decode-256 decode-512`: whole batches beside vLLM."""
    benches, found = whole_batches(), {}
    for row in (row for bench in benches for row in bench["rows"]):
        found.setdefault((row["batch"], row["new_tokens"]), {}).setdefault(row["name"], row)
    rows = []
    for (batch, new), engines in sorted(found.items()):
        hybrid, rates = engines["ours-hybrid"], []
        for name in ("ours-hybrid", "ours-transformer", "vllm"):
            rates.append(f"{engines[name]['tokens_per_second']:,.0f}" if name in engines else "")
        ratios = [f"{ratio:.2f}" for ratio in (hybrid["times_vllm"], PAPER[batch, new])]
        rows.append([f"{batch} x {new:,}", *rates, *ratios, f"{100 * hybrid['share_of_floor']:.0f} %"])
    columns = ["batch x new tokens", "hybrid, tokens/s", "transformer", "transformer, vLLM", "hybrid / vLLM", "paper's"]
    machine, limits = benches[0]["machine"], benches[0]["limits"]
    vllm = next(row["versions"]["vllm"] for row in benches[0]["rows"] if row["name"] == "vllm")
    return markdown([*columns, "of floor, hybrid"], rows) + (
        f"\n{machine['gpu']}, copies {limits['copy_bytes_per_second'] / 1e12:.2f} TB/s, matrix products "
        f"{limits['gemm_flops_per_second'] / 1e12:.0f} TFLOP/s, torch {machine['torch']}, vLLM {vllm}; shapes of M1-3B "
        f"and Llama-3.2-3B, random bfloat16 weights, {benches[0]['options']['prompt']}-token prompts, one run each.\n"
    )


def plot_gpu_decode() -> None:
    """Draws the rows of that table and of the next."""
    rows = [row for bench in [*whole_batches(), result("gpu-decode-long")] for row in bench["rows"]]
    rows = [row | {"name": ENGINES[row["name"]]} for row in rows]
    first = {(row["name"], row["batch"], row["new_tokens"]): row for row in reversed(rows)}
    plot_result({"rows": list(first.values())}, ROOT / "results" / "gpu-decode.png")


def short_gpu_decode() -> str:
    """The first columns of it."""
    return some_columns(gpu_decode(), range(6))


def long_gpu_decode() -> str:
    """`benchmarks/gpu.sh decode-long`: steps at five contexts beside vLLM."""
    bench = result("gpu-decode-long")
    found = {(row["batch"], row["new_tokens"], row["name"]): row for row in bench["rows"]}
    engines, rows = ("ours-hybrid", "ours-transformer", "vllm"), []
    for batch, new in dict.fromkeys(cell[:2] for cell in found):
        hybrid, transformer, vllm = (found[batch, new, name] for name in engines)
        rates = [f"{row['tokens_per_second']:,.0f}" for row in (hybrid, transformer, vllm)]
        ratios = [f"{ratio:.2f}" for ratio in (hybrid["times_vllm"], PAPER[batch, new], transformer["times_vllm"])]
        shares = [f"{100 * row['share_of_floor']:.0f} %" for row in (hybrid, transformer)]
        together = [str(row["together"]) for row in (hybrid, transformer, vllm)]
        rows.append([f"{batch} x {new:,}", *rates, *ratios, *shares, *together])
    columns = ["batch x new tokens", "hybrid, tokens/s", "transformer", "transformer, vLLM", "hybrid / vLLM", "paper's"]
    columns += ["transformer / vLLM", "of floor, hybrid", "transformer", "together, hybrid", "transformer", "vLLM"]
    return markdown(columns, rows) + f"\n{bench['machine']['gpu']}, torch {bench['machine']['torch']}.\n"


def gpu_samples() -> str:
    """`benchmarks/gpu.sh samples`: samples of one prompt beside vLLM."""
    bench, rows = result("gpu-samples"), []
    for row in bench["rows"]:
        _, prompt, samples, new = row["job"].split("x")
        times = f"{row['times_vllm']:.2f}" if "times_vllm" in row else ""
        seconds = f"{1000 * row['seconds']:.0f} ms"
        job = f"{samples} x {new} of {int(prompt):,}"
        rows.append([job, ENGINES[row["name"]], f"{row['prompt_tokens']:,}", seconds, times])
    columns = ["samples x new of prompt tokens", "engine", "prompt tokens computed", "job", "times vLLM"]
    return markdown(columns, rows) + (
        f"\n{bench['machine']['gpu']}, shape {bench['options']['shape']}, bfloat16, random weights; medians of "
        f"{bench['rows'][0]['runs']} runs. vLLM has its prefix cache.\n"
    )


def gpu_jobs() -> str:
    """`benchmarks/gpu.sh jobs lengths`."""
    rows = []
    benches = [result(name) for name in ("gpu-jobs-smollm2-135m", "gpu-jobs-m1-3b", "gpu-lengths")]
    for bench in benches:
        for row in bench["rows"]:
            *sizes, new = row["job"].split("x")
            job = " x ".join([*sizes, "a trace's" if bench["options"]["lengths"] else new])
            times = [f"{row[key]:.2f}" if key in row else "" for key in ("times_vllm", "prefill_times_vllm")]
            cells = [bench["options"]["shape"], job, ENGINES[row["name"]], f"{row['tokens_per_second']:,.0f}"]
            rows.append([*cells, f"{row['seconds']:.2f} s", times[0], f"{row['prefill_seconds']:.2f} s", times[1]])
    columns = ["shape", "prompts x tokens x samples x new", "engine", "tokens/s", "job", "times vLLM"]
    vllm = next(row["versions"]["vllm"] for row in benches[0]["rows"] if row["name"] == "vllm")
    machine, runs = benches[0]["machine"], [bench["options"]["repeats"] for bench in benches]
    return markdown([*columns, "prefill", "times vLLM"], rows) + (
        f"\n{machine['gpu']}, torch {machine['torch']}, vLLM {vllm}, bfloat16, random weights; medians of {runs[0]} "
        f"runs, and of {runs[-1]} where new tokens are a trace's.\n"
    )


def training() -> str:
    """`benchmarks/training.py` on a GPU."""
    bench, rows = result("training-cuda"), []
    found = {tuple(name.split()): row for name, row in bench["rows"].items() if "not_run" not in row}
    names = {"hybrid": "hybrid", "llama": "Llama", "trl": "Llama, TRL, packed", "trl-padded": "Llama, TRL, padded"}
    for (task, kind, shape, length), row in sorted(found.items(), key=lambda item: (item[0][2], int(item[0][3]))):
        cells = [f"{task}, {shape}, {int(length):,}", names[kind], f"{row['tokens_per_second']:,.0f}"]
        cells += [f"{100 * row['mfu']:.0f} %", f"{row['memory_gib']:.1f} GiB", f"{row['tokens_per_step']:,.0f}"]
        rows.append([*cells, "yes" if row["checkpointing"] else "no"])
    columns = [
        "task, shape, tokens of a row",
        "model",
        "tokens/s",
        "MFU",
        "memory",
        "tokens of a step",
        "checkpointing",
    ]
    return markdown(columns, rows) + (
        f"\n{bench['machine']['gpu']}, torch {bench['machine']['torch']}, matrix products "
        f"{bench['matrix_rate'] / 1e12:.0f} TFLOP/s. The file names the rows that weren't run.\n"
    )


def some_columns(table: str, chosen: Iterable[int]) -> str:
    lines = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")]
    return "".join(f"|{'|'.join(line[i] for i in chosen)}|\n" for line in lines)


TABLES: dict[str, list[Callable[[], str]]] = {
    "README.md": [short_gpu_decode],
    "recipes/pocket/README.md": [pocket, pocket_budget],
    "recipes/smollm2-cpu/README.md": [smollm2_cpu],
    "docs/engine.md": [quantization, gpu_jobs, gpu_samples, chat, decode, decode_step],
    "docs/kernels.md": [kernels],
    "docs/training.md": [training],
    "docs/evaluation.md": [intervals, differences],
    "docs/grading.md": [grading],
    "docs/serving.md": [serve],
    "docs/results.md": [gpu_decode, long_gpu_decode],
    "docs/test-time-compute.md": [long_chains, long_chains_vllm],
}


def main() -> None:
    for file, tables in TABLES.items():
        text = (ROOT / file).read_text()
        updated = text
        for table in tables:
            start, end = rf"<!-- {table.__name__} table[^\n]*-->\n", "<!-- end -->"
            found = re.search(f"({start})(.*?)({end})", updated, re.DOTALL)
            assert found, f"{file} has lost the markers of the table {table.__name__}"
            updated = updated[: found.start(2)] + table() + updated[found.end(2) :]
        if "--check" in sys.argv and updated != text:
            sys.exit(f"{file}'s tables are not those of results/: run benchmarks/tables.py")
        (ROOT / file).write_text(updated)
    if "--check" not in sys.argv:
        plot_gpu_decode()


if __name__ == "__main__":
    main()
