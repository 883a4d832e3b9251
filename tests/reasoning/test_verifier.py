"""Reward models as verifiers, on tiny random ones made by transformers."""

import pytest
import torch
from checkpoints import save_checkpoint
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from m1.errors import UserError
from m1.model.tokenizer import byte_tokenizer
from m1.reasoning.verifier import RewardModel, bound_of, vote_weights


def tiny_reward_model(num_labels=1):
    tokenizer = byte_tokenizer()
    torch.manual_seed(num_labels)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, num_labels=num_labels, initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize("num_labels", [1, 2])
def test_scores_are_those_of_the_chats(tmp_path, num_labels):
    save_checkpoint(tiny_reward_model(num_labels), tmp_path)
    verifier = vote_weights(str(tmp_path))
    scores = verifier("1+1", ["It is 2.", "3"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for text, score in zip(["It is 2.", "3"], scores, strict=True):
        chat = byte_tokenizer()(f"<|user|>1+1<|end|><|assistant|>{text}<|end|>", return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=chat.input_ids).logits[0]
        chance = logits.sigmoid()[0] if num_labels == 1 else logits.softmax(0)[1]
        assert score == pytest.approx(chance.item(), rel=1e-5)
    assert scores[0] != scores[1] and bound_of(verifier) == 1.0


def test_names_that_are_weights_already():
    assert vote_weights("uniform") == "uniform" and bound_of("logprob") == 1.0
    assert bound_of(lambda problem, texts: [1.0]) is None


def test_what_is_no_reward_model(tmp_path, teacher_dir):
    with pytest.raises(UserError, match=r"is not a reward model: it has no tensor 'score.weight'"):
        vote_weights(str(teacher_dir))
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        vote_weights(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="has 3 outputs"):
        RewardModel(tiny_reward_model(3), byte_tokenizer())
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        RewardModel(tiny_reward_model(), tokenizer)
    with pytest.raises(UserError, match=r"a sample has 104 tokens for the reward model, whose context is 64"):
        RewardModel(tiny_reward_model(), byte_tokenizer())("", ["x" * 100])
