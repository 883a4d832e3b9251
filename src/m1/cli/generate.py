"""Commands that sample: generate (a file of prompts), chat, and solve (one problem, by voting)."""

from pathlib import Path
from typing import Annotated, Any

import typer

from m1.cli.arguments import Endpoints, Force, options_of, refuse_local
from m1.errors import UserError
from m1.options import build
from m1.outputs import make_room
from m1.recipe import GenerateStage
from m1.sampling_options import ChatOptions, SolveOptions

app = typer.Typer()


@app.command()
@options_of(GenerateStage)
def generate(
    endpoint: Endpoints = [],  # noqa: B006 (typer copies it)
    force: Force = False,
    **options: Any,
) -> None:
    """Sample answers to the prompts of a file. Run again to resume."""
    from m1.cli import render

    stage = build(GenerateStage, options, "generate")
    if endpoint:
        from m1.evaluation.served_file import generate_served

        refuse_local(stage)
        generated = generate_served(stage, endpoint, force, render.progress_bar)
    else:
        generated = stage.run(force=force, progress=render.progress_bar)
    render.generated(*generated, stage.out)


@app.command()
@options_of(ChatOptions)
def chat(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.")],
    system_prompt: Annotated[
        str | None, typer.Option(help="System message, or @FILE. Default: the chat template's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random draws.")] = 0,
    **options: Any,
) -> None:
    """Chat with a model. Each line of the input is a question.

    /new starts again, /exit or Ctrl-D ends the chat, and Ctrl-C ends an answer.
    """
    from contextlib import closing

    from m1.cli import render
    from m1.engine import LLM, SamplingParams
    from m1.engine.chat import Chat
    from m1.tasks.prompts import read_text

    chosen = build(ChatOptions, options, "chat")
    params = SamplingParams.of(chosen, seed=seed)
    system = None if system_prompt is None else read_text(system_prompt, "system prompt")
    llm = LLM.from_pretrained(model, chosen.dtype or "auto", max_num_seqs=1, quantize=chosen.quantize)
    conversation = Chat(llm, params, system)
    for question in render.questions():
        if question in ("/exit", "/quit"):
            return
        if question == "/new":
            conversation.restart()
            continue
        try:
            with closing(conversation.ask(question)) as pieces:
                render.stream(pieces)
        except UserError as error:
            if not render.interactive():
                raise
            render.error(f"{error}; /new starts again")


@app.command()
@options_of(SolveOptions)
def solve(
    problem: Annotated[str, typer.Argument(help="The question, as a user would type it.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder or Hub id; with --endpoint, the model's name there.")],
    endpoint: Endpoints = [],  # noqa: B006 (typer copies it)
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
    max_num_seqs: Annotated[int, typer.Option(help="Maximum number of samples decoded in parallel.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the random draws.")] = 0,
    force: Force = False,
    **options: Any,
) -> None:
    """Answer one problem by voting over many samples."""
    from dataclasses import asdict
    from functools import partial

    from m1.cli import render
    from m1.engine import LLM, SamplingParams
    from m1.evaluation.endpoint import EndpointSampler
    from m1.evaluation.solvers import solve_served
    from m1.grading import Grader
    from m1.jsonl import write_json
    from m1.reasoning.budget import Budget
    from m1.reasoning.solve import solve as run
    from m1.reasoning.verifier import vote_weights
    from m1.runs import versions
    from m1.tasks.prompts import MATH

    chosen = build(SolveOptions, options, "solve")
    budget = Budget(16 if n is None and seconds is None else n, seconds, rule)  # type: ignore[arg-type]
    params = SamplingParams.of(chosen, seed=seed)
    prompt = chosen.load_prompt(MATH.template)
    if json_file:
        make_room(json_file, "solve", ("command", "solve"), force)
    scores = vote_weights(weights)
    slots = min(budget.n or max_num_seqs, max_num_seqs)
    if endpoint:
        refuse_local(chosen)
        ask = partial(solve_served, problem, EndpointSampler(endpoint, model, slots))
    else:
        llm = LLM.from_pretrained(model, chosen.dtype or "auto", max_num_seqs=slots, quantize=chosen.quantize)
        ask = partial(run, problem, llm)
    with Grader() as grader:
        grader.start()  # before the clock starts, like the loading of the model
        with render.watch_vote(budget) as on_step:
            solution = ask(grader, params, budget, scores, prompt, on_step)
    render.solution(solution)
    if json_file:
        settings = {"problem": problem, "model": model, "budget": asdict(budget), "weights": weights}
        settings |= {"sampling": asdict(params), "grading": dict(grader.counts), "versions": versions()}
        settings |= {name: getattr(chosen, name) for name in ("dtype", "quantize")} | prompt.settings()
        write_json(json_file, {"command": "solve"} | settings | solution.as_json())
