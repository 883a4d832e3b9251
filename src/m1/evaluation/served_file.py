"""`m1 generate --endpoint`: servers sample every prompt of a file."""

from collections.abc import Generator

from m1.engine import SamplingParams
from m1.engine.generate import Ended, Generated, Wanted, sample_file
from m1.errors import UserError
from m1.evaluation.endpoint import EndpointSampler
from m1.evaluation.samplers import SampleRequest
from m1.progress import Progress, silent
from m1.recipe import GenerateStage
from m1.tasks.prompts import PLAIN

SAMPLES_PER_REQUEST = 8


def generate_served(
    stage: GenerateStage, endpoints: list[str], force: bool = False, progress: Progress = silent
) -> Generated:
    """As the stage `generate`, with samples of servers, which have the stage's model.

    Raises:
        UserError: as `sample_file` and `EndpointSampler`; a row with a plain `prompt`, as servers are asked for chats.
    """
    most = min(stage.n, SAMPLES_PER_REQUEST, stage.max_num_seqs)
    sampler = EndpointSampler(endpoints, stage.model, stage.max_num_seqs, samples_per_request=most)
    params = SamplingParams.of(stage, n=stage.n, seed=stage.seed, stop=tuple(stage.stop))

    def source(wanted: list[Wanted]) -> Generator[Ended, None, None]:
        if any(isinstance(one.prompt, str) for one in wanted):
            raise UserError(f"{stage.prompts}: servers are asked for chats: give `problem` or `messages`, not `prompt`")
        requests = [SampleRequest(str(i), one.prompt, one.missing, one.seed) for i, one in enumerate(wanted)]  # type: ignore[arg-type]
        for s in sampler.generate(requests, params):
            yield Ended(int(s.problem), s.round, s.text, s.finish_reason, s.tokens, s.logprob, s.seconds)

    prompt, identity = stage.load_prompt(PLAIN.template), sampler.identity()
    with progress("generate", "samples") as on_progress:
        rows = stage.skip, stage.limit
        return sample_file(
            source, identity, stage.prompts, stage.out, params, prompt, on_progress, force, stage.settings(), rows
        )
