"""Supervised fine-tuning with TRL, of a checkpoint or of a new small transformer (the pocket recipe's teacher)."""

from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from m1.errors import UserError
from m1.model.tokenizer import byte_tokenizer
from m1.recipe import SFTStage, check_keys
from m1.train import stage
from m1.train.data import conversations

DEFAULTS = {"assistant_only_loss": True}


def sft(recipe: SFTStage, resume: bool = False) -> None:
    """Trains on assistant tokens and saves to recipe.out. Raises UserError for bad input."""
    arguments = stage.trainer_arguments(SFTConfig, recipe.out, recipe.trainer, **DEFAULTS)
    set_seed(arguments.seed)
    options = stage.model_options(recipe.trainer)
    if recipe.model:
        model, tokenizer = stage.load_model(recipe.model, **options)
    else:
        model, tokenizer = new_transformer(recipe.init, **options)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=conversations(recipe.data),
        processing_class=tokenizer,
    )
    stage.run(trainer, recipe.out, recipe, resume)


def new_transformer(init: dict[str, Any], **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama of the given shape with fresh weights, and the byte tokenizer."""
    check_keys(init, LlamaConfig.__dataclass_fields__, "[init]")
    tokenizer = byte_tokenizer(init.get("max_position_embeddings", 2048))
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    try:
        config = LlamaConfig(**({"vocab_size": len(tokenizer)} | tokens | init))
    except (TypeError, ValueError) as error:
        raise UserError(f"[init]: {error}") from None
    return AutoModelForCausalLM.from_config(config, **options), tokenizer
