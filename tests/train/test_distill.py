"""Invariant 7 at this scope: the divergences equal hand-computed numbers; chunks and masks change nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_stages import CHAIN, TRAINER, distill_stage, metrics
from torch.nn.functional import kl_div

from m1.errors import UserError
from m1.model.checkpoint import load_model
from m1.train import distill
from m1.train.distill import arguments_of, check_vocabulary, distill_trainer, divergence, divergence_from_states


def test_by_hand():
    s, t = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    jsd = (
        0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3) + 0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)
    ) / 2
    for kind, expected in (("reverse_kl", reverse), ("forward_kl", forward), ("jsd", jsd)):
        assert divergence(s.log(), t.log(), kind).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_chunked_equals_dense_with_gradients(monkeypatch, kind):
    monkeypatch.setattr(distill, "CHUNK_TOKENS", 3)
    g = torch.Generator().manual_seed(0)
    states, head = torch.randn(10, 8, generator=g), torch.randn(20, 8, generator=g)
    teacher_states, teacher_head = torch.randn(10, 6, generator=g), torch.randn(20, 6, generator=g)
    results = []
    for chunked in (True, False):
        s, w = states.clone().requires_grad_(), head.clone().requires_grad_()
        if chunked:
            loss = divergence_from_states(s, w, teacher_states, teacher_head, kind)
        else:
            loss = divergence(s @ w.T, teacher_states @ teacher_head.T, kind).sum()
        results.append([loss, *torch.autograd.grad(loss, [s, w])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_kl_directions_against_torch():
    g = torch.Generator().manual_seed(1)
    s, t = torch.randn(5, 9, generator=g), torch.randn(5, 9, generator=g)
    expected = kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(divergence(s, t, "forward_kl"), expected)
    torch.testing.assert_close(divergence(t, s, "reverse_kl"), expected)


def test_logits_are_float32_under_autocast():
    """bfloat16 logits of a model against itself had a divergence twice as far from 0."""
    g = torch.Generator().manual_seed(2)
    states, head = (torch.randn(9, 16, generator=g).bfloat16(), torch.randn(40, 16, generator=g).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        loss = divergence_from_states(states, head, states + 0.01, head, "forward_kl")
    exact = divergence(states.double() @ head.double().T, (states + 0.01).double() @ head.double().T, "forward_kl")
    torch.testing.assert_close(loss, exact.sum(), rtol=1e-4, atol=1e-6, check_dtype=False)


def test_logits_exist_for_256_tokens_at_a_time(monkeypatch):
    """Seven float32 tensors of that size, 0.9 GiB for a vocabulary of 128,256. They are computed once."""
    sizes = []

    def seen(student_logits, teacher_logits, kind):
        sizes.append(len(student_logits))
        return divergence(student_logits, teacher_logits, kind)

    monkeypatch.setattr(distill, "divergence", seen)
    states, head = torch.randn(600, 8, requires_grad=True), torch.randn(20, 8)
    divergence_from_states(states, head, torch.randn(600, 8), head, "reverse_kl").backward()
    assert sizes == [256, 256, 88]


@pytest.mark.parametrize("trained", ["both", "states", "head", "none"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_gradients_are_those_of_whole_logits(kind, trained):
    g = torch.Generator().manual_seed(3)
    states, head, other = (torch.randn(*shape, generator=g) for shape in ((300, 8), (20, 8), (300, 6)))
    other_head, weight = torch.randn(20, 6, generator=g), torch.tensor(0.5)
    states.requires_grad_(trained in ("both", "states"))
    head.requires_grad_(trained in ("both", "head"))
    leaves = [leaf for leaf in (states, head) if leaf.requires_grad]
    losses = [
        divergence_from_states(states, head, other, other_head, kind),
        divergence(states @ head.T, other @ other_head.T, kind).sum(),
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(weight * loss, leaves) if leaves else () for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_an_evaluation_makes_no_gradients(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", None)
    states, head = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8)
    with torch.no_grad():
        loss = divergence_from_states(states, head, torch.randn(6, 8), head, "reverse_kl")
    assert loss.isfinite() and not loss.requires_grad


# Through the stage


def first_loss(model, teacher, out, trainer=None, **options):
    trainer = TRAINER | {"max_steps": 1, "learning_rate": 0.0} | (trainer or {})
    distill_stage(model, teacher, out, trainer, **options).run()
    return metrics(out)[0]["loss"]


def test_accumulated_batches_are_one_batch(hybrid_dir, teacher_dir, tmp_path):
    """The mean is over the tokens of all batches of a step: a short answer's tokens weigh no more than a long one's."""
    weights = []
    for size in (8, 1):
        trainer = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "optim": "sgd"}
        trainer |= {"learning_rate": 0.1, "lr_scheduler_type": "constant"}
        first_loss(hybrid_dir, teacher_dir, tmp_path / str(size), trainer)
        weights.append(load_file(tmp_path / str(size) / "model.safetensors"))
    before = load_model(hybrid_dir)[0].state_dict()
    assert max((weights[0][name] - before[name]).abs().max() for name in weights[0]) > 1e-3
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)


def padded(model, folder, rows):
    made, tokenizer = load_model(model)
    made.resize_token_embeddings(made.config.vocab_size + rows, mean_resizing=False)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_padding_rows_of_a_vocabulary_change_nothing(hybrid_dir, teacher_dir, tmp_path):
    """Qwen2.5-7B has 152,064 rows, its 3B sibling 151,936, and the same tokens."""
    plain = first_loss(hybrid_dir, teacher_dir, tmp_path / "plain")
    for name, models in {
        "teacher": (hybrid_dir, padded(teacher_dir, tmp_path / "t", 64)),
        "student": (padded(hybrid_dir, tmp_path / "s", 64), teacher_dir),
    }.items():
        assert first_loss(*models, tmp_path / name) == pytest.approx(plain, rel=1e-5)


def test_a_vocabulary_is_compared_by_content():
    """The same number of tokens, ids shifted by one: trained without a word."""
    student, teacher = (SimpleNamespace(get_vocab=lambda i=i: {"1": i, "2": i + 1}) for i in (16, 17))
    with pytest.raises(UserError, match="token '1' is 16 for the student and 17 for the teacher"):
        check_vocabulary(student, teacher, "a and b")
    more = SimpleNamespace(get_vocab=lambda: {"1": 16, "2": 17, "<tool>": 18})
    check_vocabulary(student, more, "a and b")
    with pytest.raises(UserError, match="token '<tool>' is 18 for the student and None"):
        check_vocabulary(more, student, "a and b")


def test_the_teacher_has_a_dtype_and_a_device_of_its_own(hybrid_dir, teacher_dir, tmp_path):
    stage = distill_stage(
        hybrid_dir, teacher_dir, tmp_path, TRAINER, teacher_dtype="float32", teacher_device="cpu", data=CHAIN
    )
    trainer = distill_trainer(stage, arguments_of(stage))
    batch = {"input_ids": torch.arange(12)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    exact = trainer.teacher.model(**batch).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(trainer.teacher_states(batch), exact)
        trainer.teacher_autocast = True
        assert 1e-4 < (trainer.teacher_states(batch) - exact).abs().max() < 0.2
    with pytest.raises(UserError, match="teacher_device='cuda:77'"):
        arguments_of(distill_stage("m", "t", tmp_path, TRAINER, teacher_device="cuda:77"))
