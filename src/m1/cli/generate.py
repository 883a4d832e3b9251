"""Commands that sample: generate (a file of prompts) and solve (one problem, by voting)."""

from pathlib import Path
from typing import Annotated, Any

import typer

from m1.cli.arguments import Force, options_of
from m1.options import build
from m1.outputs import make_room
from m1.recipe import GenerateStage

app = typer.Typer()


@app.command()
@options_of(GenerateStage)
def generate(force: Force = False, **options: Any) -> None:
    """Sample answers to the prompts of a file. Run again to resume."""
    from m1.cli import render

    stage = build(GenerateStage, options, "generate")
    tokens, seconds = stage.run(force=force, progress=render.progress_bar)
    render.generated(tokens, seconds, stage.out)


@app.command()
def solve(
    problem: Annotated[str, typer.Argument(help="The question, as a user would type it.")],
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    n: Annotated[
        int | None,
        typer.Option(help="Number of samples. Default: as many as fit into --seconds; 16 without --seconds."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Time budget; unfinished samples are dropped.")] = None,
    rule: Annotated[
        str,
        typer.Option(
            help='Stop early: "decided", when the remaining samples can\'t change the answer; "confident", when the '
            'leader is ahead with a probability of 0.95; "none", never.'
        ),
    ] = "decided",
    weights: Annotated[
        str, typer.Option(help='Weights of votes: "uniform", "logprob", or a reward model\'s folder or hub id.')
    ] = "uniform",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the tally, the samples and their cost to this file.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens per sample.")] = 1024,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 is greedy.")] = 0.7,
    max_num_seqs: Annotated[int, typer.Option(help="Maximum number of samples decoded in parallel.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the random draws.")] = 0,
    force: Force = False,
) -> None:
    """Answer one problem by voting over many samples."""
    from dataclasses import asdict

    from m1.cli import render
    from m1.engine import LLM, SamplingParams
    from m1.grading import Grader
    from m1.jsonl import write_json
    from m1.reasoning.budget import Budget
    from m1.reasoning.solve import solve as run
    from m1.reasoning.verifier import vote_weights

    budget = Budget(16 if n is None and seconds is None else n, seconds, rule)  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if json_file:
        make_room(json_file, "solve", ("command", "solve"), force)
    scores = vote_weights(weights)
    llm = LLM.from_pretrained(model, max_num_seqs=min(budget.n or max_num_seqs, max_num_seqs))
    with Grader() as grader:
        grader.start()  # before the clock starts, like the loading of the model
        with render.watch_vote(budget) as on_step:
            solution = run(problem, llm, grader, params, budget, scores, on_step)
    render.solution(solution)
    if json_file:
        settings = {"problem": problem, "model": str(model), "budget": asdict(budget), "weights": weights}
        settings |= {"sampling": asdict(params), "grading": dict(grader.counts)}
        write_json(json_file, {"command": "solve"} | settings | solution.as_json())
