"""Supervised fine-tuning with TRL, of a checkpoint or of a new small transformer (the pocket recipe's teacher)."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from m1.engine.engine import stop_tokens
from m1.errors import UserError
from m1.hub import checkpoint_folder
from m1.model.checkpoint import load_config, load_model, load_tokenizer, one_line
from m1.model.configuration import MODEL_TYPES, check_sizes
from m1.model.tokenizer import byte_tokenizer
from m1.options import check_keys
from m1.recipe import SFTStage, TaughtStage
from m1.train.cross_entropy import cross_entropy_from_states
from m1.train.data_cache import Preparation
from m1.train.data_mask import ChatEncoder
from m1.train.data_report import report
from m1.train.distributed import with_batch
from m1.train.stage_trainer import StageTrainer
from m1.train.trainer import eval_defaults, model_options, run_training, split, trainer_arguments

logger = logging.getLogger(__name__)

DEFAULTS = {"assistant_only_loss": True, "max_length": None}
# TRL's own preparation of data, which M1's takes the place of.
REPLACED = {
    "chat_template_path": "set `chat_template`",
    "completion_only_loss": "rows of `prompt` and `completion` train the completion",
    "dataset_text_field": "see docs/training.md for the formats of rows",
    "dataset_kwargs": "rows are always prepared",
    "truncation_mode": "set `overlong` in [data]",
}


def sft(stage: SFTStage, resume: bool = False, force: bool = False) -> None:
    """Trains on assistant tokens and saves to stage.out. Raises UserError for bad input."""
    run_training(stage, arguments_of(stage), sft_trainer, resume, force)


class Trainer(StageTrainer, SFTTrainer):
    """TRL's SFTTrainer with what all stages have in common, and a loss that waits for no other process.

    TRL's own gathers its metrics at each pass, where all GPUs wait for the slowest, and computes logits twice.

    Args:
        global_batch: rows per optimizer step. Rows that don't fill an epoch's last step are then left out: several
            processes would repeat other rows there, and the steps would depend on their number.
    """

    def __init__(self, *args: Any, global_batch: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        rows: Any = vars(self)["train_dataset"]
        if global_batch and isinstance(rows, Dataset):
            steps, left = divmod(len(rows), global_batch)
            if not steps:
                raise UserError(f"global_batch={global_batch}: the data has only {left} rows")
            if left:
                logger.info("%d of %d rows are left out: they don't fill a step", left, len(rows))
                self.train_dataset = rows.select(range(steps * global_batch))

    @property
    def computes_loss(self) -> bool:
        """Whether the loss is computed here. Others than `nll`, and those of models whose logits are more than a
        product with the head, are TRL's."""
        asked = self.label_smoother is not None or self.compute_loss_func is not None or self.args.loss_type != "nll"
        return not asked and self.accelerator.unwrap_model(self.model).config.model_type in MODEL_TYPES

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """Autocast for all of `compute_loss`. accelerate has it in the model's forward pass only, and so neither a
        teacher nor the loss."""
        return self.accelerator.autocast()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss, averaged over trained tokens."""
        if not self.computes_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.count_tokens(inputs)
        # the model's own forward, with its wrappers, runs for its last hidden states
        decoder = self.accelerator.unwrap_model(model).get_decoder()
        states, outputs = last_states(decoder, partial(model, **forward_arguments(inputs)))
        total, count = self.summed_loss(model, states, inputs)
        number = count if num_items_in_batch is None else num_items_in_batch
        loss = total / (number.to(total.device).clamp(min=1) if isinstance(number, Tensor) else max(number, 1))
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def summed_loss(self, model: nn.Module, states: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        """The sum of the loss over trained tokens, and their number. Notes what is logged.

        Args:
            model: the model, which may be wrapped.
            states: [b, T, H] its last hidden states.
            inputs: the batch.
        """
        positions, labels = trained_positions(inputs)
        head = self.accelerator.unwrap_model(model).get_output_embeddings().weight
        loss, entropy, correct = cross_entropy_from_states(states.flatten(0, 1)[positions], head, labels)
        self.note("entropy", entropy, len(positions))
        self.note("mean_token_accuracy", correct, len(positions))
        return loss, len(positions)

    def note(self, name: str, total: Tensor, count: int) -> None:
        """Notes a sum and how many numbers it is of, for the mean that is logged."""
        mode = "train" if self.model.training else "eval"
        # filled on the device: a copy would wait for it
        self._metrics[mode][name].append(torch.stack([total.detach(), torch.full_like(total, count)]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as TRL does, with the means of what was noted since the last log, in all processes.

        The sums are read now, which waits for a GPU once.
        """
        for values in self._metrics["train" if self.model.training else "eval"].values():
            if isinstance(values[0], Tensor):
                total, count = self.accelerator.reduce(torch.stack(values).sum(dim=0)).tolist()
                values[:] = [total / max(count, 1)]
        super().log(logs, start_time)


def trained_positions(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Of a batch [b, T], the flat positions whose next token is trained, and these tokens.

    It is a step's only wait for a GPU, so call it once the forward passes are on their way.
    """
    labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100).flatten()
    positions = (labels != -100).nonzero().squeeze(1)
    return positions, labels[positions]


def forward_arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model's forward pass on a batch, for its states alone: it makes logits of one position."""
    return {k: v for k, v in inputs.items() if k != "labels"} | {"use_cache": False, "logits_to_keep": 1}


def last_states(decoder: nn.Module, forward: Callable[[], Any]) -> tuple[Tensor, Any]:
    """Runs a model's forward pass. Returns the last hidden states of its decoder, behind the last norm, and its output.

    `output_hidden_states` would keep those of all layers.
    """
    found: list[Tensor] = []
    hook = decoder.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    try:
        output = forward()
    finally:
        hook.remove()
    return found[0], output


def sft_trainer(stage: SFTStage, arguments: SFTConfig) -> Trainer:
    """The stage's trainer, with model and data."""
    options = model_options(stage.trainer)
    if stage.model:
        model, tokenizer = load_model(stage.model, **options)
    else:
        model, tokenizer = new_transformer(stage.init, **options)
    rows, held_out = split(training_rows(stage, arguments, tokenizer, model), stage.eval_rows, arguments.seed)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        mixer_lr_scale=stage.mixer_lr_scale,
        shard=stage.shard,
        global_batch=stage.global_batch,
    )


def training_rows(
    stage: SFTStage | TaughtStage, arguments: SFTConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> Dataset | IterableDataset:
    """The tokenized rows of a stage. Logs a report on them, and changes `arguments` so that TRL takes rows as they are.

    Args:
        stage: the stage.
        arguments: its trainer's.
        tokenizer: gets the stage's chat template.
        model: its context is the default of `max_length`.

    Raises:
        UserError: as `Preparation.run`.
    """
    preparation = preparation_of(stage, arguments, tokenizer, model.config.max_position_embeddings)
    prepared = preparation.run()
    logger.info("%s", report(prepared, preparation))
    end = preparation.encoder.end
    if not set(tokenizer(end, add_special_tokens=False).input_ids) & set(stop_tokens(model, tokenizer)):
        logger.warning("answers end with %r, which doesn't stop generation: name it in generation_config.json", end)
    arguments.max_length = preparation.max_length if arguments.packing else None
    arguments.assistant_only_loss = False
    return prepared.rows


def preparation_of(
    stage: SFTStage | TaughtStage, arguments: SFTConfig, tokenizer: PreTrainedTokenizerBase, context: int
) -> Preparation:
    """How the rows of a stage are prepared, if the model's context has so many tokens. Raises UserError without a chat
    template that can be used."""
    stage.use_chat_template(tokenizer)
    encoder = ChatEncoder(tokenizer, arguments.assistant_only_loss)
    return Preparation(stage.data, encoder, arguments.max_length or context)


def data_report(stage: SFTStage | TaughtStage, samples: int) -> tuple[str, np.ndarray]:
    """A report on a stage's rows with `samples` of them, and all rows' lengths. Raises UserError as `training_rows`."""
    if isinstance(stage, SFTStage) and stage.init:
        config, tokenizer = new_config(stage.init)
    else:
        folder = checkpoint_folder(str(stage.model))
        config, tokenizer = load_config(folder, MODEL_TYPES), load_tokenizer(folder)
    preparation = preparation_of(stage, arguments_of(stage), tokenizer, config.max_position_embeddings)
    prepared = preparation.run()
    return report(prepared, preparation, samples), prepared.lengths


def new_transformer(init: dict[str, Any], **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Makes a Llama with new weights of an `[init]` table, and the byte tokenizer. Raises UserError as `new_config`."""
    config, tokenizer = new_config(init)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options), tokenizer


def new_config(init: dict[str, Any]) -> tuple[LlamaConfig, PreTrainedTokenizerBase]:
    """The LlamaConfig of an `[init]` table, and the byte tokenizer. Raises UserError if it isn't a LlamaConfig."""
    check_keys(init, LlamaConfig.__dataclass_fields__, "[init]")
    with one_line("[init]"):
        check_sizes(init)
        tokenizer = byte_tokenizer(init.get("max_position_embeddings", 2048))
        tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        config = LlamaConfig(**({"vocab_size": len(tokenizer)} | tokens | init))
        check_sizes(config)
    return config, tokenizer


def arguments_of(stage: SFTStage | TaughtStage) -> SFTConfig:
    """The trainer's arguments. Raises UserError for an invalid `[trainer]` or `[init]`."""
    for key, instead in REPLACED.items():
        if key in stage.trainer:
            raise UserError(f"[trainer] {key}: M1 prepares the rows itself; remove the key ({instead})")
    if isinstance(stage, SFTStage) and stage.init:
        new_config(stage.init)
    defaults = DEFAULTS | eval_defaults(stage)
    if stage.data.streaming:
        defaults["dataloader_num_workers"] = 0  # each worker would read the stream
    arguments = trainer_arguments(SFTConfig, stage.out, with_batch(SFTConfig, stage), **defaults)
    if stage.data.streaming and arguments.max_steps < 1:
        raise UserError("[data] streaming needs max_steps in [trainer]: a stream's length isn't known")
    if stage.data.streaming and stage.eval_rows:
        raise UserError(f"eval_rows={stage.eval_rows}: no rows can be held out of a stream; remove it or streaming")
    return arguments
