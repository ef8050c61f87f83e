"""The masked-response loss, against values worked out by hand and against full logits."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, FalconH1Config, Gemma2Config, GraniteConfig, LlamaConfig

from dsft import loss as loss_module
from dsft.dataset.folding import fold
from dsft.dataset.micro_batches import MicroBatch, packed, padded
from dsft.loss import ChunkedLoss, TargetHead, summed_loss

PROPERTY = settings(deadline=None, database=None)


def row(tokens, targets):
    return np.array(tokens, np.int32), np.array(targets, bool)


def side_by_side(rows, pad_token=0) -> MicroBatch:
    """Each row by itself, padded."""
    return padded([fold([one]) for one in rows], pad_token)


class Head(nn.Module):
    """A model whose logits are its embedding of the token: vocabulary 3, logits chosen by the test."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.tensor(logits), freeze=False)
        self.head = nn.Identity()
        self.config = LlamaConfig(vocab_size=3, num_hidden_layers=1)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.head(self.table(input_ids)))


def test_the_loss_is_the_sum_of_what_the_targets_cost():
    model = Head([[0.0, 0.0, 0.0], [math.log(2.0), 0.0, 0.0], [0.0, math.log(6.0), 0.0]])
    batch = side_by_side([row([0, 1, 2, 0], [0, 0, 1, 1])])
    # after token 1: probabilities (2, 1, 1) / 4, token 2 follows; after token 2: (1, 6, 1) / 8, token 0 follows
    loss = summed_loss(model, TargetHead(model), batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(4.0) + math.log(8.0), rel=1e-6)


def test_a_target_of_several_rows_costs_as_often():
    model = Head([[0.0, 0.0, 0.0], [math.log(2.0), 0.0, 0.0], [0.0, math.log(6.0), 0.0]])
    rows = [row([0, 1, 2, 0], [0, 0, 1, 1]), row([0, 1, 2], [0, 0, 1]), row([0, 1], [0, 0])]
    loss = summed_loss(model, TargetHead(model), padded([fold(rows)], 0))
    assert loss.item() == pytest.approx(2 * math.log(4.0) + math.log(8.0), rel=1e-6)


@pytest.mark.parametrize(
    "make", [lambda rows, weights: padded([fold(rows, weights)], 0), lambda *a: packed([fold(*a)])]
)
def test_the_weights_of_rows_are_those_of_their_targets(make):
    rows = [row([0, 1, 2, 0], [0, 0, 1, 1]), row([0, 1, 2], [0, 0, 1]), row([0, 1], [0, 1])]
    batch = make(rows, np.array([0.5, 3.0, 0.25]))
    assert dict(zip(batch.labels.tolist(), batch.loss_weights.tolist(), strict=True)) == {1: 0.25, 2: 3.5, 0: 0.5}


def test_the_loss_is_float32_where_logits_are_bfloat16():
    model = Head([[0.0, 1.0, 2.0]] * 3).to(torch.bfloat16)
    loss = summed_loss(model, TargetHead(model), side_by_side([row([0, 1, 2], [0, 1, 1])]))
    normaliser = math.log(1 + math.e + math.e**2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2 * normaliser - 1 - 2, rel=1e-6)


def test_positions_point_before_the_targets_and_labels_are_the_targets():
    batch = side_by_side([row([5, 6, 7, 8], [0, 0, 1, 1]), row([9, 3], [0, 1])], pad_token=2)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 3, 2, 2]]
    assert batch.logit_positions.tolist() == [1, 2, 4]
    assert batch.labels.tolist() == [7, 8, 3]
    assert batch.loss_weights.tolist() == [1, 1, 1]
    assert {t.dtype for t in (batch.input_ids, batch.logit_positions, batch.labels)} == {torch.int64}
    assert batch.loss_weights.dtype == torch.float32
    assert (batch.position_ids, batch.tree) == (None, None)


def test_a_target_after_a_branch_is_predicted_from_its_parent():
    rows = [row([5, 6, 7, 8], [0, 0, 1, 1]), row([5, 6, 9], [0, 0, 1]), row([5, 6, 9], [0, 0, 1])]
    batch = packed([fold(rows)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.logit_positions.tolist() == [1, 2, 1]
    assert batch.labels.tolist() == [7, 8, 9]
    assert batch.loss_weights.tolist() == [1, 1, 2]


def test_a_target_with_the_pad_tokens_id_counts_and_padding_does_not():
    batch = side_by_side([row([5, 6, 2], [0, 1, 1]), row([2, 2], [0, 1])], pad_token=2)
    assert batch.labels.tolist() == [6, 2, 2]
    assert batch.logit_positions.tolist() == [0, 1, 3]


def test_a_tokenizer_without_a_pad_token_pads_with_any():
    assert side_by_side([row([5, 6], [0, 1]), row([5], [0])], pad_token=None).input_ids.tolist() == [[5, 6], [5, 0]]


def test_a_rows_first_token_is_predicted_by_nothing():
    for make in (packed, lambda folded: padded(folded, 0)):
        assert make([fold([row([7, 8, 9], [1, 0, 1])])]).labels.tolist() == [9]


def test_rows_of_the_token_cache_are_copied_not_changed():
    tokens, mask = row([5, 6], [0, 1])
    tokens.flags.writeable = False
    for batch in (side_by_side([(tokens, mask)]), packed([fold([(tokens, mask)])])):
        batch.input_ids[0, 0] = 99
    assert tokens.tolist() == [5, 6]


def test_a_micro_batch_moves_whole():
    batch = side_by_side([row([5, 6], [0, 1])]).to(torch.device("meta"))
    assert {t.device.type for t in (batch.input_ids, batch.logit_positions, batch.labels, batch.loss_weights)} == {
        "meta"
    }
    folded = packed([fold([row([5, 6], [0, 1])])]).to(torch.device("meta"))
    assert folded.position_ids.device.type == "meta"
    assert folded.tree is not None


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def uneven_rows(vocabulary: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    rows = []
    for length in (31, 3, 17, 2, 24):
        mask = rng.random(length) < 0.4
        mask[0], mask[-1] = False, True
        rows.append((rng.integers(0, vocabulary, length).astype(np.int32), mask))
    return rows


def plain_loss(model, rows) -> torch.Tensor:
    """Each row alone, unpadded, over all positions."""
    total = torch.zeros(())
    for tokens, mask in rows:
        ids = torch.from_numpy(tokens).long()[None]
        labels = torch.where(torch.from_numpy(mask), ids[0], -100)
        logits = model(input_ids=ids).logits[0]
        total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
    return total


@pytest.mark.parametrize("at_once", [2**25, 49_152 * 3, 1], ids=["whole", "three", "one"])
def test_the_target_head_gives_the_loss_and_gradients_of_full_logits(model, at_once, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
    rows = uneven_rows(model.config.vocab_size)
    reference = plain_loss(model, rows)
    reference.backward()
    expected = gradients(model)
    model.zero_grad()

    head = TargetHead(model)
    assert head.is_chunked
    loss = summed_loss(model, head, side_by_side(rows, pad_token=2))
    assert head.is_chunked
    loss.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_logits_are_whole_outside_the_loss_and_never_exist_within(model):
    batch = side_by_side(uneven_rows(model.config.vocab_size))
    seen = []
    head = TargetHead(model)
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    summed_loss(model, head, batch)
    with torch.no_grad():
        full = model(input_ids=batch.input_ids).logits
    assert seen == [(), (5, 31, model.config.vocab_size)]
    assert tuple(full.shape) == (5, 31, model.config.vocab_size)


def test_a_forward_that_fails_leaves_no_batch_behind(model):
    batch = side_by_side(uneven_rows(model.config.vocab_size))
    head = TargetHead(model)
    with pytest.raises(RuntimeError, match="stopped"), head.computing(batch):
        raise RuntimeError("stopped")
    assert model(input_ids=batch.input_ids).logits.shape[:2] == (5, 31)


# The head and cross-entropy together

sizes = st.integers(1, 12)


@PROPERTY
@given(st.integers(0, 12), sizes, sizes, st.booleans(), st.integers(1, 40), st.integers(0, 2**16))
def test_the_chunked_loss_is_cross_entropy(targets, hidden_size, vocabulary, has_bias, at_once, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, requires_grad=True)
        for shape in ((targets, hidden_size), (vocabulary, hidden_size), (vocabulary,))
    )
    labels = torch.randint(0, vocabulary, (targets,), generator=generator)
    weights = torch.randint(1, 5, (targets,), generator=generator).float()
    used = [hidden, weight, bias] if has_bias else [hidden, weight]
    costs = F.cross_entropy(F.linear(hidden, weight, bias if has_bias else None), labels, reduction="none")
    expected = (costs * weights).sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
        found, losses = ChunkedLoss.apply(hidden, weight, bias if has_bias else None, labels, weights)
    torch.testing.assert_close(losses, costs.detach())
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found * 3, used), torch.autograd.grad(expected * 3, used), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_only_what_is_trained_gets_a_gradient():
    hidden, weight, bias = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3), torch.randn(5)
    loss, _ = ChunkedLoss.apply(hidden, weight, bias, torch.tensor([0, 1, 2, 3]), torch.ones(4))
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    frozen, _ = ChunkedLoss.apply(hidden.detach(), weight, bias, torch.tensor([0, 1, 2, 3]), torch.ones(4))
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, loss.detach())


def test_the_chunked_loss_in_bfloat16_is_as_exact_as_bfloat16_is(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 64).to(torch.bfloat16).requires_grad_() for n in (50, 300))
    labels, weights = torch.randint(0, 300, (50,)), torch.ones(50)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum")
    expected.backward()
    for at_once in (2**25, 300 * 7):
        monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
        hidden.grad = weight.grad = None
        found, _ = ChunkedLoss.apply(hidden, weight, None, labels, weights)
        found.backward()
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(expected.item(), rel=2e-3)
        for ours, theirs in zip((hidden, weight), exact, strict=True):
            assert ours.grad.dtype == torch.bfloat16
            assert (ours.grad.double() - theirs.grad).abs().max() < 0.02 * theirs.grad.abs().max()


# Models that change their logits after the head

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
CHANGED = {
    "granite": GraniteConfig(**SMALL, logits_scaling=8.0),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "gemma2": Gemma2Config(**SMALL, final_logit_softcapping=0.5, sliding_window=8),
    "falcon_h1": FalconH1Config(**SMALL, **MAMBA, lm_head_multiplier=3.0),
}


@pytest.fixture
def small_rows():
    return uneven_rows(40)


def built(config) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def check_against_full_logits(model, head, rows):
    model.zero_grad()
    reference = plain_loss(model, rows)
    reference.backward()
    expected = gradients(model)
    model.zero_grad()
    loss = summed_loss(model, head, side_by_side(rows))
    loss.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * max(expected[name].abs().max(), 1e-3), name


@pytest.mark.parametrize("family", CHANGED)
def test_a_model_that_changes_its_logits_keeps_its_loss(family, small_rows):
    model = built(CHANGED[family])
    head = TargetHead(model)
    assert not head.is_chunked
    check_against_full_logits(model, head, small_rows)


def test_a_neutral_scale_does_not_keep_the_loss_from_being_computed_in_chunks(small_rows):
    model = built(GraniteConfig(**SMALL, logits_scaling=1.0))
    head = TargetHead(model)
    check_against_full_logits(model, head, small_rows)
    assert head.is_chunked


@pytest.mark.parametrize("family", ["granite", "cohere", "gemma2"])
def test_logits_changed_by_a_setting_that_nobody_knows_are_noticed_at_the_first_forward(
    family, small_rows, monkeypatch
):
    monkeypatch.setattr(loss_module, "SCALED_LOGITS", ())
    model = built(CHANGED[family])
    head = TargetHead(model)
    assert head.is_chunked
    check_against_full_logits(model, head, small_rows)
    assert not head.is_chunked
    check_against_full_logits(model, head, small_rows[:2])


def test_a_head_with_lora_or_a_bias_keeps_its_loss(small_rows):
    from peft import LoraConfig, get_peft_model

    model = built(LlamaConfig(**SMALL))
    model.lm_head = nn.Linear(16, 40)
    head = TargetHead(model)
    check_against_full_logits(model, head, small_rows)
    assert head.is_chunked
    wrapped = get_peft_model(
        built(LlamaConfig(**SMALL)), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    )
    head = TargetHead(wrapped)
    check_against_full_logits(wrapped, head, small_rows)
    assert not head.is_chunked
