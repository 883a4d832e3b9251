"""The command line: parses, calls one function a command. Bad input is one line on stderr and exit code 2."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import m1
from m1.bench import commands
from m1.errors import UserError
from m1.pipeline import progress_bar, run_pipeline, run_stage
from m1.recipe import load_stage

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=m1.__doc__)
app.add_typer(commands.bench, name="bench")


class RunByDefault(TyperGroup):
    """`m1 eval --model M ...` is `m1 eval run --model M ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


evaluation = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    help="Measure a model on a task (`run`, the default), or compare two results.",
)
app.add_typer(evaluation, name="eval")
console = Console()
errors = Console(stderr=True)

INTERRUPTED = 130  # the shell's exit code for Ctrl-C

Model = Annotated[Path, typer.Option(help="Checkpoint folder.")]
Recipe = Annotated[Path, typer.Argument(help="The stage's TOML file.")]
MixerOption = Annotated[str, typer.Option("--mixer", help='"mamba" (Mamba-1) or "mamba2".')]
AlignmentOption = Annotated[
    str, typer.Option("--head-alignment", help='"official" (the released code\'s order) or "attention".')
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this stage.")]
MinSteps = Annotated[int, typer.Option(help="Minimum number of steps in a generated chain problem.")]
MaxSteps = Annotated[int, typer.Option(help="Maximum number of steps.")]
Period = Annotated[int | None, typer.Option(help="After at most so many steps chain's problems repeat themselves.")]
MaxNumSeqs = Annotated[
    int,
    typer.Option(help="Maximum number of samples decoded in parallel. More raises throughput and per-sample latency."),
]
Quantize = Annotated[str | None, typer.Option(help="int8: round the weights of linear layers (on a CPU).")]


@app.command()
def convert(
    teacher: Annotated[Path, typer.Option(help="Llama, Qwen2 or Qwen3 checkpoint folder.")],
    out: Annotated[Path, typer.Option(help="Where the hybrid is saved.")],
    keep_attention: Annotated[
        str | None, typer.Option(help="Layers that stay attention, e.g. 1,3, or @ranking.json:6 (see rank-layers).")
    ] = None,
    attention_ratio: Annotated[
        float | None, typer.Option(help="Instead of it: the share of layers that stay attention, evenly spaced.")
    ] = None,
    mixer: MixerOption = "mamba",
    head_alignment: AlignmentOption = "official",
    state_size: Annotated[
        int | None, typer.Option(help="States a Mamba-1 channel, 16 when not given; must divide head_dim.")
    ] = None,
    seed: int = 0,
) -> None:
    """Turn a transformer checkpoint into a hybrid: weights mapped, nothing trained."""
    from m1.model.convert import convert as run

    model = run(teacher, out, keep_attention, attention_ratio, mixer, head_alignment, state_size, seed)
    kept = model.config.attention_layers
    console.print(
        f"{out}: {len(kept)} attention layers {kept}, {model.config.num_hidden_layers - len(kept)} Mamba layers"
    )


@app.command("rank-layers")
def rank_layers(
    teacher: Annotated[Path, typer.Option(help="Llama, Qwen2 or Qwen3 checkpoint folder.")],
    data: Annotated[Path, typer.Option(help='JSONL of {"messages"} or {"problem", "solution"}.')],
    out: Annotated[Path, typer.Option(help="JSON for `m1 convert --keep-attention @FILE:COUNT`.")] = Path(
        "ranking.json"
    ),
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first rows only.")] = 64,
    mixer: MixerOption = "mamba",
    head_alignment: AlignmentOption = "official",
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row that count.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in one forward pass.")] = 8,
    seed: int = 0,
) -> None:
    """Measure what replacing each layer alone would cost, in KL from the teacher; the most costly should be kept."""
    from m1.recipe import Data
    from m1.train.rank_layers import rank_layers as run

    with progress_bar("rank-layers", "layers") as on_progress:
        rows = Data(path=str(data), limit=limit)
        result = run(teacher, rows, out, mixer, head_alignment, max_length, batch_size, seed, on_progress)
    for place, layer in enumerate(result["ranking"], start=1):
        console.print(f"{place:3d}. layer {layer:3d}  {result['kl'][str(layer)]:.4f} nats a token", highlight=False)
    console.print(f"{result['tokens']} tokens; written to {out}", soft_wrap=True)


@app.command("inspect")
def inspect(
    model: Annotated[Path, typer.Argument(help="Folder of an M1 model or a teacher; its config.json is enough.")],
    context: Annotated[int, typer.Option(help="Tokens at which the layers' caches are given.")] = 4096,
    plot: Annotated[
        Path | None, typer.Option(help="Draw cache against context into this file, e.g. cache.png.")
    ] = None,
) -> None:
    """Show a model's layers, their parameters and caches, and the cache against its teacher's."""
    from m1.model.summary import plot_summary, print_summary, summarize

    summary = summarize(model, context)
    print_summary(summary, console)
    if plot:
        plot_summary(summary, plot)
        console.print(f"plot written to {plot}", soft_wrap=True)


@app.command("import-official")
def import_official(source: Path, out: Path) -> None:
    """Read a released M1 checkpoint (config.json + mamba_config.json) and save it as an M1 model."""
    from m1.model.official import import_official as run

    run(source, out)
    console.print(f"{source} -> {out}")


@app.command("export-official")
def export_official(source: Path, out: Path) -> None:
    """Write an M1 model in the released checkpoints' layout."""
    from m1.model.official import export_official as run

    run(source, out)
    console.print(f"{source} -> {out}")


def add_training(stage: str, text: str) -> None:
    @app.command(stage, help=text)
    def train(recipe: Recipe, resume: Resume = False) -> None:
        run_stage(load_stage(recipe, stage), resume)


add_training("sft", "Fine-tune on worked solutions (TRL SFTTrainer).")
add_training("distill", "Distil a teacher into a hybrid on assistant tokens.")
add_training("grpo", "Reinforcement learning with verifiable rewards (TRL GRPOTrainer).")


@evaluation.command("run")
def evaluate(
    model: Annotated[str, typer.Option(help="Checkpoint folder; with --endpoint, the model's name there.")],
    task: Annotated[str, typer.Option(help="chain, math500, aime24, aime25, amc23, olympiadbench, minerva or gsm8k.")],
    data: Annotated[
        str | None,
        typer.Option(
            help='JSONL of {"problem", "answer"}, or a data set: a folder, or ORG/NAME or ORG/NAME/CONFIG:SPLIT of the '
            "Hub. When not given, the task's own on the Hub."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Result folder; MODEL/eval/TASK when not given.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first problems only.")] = None,
    min_steps: MinSteps = 2,
    max_steps: MaxSteps = 8,
    period: Period = None,
    n: Annotated[int, typer.Option(help="Samples a problem.")] = 16,
    max_new_tokens: int = 1024,
    temperature: float = 0.7,
    prompt_template: Annotated[
        str | None, typer.Option(help="User's message, with {problem} in it, or @FILE; the task's when not given.")
    ] = None,
    generator: Annotated[str, typer.Option(help="What samples: engine (this project's) or transformers.")] = "engine",
    max_num_seqs: MaxNumSeqs = 256,
    quantize: Quantize = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="Let an OpenAI-compatible server sample: its base URL. The key is $OPENAI_API_KEY."),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests to the endpoint at a time.")] = 64,
    timeout: Annotated[
        float, typer.Option(help="Seconds the endpoint may be silent, as it is while it samples.")
    ] = 3600,
    seed: int = 0,
) -> None:
    """Measure pass@1 (avg@n), pass@k and maj@k; every sample and its grade is kept. Run again, it resumes."""
    from m1.evaluation.evaluate import Settings
    from m1.evaluation.evaluate import evaluate as run
    from m1.evaluation.generators import LOCAL, Generator
    from m1.evaluation.tasks import load_task
    from m1.evaluation.tasks import prompt_template as template_of
    from m1.model.checkpoint import load_model
    from m1.reasoning.chain import ChainSizes

    if generator not in LOCAL or (endpoint and generator != "engine"):
        raise UserError(f"--generator {generator}: give one of {', '.join(LOCAL)}, or --endpoint instead")
    if quantize and (endpoint or generator != "engine"):
        raise UserError(f"--quantize {quantize}: only this project's engine does that")
    settings = Settings(task, n, max_new_tokens, temperature, seed, template_of(task, prompt_template))
    sizes = ChainSizes(min_steps=min_steps, max_steps=max_steps, period=period)
    problems = load_task(task, data, limit, sizes, seed)
    source: Generator
    if endpoint:
        from m1.evaluation.endpoint import EndpointGenerator

        source = EndpointGenerator(endpoint, model, concurrency, timeout)
    else:
        options = {} if quantize is None else {"quantize": quantize}
        source = LOCAL[generator](*load_model(model), max_num_seqs, **options)
    out = out or Path(model, "eval", task)
    with progress_bar(task, "samples") as on_progress:
        result = run(source, problems, settings, out, on_progress)
    majority = result["maj@k"][str(n)]
    console.print(f"{task}: {result['n_problems']} problems, {n} samples each")
    console.print(f"pass@1 {100 * result['pass@1']:.1f} ± {100 * result['pass@1_ci95']:.1f} %")
    console.print(f"maj@{n} {100 * majority['value']:.1f} ± {100 * majority['ci95']:.1f} %")
    speed = f"{result['tokens_per_second']:,.0f} tokens/s, " if result["tokens_per_second"] is not None else ""
    console.print(f"{speed}written to {out / 'result.json'}", soft_wrap=True)
    if undecided := sum(count for name, count in result["grading"].items() if name != "graded"):
        console.print(f"{undecided} comparisons of answers couldn't be decided and count as wrong", style="yellow")
    if doubted := len(result["audit"]["disagreements"]):
        console.print(f"{doubted} grades are doubted by a second grader: `audit` in result.json", style="yellow")


@evaluation.command("compare")
def compare_evaluations(
    a: Annotated[Path, typer.Argument(help="Result folder of `m1 eval`.")],
    b: Annotated[Path, typer.Argument(help="Another, of the same problems.")],
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
) -> None:
    """Whether B is better than A: paired bootstrap over problems. The last line is JSON."""
    from m1.evaluation.compare import compare, print_comparison

    print_comparison(compare(a, b, seed), console)


@app.command("budget")
def budget_command(
    model: Annotated[list[str], typer.Option(help="NAME=FOLDER; give two to compare them.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs, budget.json and budget.png; run again, it resumes.")],
    seconds: Annotated[float, typer.Option(help="Longest budget of a problem.")],
    task: Annotated[str, typer.Option(help="As of `m1 eval`.")] = "chain",
    data: Annotated[str | None, typer.Option(help="As of `m1 eval`.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first problems only.")] = 32,
    min_steps: MinSteps = 2,
    max_steps: MaxSteps = 8,
    period: Period = None,
    seeds: Annotated[int, typer.Option(help="Times that each problem is solved.")] = 3,
    max_new_tokens: int = 1024,
    temperature: float = 0.7,
    max_num_seqs: MaxNumSeqs = 64,
    vllm: Annotated[
        list[str] | None, typer.Option(help="NAME of a --model that vLLM samples, too (see `make peers`).")
    ] = None,
) -> None:
    """Measure the vote's accuracy against the seconds a problem may take, of models beside each other."""
    from m1.evaluation.budget import Settings, measure_budgets
    from m1.evaluation.tasks import load_task, prompt_template
    from m1.model.checkpoint import load_model
    from m1.reasoning.chain import ChainSizes

    folders = dict(part.split("=", 1) for part in model if "=" in part)
    if len(folders) != len(model):
        raise UserError(f"--model {' --model '.join(model)}: give each as NAME=FOLDER, under a name of its own")
    settings = Settings(task, seconds, seeds, max_new_tokens, temperature, max_num_seqs, prompt_template(task))
    sizes = ChainSizes(min_steps=min_steps, max_steps=max_steps, period=period)
    problems = load_task(task, data, limit, sizes)
    models = {name: load_model(folder) for name, folder in folders.items()}
    with progress_bar("budget", "runs") as on_progress:
        result = measure_budgets(models, problems, settings, out, vllm or (), on_progress)
    for name, measured in result["models"].items():
        last = measured["points"][-1]
        console.print(
            f"{name}: {100 * last['accuracy']:.1f} ± {100 * last['ci95']:.1f} % at {last['seconds']:g} s, "
            f"{last['samples']:.1f} samples a problem, {measured['tokens_per_second']:,.0f} tokens/s"
        )
    for name, lead in result["leads"].items():
        first = next(iter(result["models"]))
        console.print(
            f"{name} is right {100 * lead['value']:+.1f} ± {100 * lead['ci95']:.1f} points more often than {first}, "
            "mean over the budgets"
        )
    console.print(f"written to {out / 'budget.json'} and budget.png", soft_wrap=True)


@app.command()
def generate(
    model: Model,
    prompts: Annotated[Path, typer.Option(help='JSONL of {"prompt"}, {"problem"} or {"messages"}; "id" if you like.')],
    out: Annotated[Path, typer.Option(help="JSONL, a line a sample as it finishes; run again, it resumes.")],
    n: Annotated[int, typer.Option(help="Samples a prompt.")] = 1,
    max_new_tokens: int = 1024,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Ends a sample, which is cut in front of it. Repeatable.")
    ] = None,
    max_num_seqs: MaxNumSeqs = 256,
    quantize: Quantize = None,
    seed: int = 0,
) -> None:
    """Sample answers to a file of prompts."""
    from m1.engine import LLM, SamplingParams
    from m1.engine.llm import generate_file

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    params = SamplingParams(n=n, max_tokens=max_new_tokens, stop=tuple(stop or ()), **sampling)  # type: ignore[arg-type]
    llm = LLM.from_pretrained(model, max_num_seqs=max_num_seqs, quantize=quantize)
    with progress_bar("generate", "samples") as on_progress:
        tokens, seconds = generate_file(llm, prompts, out, params, on_progress)
    console.print(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s, in {out}")


@app.command()
def solve(
    problem: Annotated[str, typer.Argument(help="The question, as a user would type it.")],
    model: Model,
    n: Annotated[
        int | None, typer.Option(help="Samples; when not given, as many as fit into --seconds, or 16 without it.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Time budget; what is unfinished then is dropped.")] = None,
    rule: Annotated[
        str,
        typer.Option(
            help='Stop early: "decided", when the answer is sure to be that of all samples; "confident", when the '
            'leader is ahead with a probability of 0.95; "none", never.'
        ),
    ] = "decided",
    weights: Annotated[
        str, typer.Option(help='Of the votes: "uniform", "logprob", or a reward model\'s folder or hub id.')
    ] = "uniform",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the tally, the samples and what they cost into this file.")
    ] = None,
    max_new_tokens: int = 1024,
    temperature: float = 0.7,
    max_num_seqs: MaxNumSeqs = 64,
    seed: int = 0,
) -> None:
    """Answer one problem by voting over many samples."""
    from dataclasses import asdict

    from m1.engine import LLM, SamplingParams
    from m1.jsonl import write_json
    from m1.reasoning.answers import Grader
    from m1.reasoning.budget import Budget
    from m1.reasoning.live import summary, watch
    from m1.reasoning.solve import solve as run
    from m1.reasoning.verifier import vote_weights

    budget = Budget(16 if n is None and seconds is None else n, seconds, rule)  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=max_new_tokens, temperature=temperature, seed=seed)
    scores = vote_weights(weights)
    llm = LLM.from_pretrained(model, max_num_seqs=min(budget.n or max_num_seqs, max_num_seqs))
    with Grader() as grader:
        grader.start()  # like loading the model, it is not on the clock
        with watch(console, budget) as on_step:
            solution = run(problem, llm, grader, params, budget, scores, on_step)
    for line in summary(solution):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if json_file:
        settings = {"problem": problem, "model": str(model), "budget": asdict(budget), "weights": weights}
        settings |= {"sampling": asdict(params), "grading": dict(grader.counts)}
        try:
            write_json(json_file, settings | solution.as_json())
        except OSError as error:
            raise UserError(f"can't write {json_file}: {error.strerror}") from None


@app.command()
def pipeline(recipe_dir: Annotated[Path, typer.Argument(help="Recipe folder with a pipeline.toml.")]) -> None:
    """Run all stages of a recipe folder; run it again to resume."""
    summary = run_pipeline(recipe_dir)
    console.print_json(data=summary)


def main() -> None:
    """Entry point: a UserError is one line and exit code 2, Ctrl-C a line and 130."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        app()
    except UserError as error:
        errors.print(f"m1: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as exit_:
        if exit_.code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            errors.print("m1: interrupted; finished work is saved: run it again (a stage with --resume) to go on")
        raise
