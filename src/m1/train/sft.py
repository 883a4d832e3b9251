"""Supervised fine-tuning with TRL, of a checkpoint or of a new small transformer (the pocket recipe's teacher)."""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from m1.errors import UserError
from m1.model.checkpoint import load_model
from m1.model.tokenizer import byte_tokenizer
from m1.recipe import SFTStage, check_keys
from m1.train import stage
from m1.train.data import conversations

DEFAULTS = {"assistant_only_loss": True}


def sft(recipe: SFTStage, resume: bool = False) -> None:
    """Trains on assistant tokens and saves to recipe.out. Raises UserError for bad input."""
    arguments = arguments_of(recipe)
    set_seed(arguments.seed)
    options = stage.model_options(recipe.trainer)
    if recipe.model:
        model, tokenizer = load_model(recipe.model, **options)
    else:
        model, tokenizer = new_transformer(recipe.init, **options)
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=conversations(recipe.data), processing_class=tokenizer
    )
    stage.run(trainer, recipe.out, recipe, resume)


def new_transformer(init: dict[str, Any], **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama of the given shape with fresh weights, and the byte tokenizer."""
    config, tokenizer = new_config(init)
    return AutoModelForCausalLM.from_config(config, **options), tokenizer


def new_config(init: dict[str, Any]) -> tuple[LlamaConfig, PreTrainedTokenizerBase]:
    """Raises UserError for an `[init]` that isn't a LlamaConfig."""
    check_keys(init, LlamaConfig.__dataclass_fields__, "[init]")
    tokenizer = byte_tokenizer(init.get("max_position_embeddings", 2048))
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    try:
        return LlamaConfig(**({"vocab_size": len(tokenizer)} | tokens | init)), tokenizer
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"[init]: {error.__cause__ or error}") from None


def arguments_of(recipe: SFTStage) -> SFTConfig:
    """Raises UserError for a `[trainer]` or `[init]` that can't be."""
    if recipe.init:
        new_config(recipe.init)
    return stage.trainer_arguments(SFTConfig, recipe.out, recipe.trainer, **DEFAULTS)
