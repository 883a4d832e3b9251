"""`m1 generate`: samples every prompt of a file.

OUT          one line per finished sample: id, sample, text, finish_reason, tokens, logprob; and the conversation,
             which a training stage reads as it is: `messages`, or `prompt` and `completion` after a plain prompt
OUT.run/     settings and manifest (runs.py)
"""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from m1.engine.data_parallel import DataParallel, load_llm
from m1.engine.llm import LLM, Prompt
from m1.engine.sampling import SamplingParams
from m1.engine.sequence import Request
from m1.errors import UserError
from m1.jsonl import read_jsonl
from m1.model.checkpoint import weights_hash
from m1.ops.random_bits import fold_in
from m1.outputs import refuse_sources
from m1.progress import OnProgress, Progress, ignore, silent
from m1.recipe import GenerateStage
from m1.runs import Run, sha256
from m1.tasks.prompts import PLAIN, ProblemPrompt
from m1.tasks.rows import some_rows


class Generated(NamedTuple):
    """The cost of a session of `m1 generate`.

    Attributes:
        tokens: number of tokens generated in this session.
        seconds: time spent generating them, without the loading of the model and the engine's pauses.
    """

    tokens: int
    seconds: float


class Wanted(NamedTuple):
    """A prompt of the file, of which samples are missing.

    Attributes:
        id: the prompt's.
        prompt: a text, or chat messages.
        missing: numbers of the missing samples.
        seed: the prompt's.
    """

    id: str
    prompt: Prompt
    missing: tuple[int, ...]
    seed: int


class Ended(NamedTuple):
    """A finished sample of `wanted[prompt]`, as its line says; `seconds` since sampling began."""

    prompt: int
    sample: int
    text: str
    finish_reason: str | None
    tokens: int | None
    logprob: float | None
    seconds: float


Source = Callable[[list[Wanted]], Generator[Ended, None, None]]


def run(stage: GenerateStage, force: bool = False, progress: Progress = silent) -> Generated:
    """Runs the generate stage of a recipe, and `m1 generate`."""
    params = SamplingParams.of(stage, n=stage.n, seed=stage.seed, stop=tuple(stage.stop))
    prompt = stage.load_prompt(PLAIN.template)
    options = {"max_num_seqs": stage.max_num_seqs, "quantize": stage.quantize}
    loaded = load_llm(stage.model, stage.devices, stage.dtype or "auto", **options)
    with loaded as llm, progress("generate", "samples") as on_progress:
        rows = stage.skip, stage.limit
        return generate_file(llm, stage.prompts, stage.out, params, prompt, on_progress, force, stage.settings(), rows)


def generate_file(
    llm: LLM | DataParallel,
    prompts: str | Path,
    out: str | Path,
    params: SamplingParams,
    prompt: ProblemPrompt = PLAIN,
    on_progress: OnProgress = ignore,
    force: bool = False,
    settings: dict[str, Any] | None = None,
    chosen: tuple[int, int | None] = (0, None),
) -> Generated:
    """Samples every prompt of a JSONL file with an engine. Arguments and errors are those of `sample_file`.

    Args:
        llm: the model.
    """

    def source(wanted: list[Wanted]) -> Generator[Ended, None, None]:
        requests = [
            Request(llm.encode(one.prompt), replace(params, seed=one.seed), i, one.missing)
            for i, one in enumerate(wanted)
        ]
        with closing(llm.run(requests)) as steps:
            for s in chain.from_iterable(steps):
                yield Ended(s.prompt, s.index, s.text, s.finish_reason, s.tokens, s.logprob, s.seconds)

    identity = {"weights": weights_hash(llm.model)}
    return sample_file(source, identity, prompts, out, params, prompt, on_progress, force, settings, chosen)


def sample_file(
    source: Source,
    identity: dict[str, str],
    prompts: str | Path,
    out: str | Path,
    params: SamplingParams,
    prompt: ProblemPrompt = PLAIN,
    on_progress: OnProgress = ignore,
    force: bool = False,
    settings: dict[str, Any] | None = None,
    chosen: tuple[int, int | None] = (0, None),
) -> Generated:
    """Samples every prompt of a JSONL file, and writes each sample as soon as it is finished.

    An interrupted run resumes with the missing samples. The random stream of a sample depends only on the seed, the
    prompt's number and the sample's, so they are the samples of an uninterrupted run.

    Args:
        source: yields the samples of prompts in the order in which they finish.
        identity: the model's.
        prompts: JSONL file. A row has `prompt` (plain text), `problem` (a user message) or `messages`. It may have an
            `id`; the default is its number, from 0.
        out: JSONL file, one line per finished sample.
        params: of each sample.
        prompt: makes the chat messages of a row with `problem`.
        on_progress: called with the number of finished samples and of all samples.
        force: move `out` aside if it holds something else.
        settings: what the samples depend on, besides the model's weights, the prompts and `params`.
        chosen: number of prompts that are left out at the beginning, and of those sampled; None for all others.

    Raises:
        UserError: no row, a row without a prompt, an id used twice, or an `out` that is the prompts or holds anything
            but samples with these settings.
    """
    prompts, out = Path(prompts), Path(out)
    refuse_sources(out, [prompts])
    rows = dict(some_rows(str(prompts), enumerate(read_jsonl(prompts)), *chosen))
    ids = {i: str(row.get("id", i)) for i, row in rows.items()}
    if len(set(ids.values())) != len(ids):
        raise UserError(f"{prompts}: ids are not unique")
    texts = {i: _prompt_of(row, prompt, f"{prompts}, row {i + 1}") for i, row in rows.items()}
    depends = asdict(params) | prompt.settings() | (settings or {})
    depends |= identity | {"prompts_sha256": sha256(prompts), "chosen": list(chosen)}
    with Run("generate", out, depends, is_file=True, force=force) as run:
        done = {(row["id"], row["sample"]) for row in run.read(out.name, {"id": str, "sample": int})}
        wanted = [
            Wanted(ids[i], text, missing, fold_in(params.seed, i))
            for i, text in texts.items()
            if (missing := tuple(j for j in range(params.n) if (ids[i], j) not in done))
        ]
        total, ended, tokens, seconds = len(ids) * params.n, len(done), 0, 0.0
        on_progress(ended, total)
        if wanted:
            with closing(source(wanted)) as samples:
                for sample in samples:
                    asked = wanted[sample.prompt]
                    key = {"id": asked.id, "sample": sample.sample}
                    how = {"text": sample.text, "finish_reason": sample.finish_reason}
                    cost = {"tokens": sample.tokens, "logprob": sample.logprob}
                    run.append(out.name, key | how | cost | _conversation(asked.prompt, sample.text))
                    ended, tokens, seconds = ended + 1, tokens + (sample.tokens or 0), max(seconds, sample.seconds)
                    on_progress(ended, total)
        run.finish()
    return Generated(tokens, seconds)


def _prompt_of(row: dict[str, Any], prompt: ProblemPrompt, where: str) -> Prompt:
    match row:
        case {"messages": list(messages)}:
            return messages
        case {"problem": str(problem)}:
            return prompt.messages(problem)
        case {"prompt": str(text)}:
            return text
    raise UserError(f"{where}: needs `prompt` or `problem` (text) or `messages` (a list); has {sorted(row)}")


def _conversation(prompt: Prompt, text: str) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": text}
    return {"messages": [*prompt, {"role": "assistant", "content": text}]}
