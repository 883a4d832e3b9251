"""A pipeline's report: report.json, and report.html, one page that needs neither network nor scripts."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from m1.errors import UserError
from m1.evaluation.curves import draw
from m1.evaluation.intervals import percent
from m1.jsonl import read_json, read_jsonl, write_json, write_text
from m1.machine import describe_machine
from m1.ops.backend import default_device

PAGE = Path(__file__).with_name("report.html")
MARK = '<meta name="generator" content="m1 pipeline">'
LEAST_DRIFT = 1e-12  # drawn; float32 drifts less
# keys of report.json, of earlier versions and now
KEYS = ({"seconds", "models"}, {"machine", "seconds", "models"})


def write_report(
    out: str | Path,
    title: str,
    seconds: float,
    results: dict[str, dict[str, Any]],
    training: dict[str, Path],
    budgets: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Writes OUT/report.json and OUT/report.html, and returns the content of report.json.

    Args:
        out: the folder.
        title: heading of the page.
        seconds: time spent in all stages. The machine that is named is this one.
        results: what `evaluate` returned, per model, in the order in which the report lists them.
        training: each training stage's metrics.jsonl.
        budgets: what `measure_budgets` returned, one per budget stage.

    Raises:
        UserError: as `refuse_foreign_report`.
    """
    refuse_foreign_report(out)
    out = Path(out)
    report = {
        "machine": describe_machine(torch.device(default_device())),
        "seconds": round(seconds, 1),
        "models": {name: _summary(result) for name, result in results.items()},
    }
    figures = [
        *([("Learning curves", _learning_curves(training))] if training else []),
        ("Accuracy against votes", _vote_curve(results)),
        *(("Accuracy against seconds per problem", draw(budget)) for budget in budgets),
    ]
    page = PAGE.read_text(encoding="utf-8")
    body = "".join(f"<section><h2>{name}</h2>{_image(figure, name)}</section>" for name, figure in figures)
    page = page.replace("{{title}}", html.escape(title)).replace("{{seconds}}", f"{seconds / 60:.1f}")
    page = page.replace("{{table}}", _table(results)).replace("{{figures}}", body)
    write_json(out / "report.json", report)
    write_text(out / "report.html", page)
    return report


def refuse_foreign_report(out: str | Path) -> None:
    """Raises UserError if OUT has a report.json or report.html that no pipeline wrote."""
    page, data = Path(out, "report.html"), Path(out, "report.json")
    own = {page: lambda: MARK in page.read_text(errors="replace"), data: lambda: set(read_json(data)) in KEYS}
    for path, is_own in own.items():
        if path.exists() and not is_own():
            raise UserError(f"{path} exists and isn't a pipeline's report: move it, or change the recipe's `out`")


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
            percent(r["pass@1"], r["pass@1_ci95"]),
            percent(**majority),
            f"{100 * r['truncated']:.1f} %",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['parameters']:,}",
            f"{r['cache_bytes_per_sequence_at_4k'] / 1024:,.0f} KiB",
        )
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"


def _learning_curves(training: dict[str, Path]) -> Figure:
    """Draws each stage's loss against its steps, for RL the reward and the engine's drift from the trainer."""
    count = len(training)
    figure, axes = plt.subplots(1, count, figsize=(3.2 * count, 2.8), squeeze=False, layout="constrained")
    for axis, (name, path) in zip(axes[0], training.items(), strict=True):
        rows = list(read_jsonl(path)) if path.exists() else []
        key = "reward" if any("reward" in row for row in rows) else "loss"
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axis.plot(*zip(*points, strict=True))
        axis.set(title=f"{name}: {key}", xlabel="step")
        drift = [(row["step"], max(row["sampling/k3"], LEAST_DRIFT)) for row in rows if "sampling/k3" in row]
        if drift:
            other = axis.twinx()
            other.plot(*zip(*drift, strict=True), color="grey", linewidth=0.8)
            other.set(yscale="log", ylim=(LEAST_DRIFT, 1))
            other.set_ylabel("drift (k3), nats per token", color="grey")
        if key == "loss" and points and min(y for _, y in points) > 0:
            axis.set_yscale("log")
    return figure


def _vote_curve(results: dict[str, dict[str, Any]]) -> Figure:
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, result in results.items():
        points = [(int(k), m["value"]) for k, m in result["maj@k"].items()]
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set(xscale="log", xlabel="votes per problem", ylabel="accuracy", ylim=(-0.02, 1.02))
    axis.set_xticks(ticks := [k for k, _ in points], labels=[str(k) for k in ticks])
    axis.minorticks_off()
    axis.legend()
    return figure


def _image(figure: Figure, name: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div class="scroll"><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></div>'
