"""Mutations that the tests must notice: `make mutants` applies each to a copy of the tree and prints the survivors.

    python tests/mutants.py           all
    python tests/mutants.py top_p     those whose file, change or reason contains this word

Each entry is a fault that tests have let through once, or one of its kind. Add yours when you mend a fault. The list is
written by hand: mutmut and cosmic-ray make every possible mutation, which would take days here, keep no list of chosen
ones, and know no C++.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """A one-line mutation of a file in src/m1, and the test files that must fail with it.

    Attributes:
        file: path below src/m1.
        original: text that occurs once in the file.
        mutated: its replacement.
        tests: space-separated paths below tests.
        why: what would go wrong.
    """

    file: str
    original: str
    mutated: str
    tests: str
    why: str


SAMPLING, SCHEDULER = "engine/test_sampling.py", "engine/test_scheduler.py"
PROCESSORS = "engine/test_logits_processors.py"
MASK = "train/test_data_mask.py"
MUTANTS = [
    # what a newcomer meets first
    Mutant(
        "doctor.py", "if not found or not requirement.specifier.contains(found, prereleases=True):", "if not found:",
        "test_doctor.py", "a package of a wrong version isn't named",
    ),
    Mutant(
        "doctor.py", "if path.is_relative_to(Path.home()) else str(path)", "if False else str(path)", "test_doctor.py",
        "the user's name in a public issue",
    ),
    Mutant(
        "doctor.py", "    elif failure:\n        yield", "    elif False:\n        yield", "test_doctor.py",
        "kernels that don't compile aren't named",
    ),
    Mutant(
        "model/gguf.py", "parsed = functools.cache(own)", "parsed = own", "model/test_gguf.py",
        "a GGUF file's vocabulary is parsed three times",
    ),
    # the prefix cache and admission
    Mutant(
        "engine/scheduler.py", "self.cached.remove(entry)\n            self.cached.append(entry)", "pass", SCHEDULER,
        "FIFO instead of LRU",
    ),
    Mutant(
        "engine/scheduler.py", "if not self.unused and self.cached:", "if len(self.unused) <= 1 and self.cached:",
        SCHEDULER, "one prefix entry too few",
    ),
    Mutant(
        "engine/scheduler.py", "request.resumable and length < size", "length < size", SCHEDULER,
        "any request continues the state at a sequence's end",
    ),
    # log-probabilities of prompts
    Mutant(
        "engine/scheduler.py", "None if request.prompt_logprobs else self._find(request)", "self._find(request)",
        "engine/test_prompt_logprobs.py", "what the prefix cache has isn't scored",
    ),
    Mutant(
        "engine/scheduler.py", " and request.computed > request.scored", "", "engine/test_prompt_logprobs.py",
        "a prompt that is prefilled again is scored twice",
    ),
    Mutant(
        "engine/executor.py", "[scores[chunk.slot, chunk.start] for chunk in plan.prefill if chunk.scored]",
        "list(scores.values())", "engine/test_prompt_logprobs.py", "scores of chunks in the order of rounds",
    ),
    # the server
    Mutant(
        "serve/gate.py", "in SAMPLING_PATHS and self.full()", "in ()", "serve/test_limits.py",
        "a full server parses what it refuses",
    ),
    Mutant(
        "serve/protocol.py", "if asked > room:", "if asked > context:", "serve/test_openai.py",
        "a sample is cut at the end of the context",
    ),
    Mutant(
        "serve/connection.py", "if self.conn.their_state is h11.IDLE:", "if False:", "serve/test_limits.py",
        "a client that sends a header now and then keeps its connection",
    ),
    # a GPU's decode step
    Mutant("ops/triton/linear.py", "gate = silu(gate) * up", "gate = up * gate", "ops/test_linear.py", "no silu"),
    Mutant(
        "ops/triton/registers.py", "length + 1 - ended", "length + 1", "ops/test_registers.py",
        "a sequence that has ended grows",
    ),
    Mutant(
        "ops/triton/scan_forward.py", "oldest, older, old = older, old, x_t", "oldest, older, old = older, x_t, old",
        "ops/test_prefill_scan.py", "the convolution's inputs change places",
    ),
    Mutant(
        "ops/triton/scan_forward.py", "tl.where(end - start > SHORT, end, start)", "end", "ops/test_prefill_scan.py",
        "a short chunk is scanned twice",
    ),
    # pages, swaps and overlapping steps
    Mutant("engine/pages.py", "if not self._holders[page]:", "if True:", SCHEDULER, "a shared page is freed"),
    Mutant("engine/scheduler.py", "max(self.running)", "min(self.running)", SCHEDULER, "the oldest is swapped out"),
    Mutant(
        "ops/reference.py", "torch.where(rows[:, columns.ENDED] > 0, -1, slots)", "slots", "engine/test_invariants.py",
        "a sequence that has ended moves its slot",
    ),
    Mutant(
        "engine/executor.py", "register[swap.slot] = row", "pass", "engine/test_invariants.py",
        "a sequence comes back with another's registers",
    ),
    Mutant(
        "train/grpo_trainer.py", "if self._last_loaded_step != self.state.global_step:", "if False:",
        "train/test_grpo.py", "replaced groups are drawn with the weights of the step before",
    ),
    Mutant(
        "train/vllm_rollout.py", "self.dtype = rollout_dtype(model, arguments)", "self.dtype = torch.bfloat16",
        "train/test_vllm_rollout.py", "vLLM computes in another precision than the trainer",
    ),
    Mutant(
        "train/vllm_rollout.py", "fold_in(seed, together)", "seed", "train/test_vllm_rollout.py",
        "processes with a vLLM each draw the same",
    ),
    Mutant(
        "train/vllm_rollout.py", "self.accelerator.process_index % self.tensor_parallel_size * len(prompts)", "0",
        "train/test_vllm_rollout.py", "processes that split one vLLM draw different samples",
    ),
    Mutant(
        "train/vllm_rollout.py", "os.environ.pop(name, None)", "pass", "train/test_vllm_rollout.py",
        "a later stage of the process takes itself for torchrun's",
    ),
    Mutant(
        "train/rollout.py", "self.llm.reload_weights(self.model)", "pass", "train/test_grpo.py",
        "GRPO samples with the weights of its first generation",
    ),
    Mutant(
        "train/rollout.py", "if not drift <= MAX_DRIFT:", "if drift > MAX_DRIFT:", "train/test_grpo.py",
        "the gate lets a NaN pass",
    ),
    Mutant(
        "train/grpo_trainer.py", "generation = self._step // self.window if", "generation = 0 if", "train/test_grpo.py",
        "the seed of a rollout has no step",
    ),
    Mutant(
        "train/grpo_trainer.py", 'n = self._group_size("train" if self.model.training else "eval")',
        "n = self.num_generations", "train/test_grpo.py", "evaluation rollouts with training's n",
    ),
    Mutant(
        "train/grpo_trainer.py", "self._buffered_inputs if self._step % self.window else None", "None",
        "train/test_grpo.py", "a resume inside a generation's window draws other samples",
    ),
    Mutant(
        "train/trainer.py", "if state.global_step >= state.max_steps:", "if False:", "train/test_stages.py",
        "a stage killed after its last step takes another",
    ),
    Mutant("engine/scheduler.py", "if budget <= 0:", "if budget < 0:", SCHEDULER, "one prefill chunk too many a step"),
    Mutant(
        "engine/scheduler.py", "return len(request.tokens) > self.long_prompt", "return False", "engine/test_rotary.py",
        "a long prompt restores a short one's keys",
    ),
    Mutant(
        "engine/scheduler.py", "own.union(request.params.stop_token_ids)",
        "own.union(() if request.params.ignore_eos else request.params.stop_token_ids)", SCHEDULER,
        "ignore_eos drops stop_token_ids",
    ),
    Mutant(
        "engine/engine.py", "0 if self.scheduler.waiting or self.scheduler.swapped else len(self.scheduler.free)",
        "len(self.scheduler.free)", "engine/test_engine.py", "a new wave while requests wait",
    ),
    Mutant(
        "engine/engine.py", "next(token for token in tokens if not 0 <= token < self.vocab_size)", 
        "max(tokens, key=abs)", "engine/test_engine.py", "a valid token is blamed",
    ),
    # seeds
    Mutant(
        "evaluation/evaluate.py", "missing, fold_in(seed, i))", "missing, seed)", "evaluation/test_evaluate.py",
        "problems of an evaluation share a seed",
    ),
    Mutant(
        "evaluation/evaluate.py", "missing, fold_in(seed, i))", "missing, fold_in(seed, i + len(rows)))",
        "evaluation/test_evaluate.py", "seeds depend on what was there before",
    ),
    Mutant(
        "evaluation/samplers.py", "replace(params, seed=request.seed), i, request.rounds)",
        "replace(params, seed=request.seed, n=len(request.rounds)), i)", "evaluation/test_samplers.py",
        "a resumed evaluation draws the first samples again",
    ),
    Mutant(
        "evaluation/samplers.py", "seed = fold_in(leader.seed, round_)", "seed = leader.seed",
        "evaluation/test_samplers.py", "transformers' batches of one problem share a seed",
    ),
    Mutant(
        "evaluation/endpoint.py", '"seed": fold_in(job.request.seed, job.rounds[0]) % 2**31',
        '"seed": job.request.seed % 2**31', "evaluation/test_endpoint.py",
        "a server's samples of one problem share a seed",
    ),
    Mutant(
        "evaluation/time_budget.py", "fold_in(seed, i)", "fold_in(0, i)", "evaluation/test_curves.py",
        "equal seeds in every repetition of a problem",
    ),
    Mutant(
        "evaluation/time_budget.py", "fold_in(seed, i)", "fold_in(seed, 0)", "evaluation/test_curves.py",
        "equal seeds for all problems",
    ),
    Mutant(
        "reasoning/solve.py", "indices=tuple(range(begun, begun + wave))", "indices=tuple(range(wave))",
        "reasoning/test_solve.py", "equal seeds in every wave of samples",
    ),
    Mutant(
        "engine/generate.py", "seed=one.seed), i, one.missing)", "seed=one.seed, n=len(one.missing)), i)",
        "engine/test_llm.py",
        "a resumed `m1 generate` draws the first samples again",
    ),
    Mutant(
        "engine/chat.py", "seed=fold_in(self.params.seed, len(messages))", "seed=self.params.seed",
        "cli/test_chat.py", "equal seeds in every turn of a chat",
    ),
    Mutant(
        "engine/sequence.py", "seed=fold_in(params.seed, i)", "seed=params.seed", "engine/test_engine.py",
        "prompts of one call share a seed",
    ),
    Mutant(
        "engine/scheduler.py", "fold_in(params.seed, sequence.index)", "params.seed", SCHEDULER,
        "samples of one prompt share a seed",
    ),
    # top-k, top-p, min-p
    Mutant(
        "engine/sampling.py", "mass[:, :-1] < self.top_p * whole", "mass[:, :-1] <= self.top_p * whole", SAMPLING,
        "top_p keeps one token too many at its boundary",
    ),
    Mutant(
        "engine/sampling.py", "whole = torch.where(self.top_k > 0, mass", "torch.where(self.top_k > 0, mass",
        SAMPLING, "top_p of what top_k has excluded",
    ),
    Mutant(
        "engine/sampling.py", "keepdim=True)) >= self.min_p", "keepdim=True)) > self.min_p",
        SAMPLING, "min_p drops a token on its boundary",
    ),
    Mutant(
        "engine/sampling.py", "device=likeliest.device) < self.top_k",
        "device=likeliest.device) <= self.top_k", SAMPLING, "top_k keeps one token too many",
    ),
    Mutant(
        "engine/sampling.py", "dtype=torch.int32) <= count", "dtype=torch.int32) <= count + 1", SAMPLING,
        "one equal token too many",
    ),
    Mutant(
        "engine/sampling.py", "(inside & (values == last)).sum", "(values == last).sum", SAMPLING,
        "all tokens that equal the last one",
    ),
    Mutant(
        "engine/sampling.py", "self._weights(logits, likeliest).cumsum(dim=-1)[:, -1:]",
        "1 / ((logits - likeliest) / self.heat).softmax(dim=-1).amax(dim=-1, keepdim=True)", SAMPLING,
        "top_p is 1e-5 off in a large vocabulary",
    ),
    Mutant(
        "engine/sampling.py", "((logits - likeliest[:, :1]) / self.heat).exp()", "(logits - likeliest[:, :1]).exp()",
        SAMPLING, "top_p and min_p before the temperature",
    ),
    Mutant(
        "sampling_options.py", "tiny <= params.temperature", "0 < params.temperature", SAMPLING,
        "a temperature that is 0 in float32",
    ),
    # penalties, bias, minimum length, top log-probabilities
    Mutant(
        "engine/logits_processors.py", "drawn[rows] < least", "drawn[rows] <= least", PROCESSORS,
        "a stop token is excluded for one token too many",
    ),
    Mutant(
        "engine/logits_processors.py", "torch.where(own > 0, own / self.repetition, own * self.repetition)",
        "own / self.repetition", PROCESSORS, "a penalty makes negative logits likelier",
    ),
    Mutant(
        "engine/logits_processors.py", "torch.where(counts > 0, repeated, own)",
        "torch.where(counts > 1, repeated, own)", PROCESSORS, "the prompt isn't penalized",
    ),
    Mutant(
        "engine/logits_processors.py", "self.presence * (counts > 1)", "self.presence * (counts > 0)", PROCESSORS,
        "a prompt's tokens count as drawn",
    ),
    Mutant(
        "engine/logits_processors.py", "self.counts[_index([fork.copy.target for fork in forks], self.device)] = 0",
        "pass", "engine/test_invariants.py", "a slot's former sequence is counted, too",
    ),
    Mutant(
        "engine/logits_processors.py", "2 * running[self.penalized].int()", "2", PROCESSORS,
        "a sequence that has ended counts tokens",
    ),
    Mutant(
        "engine/logits_processors.py", "logits.to(torch.float32, copy=True)", "logits.float()", PROCESSORS,
        "log-probabilities are of the penalized logits",
    ),
    Mutant(
        "engine/executor.py", "self.seen.load(swap.slot, counts)", "pass", "engine/test_invariants.py",
        "a sequence comes back with another's counts",
    ),
    Mutant(
        "engine/executor.py", "if self._batch[0] is not slots:", "if self._batch[0] != slots:", PROCESSORS,
        "settings of a slot's former sequence",
    ),
    Mutant(
        "engine/sampling.py", "ascending * 2**32 - ids", "ascending * 2**32 + ids", PROCESSORS,
        "of equal tokens, the highest id comes first",
    ),
    Mutant(
        "engine/llm.py", "self._decode(params.min_tokens)", "pass", "engine/test_logits_processors.py",
        "a stop string ends a sequence before min_tokens",
    ),
    # drawing a token
    Mutant(
        "ops/cpu/sample_token.cpp", "if (passed + sums[b] > target) break;", "if (passed + sums[b] >= target) break;",
        "ops/test_sample_token.py", "a draw on a block's boundary",
    ),
    Mutant(
        "ops/cpu/sample_token.cpp", "if (passed > target) break;", "if (passed >= target) break;",
        "ops/test_sample_token.py", "a draw on a token's boundary",
    ),
    Mutant(
        "ops/reference.py", "(sums > uniform[:, None] * sums[:, -1:])", "(sums >= uniform[:, None] * sums[:, -1:])",
        "ops/test_sample_token.py", "a draw on a token's boundary",
    ),
    Mutant(
        "ops/reference.py", "(logits.float() - logits.float().amax(dim=-1, keepdim=True)) / heat",
        "logits.float() / heat", "ops/test_sample_token.py", "a low temperature overflows",
    ),
    # text
    Mutant(
        "engine/llm.py", "known - len(stop) + 1)", "known - len(stop) + 2)", "engine/test_llm.py",
        "a stop string is searched one character late",
    ),
    Mutant(
        "engine/llm.py", "min((position for position in found", "max((position for position in found",
        "engine/test_llm.py", "the latest stop string instead of the earliest",
    ),
    Mutant(
        "engine/llm.py", "len(self._decoded) - _begun(self._decoded, stops)", "len(self._decoded)",
        "engine/test_llm.py", "the beginning of a stop string is shown",
    ),
    Mutant(
        "engine/llm.py", "if sample.read():", "if sample.read() and not sample.sequence.done:", "engine/test_llm.py",
        "a stop string ended by the last token is a length",
    ),
    Mutant(
        "model/tokenizer.py", "skip_special_tokens=True", "skip_special_tokens=False", "engine/test_llm.py",
        "special tokens in texts",
    ),
    Mutant(
        "reasoning/solve.py", "prompt: ProblemPrompt = MATH", 'prompt: ProblemPrompt = ProblemPrompt("{problem}")',
        "reasoning/test_solve.py", "solve doesn't ask for a boxed answer",
    ),
    Mutant(
        "reasoning/voting.py", "(-math.fsum(weights[i] for i in spellings[s]), len(s), s)", "s",
        "reasoning/test_voting.py", "a cluster is named alphabetically",
    ),
    # metrics and intervals
    Mutant(
        "evaluation/metrics.py", "counts[1, leaders, spoken], 2 * leaders)", "counts[1, leaders, spoken], 2)",
        "evaluation/test_metrics.py", "each leader of a tie counts as if it had won",
    ),
    Mutant(
        "evaluation/metrics.py", "((2 * good > votes) + (2 * good >= votes))", "2 * (2 * good > votes)",
        "evaluation/test_metrics.py", "a class of which half is right is wrong",
    ),
    Mutant(
        "evaluation/metrics.py", "math.comb(silent, k - spoken)", "int(spoken == k)", "evaluation/test_metrics.py",
        "draws with silent samples are left out",
    ),
    Mutant(
        "evaluation/metrics.py", "max(1, most - undrawn)", "most", "evaluation/test_metrics.py",
        "only draws in which the largest class is whole",
    ),
    Mutant(
        "evaluation/curves.py", "majority_at_k([classes[:count]], [correct[:count]], count)",
        "majority_at_k([classes], [correct], count)", "evaluation/test_curves.py",
        "a budget's vote is of samples that came later",
    ),
    Mutant(
        "evaluation/intervals.py", "values = np.append(values, [lowest, highest])", "pass",
        "evaluation/test_intervals.py", "an interval without width",
    ),
    Mutant(
        "evaluation/intervals.py", "_student(len(values) - 1) *", "Z95 *", "evaluation/test_intervals.py",
        "the normal approximation",
    ),
    Mutant(
        "evaluation/intervals.py", "_interval(differences, -1.0, 1.0)", "_interval(differences, 0.0, 1.0)",
        "evaluation/test_intervals.py", "differences have the range of rates",
    ),
    Mutant(
        "evaluation/intervals.py", "        low, high = min(low, 0.0), max(high, 0.0)\n", "        pass\n",
        "evaluation/test_intervals.py", "an interval without 0 where p isn't below 0.05",
    ),
    Mutant(
        "evaluation/intervals.py", "        low = value - critical\n", "        pass\n", "evaluation/test_intervals.py",
        "an interval with 0 where p is below 0.05",
    ),
    Mutant(
        "evaluation/intervals.py", "differences = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)",
        "differences = np.sort(np.asarray(b, dtype=float)) - np.sort(np.asarray(a, dtype=float))",
        "evaluation/test_intervals.py", "problems aren't paired",
    ),
    Mutant(
        "evaluation/intervals.py", "means >= observed * (1 - ROUNDING)", "means > observed * (1 + ROUNDING)",
        "evaluation/test_intervals.py", "p leaves out what is as extreme",
    ),
    Mutant(
        "evaluation/intervals.py", "np.concatenate([[values.sum()], *(", "np.concatenate([*(",
        "evaluation/test_intervals.py", "p is 0 after finitely many draws",
    ),
    Mutant(
        "engine/engine.py", "            self.scheduler.reset()\n", "", "engine/test_engine.py",
        "an interrupted step leaves planned states in the prefix cache",
    ),
    # the end of the context
    Mutant(
        "engine/sequence.py", "if params.max_tokens <= room:", "if params.max_tokens < room:", "engine/test_engine.py",
        "a warning where everything fits",
    ),
    Mutant(
        "engine/engine.py", "len(tokens) >= self.max_model_len:", "len(tokens) > self.max_model_len:",
        "engine/test_engine.py", "a prompt without room for a token",
    ),
    Mutant(
        "evaluation/samplers.py", "context - len(p), limit", "context - len(p) + 1, limit",
        "evaluation/test_samplers.py", "transformers' samples are longer than the context",
    ),
    # caches and padding
    Mutant(
        "model/modeling.py", "return MAMBA in self.config.layer_types", "return False", "model/test_caches.py",
        "assisted generation with states that aren't rolled back",
    ),
    Mutant(
        "model/packing.py", "if any(getattr(layer, \"record_past\", False) for layer in cache.layers):", "if False:",
        "model/test_caches.py", "a cropped cache goes on with its old state",
    ),
    Mutant(
        "model/mixer.py", "window = real.sum(dim=1, keepdim=True)",
        "window = real.sum(dim=1, keepdim=True) * 0 + inputs.shape[-1]", "model/test_padding.py",
        "a cache keeps padding in its convolution",
    ),
    # checkpoints and layers
    Mutant(
        "model/official.py", "if value is not None}", "}", "model/test_official.py", "null is taken for a value",
    ),
    Mutant(
        "model/gguf.py", 'own.get("attention.key_length") or ', "", "model/test_gguf.py", "Qwen3's head size is lost",
    ),
    Mutant(
        "model/checkpoint.py", 'if table := config.get("quantization_config") or config.get("compression_config"):',
        "if table := None:", "faults/test_checkpoints.py", "quantized weights are read as plain ones",
    ),
    Mutant(
        "layer_choice.py", "int(last or first) + 1", "int(last or first)", "test_layer_choice.py",
        "a range without its end",
    ),
    # dtypes
    Mutant(
        "evaluation/time_budget.py", "len(set(dtypes.values())) > 1", "len(set(dtypes.values())) > 2",
        "evaluation/test_curves.py", "unlike dtypes are compared",
    ),
    Mutant(
        "train/data_mask.py", "end = min(ends, default=len(self.tail.rstrip()))", "end = 0", MASK,
        "answers are trained without their end token",
    ),
    Mutant(
        "train/data_mask.py", "if same and _holds(", "if same or _holds(", MASK,
        "earlier turns are trained without their thoughts",
    ),
    Mutant(
        "train/data_mask.py", "or not _holds(text[len(prompt) :], answer)", "", MASK,
        "a template drops the thought that should be trained",
    ),
    Mutant(
        "train/data_mask.py", "i >= max(first, 1)", "i >= 1", "train/test_data.py",
        "what the assistant says in a prompt is trained",
    ),
    Mutant(
        "train/sft.py", '"max_length": None', '"max_length": 1024', "train/test_data.py",
        "long answers lose their end",
    ),
    Mutant(
        "train/data_cache.py", '"chat_template": tokenizer.chat_template,', "", "train/test_data.py",
        "another chat template trains on the rows of the last one",
    ),
    Mutant(
        "train/grpo.py", "if length <= room]", "]", "train/test_data.py",
        "a prompt too long for the model stops RL in mid-run",
    ),
    Mutant(
        "train/trainer.py", "trainer.accelerator.unwrap_model(trainer.model).to(dtype)", "pass",
        "train/test_stages.py", "a stage saves in the dtype it trained in",
    ),
    Mutant(
        "model/mamba2.py", "F.silu(z)).to(z.dtype), ssm_state", "F.silu(z)), ssm_state", "engine/test_dtypes.py",
        "Mamba-2 returns float32 for bfloat16",
    ),
    Mutant(
        "ops/cpu/vector.h", "case 2: return f(f16{});", "case 2: return f(bf16{});", "ops/test_elementwise.py",
        "float16 read as bfloat16",
    ),
    Mutant(
        "ops/selective_scan.py", "if len(dtypes) == 1 and dtypes <= {*KERNEL_FLOATS}", "if len(dtypes) == 1",
        "ops/test_state_update.py", "a kernel gets a dtype that it doesn't know",
    ),
    # pages of states, and several servers
    Mutant(
        "ops/cpu/state_update.cpp", "p.step.ssm_state + slot * p.step.ssm_stride + channel * N",
        "p.step.ssm_state + (slot * channels + channel) * N", "ops/test_state_update.py",
        "states in pages are read as if they were in one piece",
    ),
    Mutant(
        "evaluation/endpoint.py", "jobs.put(job)\n                        return", "return",
        "evaluation/test_endpoints.py", "a server that dies takes its samples with it",
    ),
    Mutant(
        "evaluation/endpoint.py", "for round_ in job.rounds[len(choices) :]:", "for round_ in ():",
        "evaluation/test_endpoints.py", "a server that gives one choice of several loses the others",
    ),
    Mutant(
        "evaluation/merge.py", 'if (row["problem"], row["round"]) in rows:', "if False:",
        "evaluation/test_endpoints.py", "a sample counts twice in a merge",
    ),
    # training
    Mutant(
        "train/sft.py", "number = count if num_items_in_batch is None else num_items_in_batch",
        "number = count", "train/test_distill.py", "accumulated batches are weighed alike",
    ),
    Mutant(
        "train/distill.py", "if known.get(token) != i:", "if token not in known:", "train/test_distill.py",
        "a teacher whose tokens have other ids",
    ),
    Mutant(
        "train/chunked_loss.py", "with torch.autocast(states.device.type, enabled=False):", "if True:",
        "train/test_divergence.py", "logits rounded to bfloat16",
    ),
    Mutant(
        "train/divergence.py", "probabilities, total = probabilities / 2,", "total =", "train/test_divergence.py",
        "the gradient of JSD is twice too large",
    ),
    Mutant(
        "train/sft.py", "return self.accelerator.autocast()", "return super().autocast_smart_context_manager()",
        "train/test_distill.py", "mixed precision leaves out the teacher and the loss",
    ),
    Mutant(
        "train/align.py", "compiles = False", "compiles = True", "train/test_align.py", "layers with hooks compile",
    ),
    Mutant(
        "train/speed.py", "torch._dynamo.config.optimize_ddp = False", "pass", "train/test_speed.py",
        "DDP cuts the layers' graphs",
    ),
    Mutant(
        "model/mixer.py", "[..., :size]", "", "model/test_mixer.py", "padding of a product is taken for results",
    ),
    Mutant(
        "train/checkpoints.py", 'key=lambda path: int(path.name.split("-")[1]), reverse', "reverse",
        "train/test_safety.py", "checkpoint 9 comes after 10",
    ),
    Mutant(
        "train/checkpoints.py", "if sha256(checkpoint / name) != digest", "if not (checkpoint / name).exists()",
        "train/test_safety.py", "half of a checkpoint's file is taken for all of it",
    ),
    Mutant(
        "recipe.py", 'for name in ("", runs.MANIFEST, "config.json")', 'for name in ("", "config.json")',
        "train/test_safety.py", "a stage doesn't know that its model was trained again",
    ),
    Mutant(
        "train/stage_trainer.py", 'UNDECAYED = ("A_log", "D")', 'UNDECAYED = ("D",)', "train/test_safety.py",
        "A_log decays",
    ),
    Mutant(
        "train/distributed.py", "if left or not share or share % rows:", "if not share:", "train/test_distributed.py",
        "a batch that processes can't share is cut short",
    ),
    Mutant(
        "train/distributed.py", "_Unpickler(file).load()", "pass", "train/test_distributed.py",
        "a checkpoint's metadata runs code",
    ),
    Mutant(
        "train/plan.py", "if total > has:", "if False:", "train/test_plan.py", "a stage that can't fit is planned",
    ),
    Mutant(
        "train/stage_trainer.py", 'return not_finite(step, f"the {what} is {value}")', "pass", "train/test_safety.py",
        "a loss that isn't finite is let through",
    ),
    Mutant(
        "train/stage_trainer.py", "if self.accelerator.scaler is None:", "if False:", "train/test_safety.py",
        "a gradient norm that isn't finite is let through",
    ),
    # rotary frequencies
    Mutant(
        "engine/rotary.py", "lengths[:, None] > self.switch", "lengths[:, None] >= self.switch",
        "engine/test_rotary.py", "longrope switches one token early",
    ),
    Mutant(
        "engine/rotary.py", "lengths[:, None] > self.switch", "lengths.amax() > self.switch", "engine/test_rotary.py",
        "the longest row chooses every row's frequencies",
    ),
    Mutant(
        "engine/executor.py", "for x in (totals, slots)", "for x in (starts + lengths, slots)", "engine/test_rotary.py",
        "a chunk has the frequencies of its own end",
    ),
    Mutant(
        "engine/rotary.py", "rotary.original_inv_freq.float()", "rotary.inv_freq.float()", "engine/test_rotary.py",
        "frequencies of what the model has seen before",
    ),
    Mutant(
        "engine/runner.py", "if type(linear) not in LINEAR:", "if not isinstance(linear, nn.Linear):",
        "engine/test_dtypes.py", "adapters are left out in silence",
    ),
]  # fmt: skip


def notices(tree: Path, tests: list[str]) -> bool:
    """Whether a test fails in the tree."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "M1_CACHE": str(tree / "cache")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tree / "tests", env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest {' '.join(tests)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode == 1


def survivors(mutants: list[Mutant], root: Path = ROOT) -> list[Mutant]:
    """The mutants that no test notices. Nothing in `root` is changed.

    Raises:
        SystemExit: a text is not in its file exactly once, or a test fails without any mutation.
    """
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("src", "tests"):
            shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(root / "pyproject.toml", tree)
        if notices(tree, sorted({test for mutant in mutants for test in mutant.tests.split()})):
            raise SystemExit("the tests fail without any mutation")
        for mutant in mutants:
            path = tree / "src" / "m1" / mutant.file
            text = path.read_text()
            if text.count(mutant.original) != 1:
                raise SystemExit(f"{mutant.file} has {mutant.original!r} {text.count(mutant.original)} times, not once")
            path.write_text(text.replace(mutant.original, mutant.mutated))
            noticed = notices(tree, mutant.tests.split())
            path.write_text(text)
            print("killed  " if noticed else "SURVIVED", f"{mutant.file}: {mutant.why}", flush=True)
            if not noticed:
                survived.append(mutant)
    return survived


if __name__ == "__main__":
    words = sys.argv[1:]
    chosen = [m for m in MUTANTS if all(word in " ".join(m) for word in words)]
    left = survivors(chosen)
    print(f"{len(chosen) - len(left)} of {len(chosen)} mutants killed")
    sys.exit(bool(left) or not chosen)
