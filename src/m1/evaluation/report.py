"""report.html and report.json of a pipeline: one self-contained page, no network, no scripts."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from m1.evaluation.budget_curve import draw
from m1.jsonl import read_jsonl, write_json

PAGE = Path(__file__).with_name("report.html")


def write_report(
    out: str | Path,
    title: str,
    seconds: float,
    results: dict[str, dict[str, Any]],
    training: dict[str, Path],
    budgets: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Writes OUT/report.json and OUT/report.html and returns the former's content.

    Args:
        seconds: the pipeline's, all stages.
        results: model name -> what `evaluate` returned, in the stages' order.
        training: stage name -> its metrics.jsonl.
        budgets: what `measure_budgets` returned.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    report = {"seconds": round(seconds, 1), "models": {name: _summary(result) for name, result in results.items()}}
    figures = [
        ("Learning curves", _learning_curves(training)),
        ("Accuracy against votes", _vote_curve(results)),
        ("Accuracy against seconds, all problems together", _seconds_curve(results)),
        *(("Accuracy against seconds a problem", draw(budget)) for budget in budgets),
    ]
    page = PAGE.read_text(encoding="utf-8")
    body = "".join(f"<section><h2>{name}</h2>{_image(figure, name)}</section>" for name, figure in figures)
    page = page.replace("{{title}}", html.escape(title)).replace("{{seconds}}", f"{seconds / 60:.1f}")
    page = page.replace("{{table}}", _table(results)).replace("{{figures}}", body)
    (out / "report.html").write_text(page, encoding="utf-8")
    write_json(out / "report.json", report)
    return report


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    n = result["settings"]["n"]
    return {
        "pass@1": result["pass@1"],
        "pass@1_ci95": result["pass@1_ci95"],
        f"maj@{n}": result["maj@k"][str(n)]["value"],
        f"maj@{n}_ci95": result["maj@k"][str(n)]["ci95"],
        "n_problems": result["n_problems"],
        "tokens_per_second": round(result["tokens_per_second"], 1),
        "parameters": result["parameters"],
        "cache_bytes_per_sequence_at_4k": result["cache_bytes_per_sequence_at_4k"],
    }


def _table(results: dict[str, dict[str, Any]]) -> str:
    n = next(iter(results.values()))["settings"]["n"]
    head = ("model", "pass@1", f"maj@{n}", "truncated", "tokens/s", "parameters", "cache at 4k tokens")
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for name, r in results.items():
        majority = r["maj@k"][str(n)]
        cells = (
            html.escape(name),
            f"{100 * r['pass@1']:.1f} ± {100 * r['pass@1_ci95']:.1f} %",
            f"{100 * majority['value']:.1f} ± {100 * majority['ci95']:.1f} %",
            f"{100 * r['truncated']:.1f} %",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['parameters']:,}",
            f"{r['cache_bytes_per_sequence_at_4k'] / 1024:,.0f} KiB",
        )
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"


def _learning_curves(training: dict[str, Path]) -> Figure:
    """Loss of each stage against its steps; RL shows its reward."""
    count = max(1, len(training))
    figure, axes = plt.subplots(1, count, figsize=(3.2 * count, 2.8), squeeze=False, layout="constrained")
    for axis, (name, path) in zip(axes[0], training.items(), strict=True):
        rows = list(read_jsonl(path)) if path.exists() else []
        key = "reward" if any("reward" in row for row in rows) else "loss"
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axis.plot(*zip(*points, strict=True))
        axis.set(title=f"{name}: {key}", xlabel="step")
        if key == "loss" and points and min(y for _, y in points) > 0:
            axis.set_yscale("log")
    return figure


def _vote_curve(results: dict[str, dict[str, Any]]) -> Figure:
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, result in results.items():
        points = [(int(k), m["value"]) for k, m in result["maj@k"].items()]
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set(xscale="log", xlabel="votes a problem", ylabel="accuracy", ylim=(-0.02, 1.02))
    axis.set_xticks(ticks := [k for k, _ in points], labels=[str(k) for k in ticks])
    axis.minorticks_off()
    axis.legend()
    return figure


def _seconds_curve(results: dict[str, dict[str, Any]]) -> Figure:
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, result in results.items():
        curve = result["accuracy_against_seconds"]
        x, y = [p["seconds"] for p in curve], [p["accuracy"] for p in curve]
        axis.plot(x, y, marker=".", label=name)
        axis.fill_between(
            x, [p["accuracy"] - p["ci95"] for p in curve], [p["accuracy"] + p["ci95"] for p in curve], alpha=0.12
        )
    axis.set(xlabel="measured seconds of generation, all problems", ylabel="accuracy of the vote", ylim=(-0.02, 1.02))
    axis.legend()
    return figure


def _image(figure: Figure, name: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div class="scroll"><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></div>'
