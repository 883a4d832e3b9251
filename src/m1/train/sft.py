"""Supervised fine-tuning with TRL, of a checkpoint or of a new small transformer (the pocket recipe's teacher)."""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from m1.errors import UserError
from m1.model.checkpoint import load_model
from m1.model.tokenizer import byte_tokenizer
from m1.options import check_keys
from m1.recipe import SFTStage
from m1.train.data import conversations
from m1.train.stage_trainer import StageTrainer
from m1.train.trainer import eval_defaults, model_options, run_training, split, trainer_arguments

DEFAULTS = {"assistant_only_loss": True}


def sft(stage: SFTStage, resume: bool = False, force: bool = False) -> None:
    """Trains on assistant tokens and saves to stage.out. Raises UserError for bad input."""
    run_training(stage, arguments_of(stage), sft_trainer, resume, force)


class Trainer(StageTrainer, SFTTrainer):
    """TRL's SFTTrainer with what all stages have in common."""


def sft_trainer(stage: SFTStage, arguments: SFTConfig) -> Trainer:
    """The stage's trainer, with model and data."""
    options = model_options(stage.trainer)
    if stage.model:
        model, tokenizer = load_model(stage.model, **options)
    else:
        model, tokenizer = new_transformer(stage.init, **options)
    rows, held_out = split(conversations(stage.data), stage.eval_rows, arguments.seed)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        mixer_lr_scale=stage.mixer_lr_scale,
    )


def new_transformer(init: dict[str, Any], **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Makes a Llama with new weights of an `[init]` table, and the byte tokenizer. Raises UserError as `new_config`."""
    config, tokenizer = new_config(init)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options), tokenizer


def new_config(init: dict[str, Any]) -> tuple[LlamaConfig, PreTrainedTokenizerBase]:
    """The LlamaConfig of an `[init]` table, and the byte tokenizer. Raises UserError if it isn't a LlamaConfig."""
    check_keys(init, LlamaConfig.__dataclass_fields__, "[init]")
    tokenizer = byte_tokenizer(init.get("max_position_embeddings", 2048))
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    try:
        return LlamaConfig(**({"vocab_size": len(tokenizer)} | tokens | init)), tokenizer
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"[init]: {error.__cause__ or error}") from None


def arguments_of(stage: SFTStage) -> SFTConfig:
    """The trainer's arguments. Raises UserError for an invalid `[trainer]` or `[init]`."""
    if stage.init:
        new_config(stage.init)
    return trainer_arguments(SFTConfig, stage.out, stage.trainer, **DEFAULTS, **eval_defaults(stage))
