"""The masked-response loss, against values worked out by hand and against full logits."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsft.loss import MicroBatch, TargetHead, count_targets, make_micro_batch, summed_loss


def row(tokens, targets):
    return np.array(tokens, np.int32), np.array(targets, bool)


class Head(nn.Module):
    """A model whose logits are its embedding of the token: vocabulary 3, logits chosen by the test."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.tensor(logits), freeze=False)
        self.head = nn.Identity()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.head(self.table(input_ids)))


def test_the_loss_is_the_sum_of_what_the_targets_cost():
    model = Head([[0.0, 0.0, 0.0], [math.log(2.0), 0.0, 0.0], [0.0, math.log(6.0), 0.0]])
    batch = make_micro_batch([row([0, 1, 2, 0], [0, 0, 1, 1])], pad_token=0)
    # after token 1: probabilities (2, 1, 1) / 4, token 2 follows; after token 2: (1, 6, 1) / 8, token 0 follows
    loss = summed_loss(model, TargetHead(model), batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(4.0) + math.log(8.0), rel=1e-6)


def test_the_loss_is_float32_where_logits_are_bfloat16():
    model = Head([[0.0, 1.0, 2.0]] * 3).to(torch.bfloat16)
    batch = make_micro_batch([row([0, 1, 2], [0, 1, 1])], pad_token=0)
    loss = summed_loss(model, TargetHead(model), batch)
    normaliser = math.log(1 + math.e + math.e**2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2 * normaliser - 1 - 2, rel=1e-6)


def test_positions_point_before_the_targets_and_labels_are_the_targets():
    batch = make_micro_batch([row([5, 6, 7, 8], [0, 0, 1, 1]), row([9, 3], [0, 1])], pad_token=2)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 3, 2, 2]]
    assert batch.positions.tolist() == [1, 2, 4]
    assert batch.labels.tolist() == [7, 8, 3]
    assert batch.tokens == 6
    assert {t.dtype for t in (batch.input_ids, batch.positions, batch.labels)} == {torch.int64}


def test_a_target_with_the_pad_tokens_id_counts_and_padding_does_not():
    batch = make_micro_batch([row([5, 6, 2], [0, 1, 1]), row([2, 2], [0, 1])], pad_token=2)
    assert batch.labels.tolist() == [6, 2, 2]
    assert batch.positions.tolist() == [0, 1, 3]


def test_a_rows_first_token_is_predicted_by_nothing():
    tokens, mask = row([7, 8, 9], [1, 0, 1])
    assert count_targets(mask) == 1
    assert make_micro_batch([(tokens, mask)], 0).labels.tolist() == [9]


def test_the_count_of_targets_is_the_number_of_labels():
    masks = [[0, 1, 1], [1, 1, 0, 0], [0, 0], [1]]
    rows = [row(range(len(mask)), mask) for mask in masks]
    assert [count_targets(mask) for _, mask in rows] == [2, 1, 0, 0]
    assert len(make_micro_batch(rows, 0).labels) == 3


def test_rows_of_the_token_cache_are_copied_not_changed():
    tokens, mask = row([5, 6], [0, 1])
    tokens.flags.writeable = False
    batch = make_micro_batch([(tokens, mask)], 0)
    batch.input_ids[0, 0] = 99
    assert tokens.tolist() == [5, 6]


def test_a_micro_batch_moves_whole():
    batch = make_micro_batch([row([5, 6], [0, 1])], 0).to(torch.device("meta"))
    assert {t.device.type for t in (batch.input_ids, batch.positions, batch.labels)} == {"meta"}
    assert batch.tokens == 2


@pytest.fixture
def model(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_an_empty_micro_batch_gives_loss_zero_and_zero_gradients(model):
    batch = make_micro_batch([], pad_token=2)
    assert (batch.input_ids.tolist(), batch.tokens, len(batch.positions)) == ([[2]], 0, 0)
    loss = summed_loss(model, TargetHead(model), batch)
    loss.backward()
    assert loss.item() == 0.0
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()  # none is missing: every backward is collective
    assert all(not gradient.any() for gradient in found.values())


def uneven_batch(vocabulary: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], MicroBatch]:
    rng = np.random.default_rng(0)
    rows = []
    for length in (31, 3, 17, 2, 24):
        mask = rng.random(length) < 0.4
        mask[0], mask[-1] = False, True
        rows.append((rng.integers(0, vocabulary, length).astype(np.int32), mask))
    return rows, make_micro_batch(rows, pad_token=2)


def test_the_target_head_gives_the_loss_and_gradients_of_full_logits(model):
    rows, batch = uneven_batch(model.config.vocab_size)
    reference = torch.zeros(())
    for tokens, mask in rows:  # each row alone, unpadded, over all positions
        ids = torch.from_numpy(tokens).long()[None]
        labels = torch.where(torch.from_numpy(mask), ids[0], -100)
        logits = model(input_ids=ids).logits[0]
        reference = reference + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
    reference.backward()
    expected = gradients(model)
    model.zero_grad()

    loss = summed_loss(model, TargetHead(model), batch)
    loss.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_the_head_runs_on_target_positions_only_and_only_within_the_loss(model):
    _, batch = uneven_batch(model.config.vocab_size)
    seen = []
    head = TargetHead(model)
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    summed_loss(model, head, batch)
    with torch.no_grad():
        full = model(input_ids=batch.input_ids).logits
    vocabulary = model.config.vocab_size
    assert seen == [(1, len(batch.labels), vocabulary), (5, 31, vocabulary)]
    assert tuple(full.shape) == (5, 31, vocabulary)


def test_a_forward_that_fails_leaves_no_positions_behind(model):
    _, batch = uneven_batch(model.config.vocab_size)
    head = TargetHead(model)
    with pytest.raises(RuntimeError, match="stopped"), head.only(batch.positions):
        raise RuntimeError("stopped")
    assert model(input_ids=batch.input_ids).logits.shape[:2] == (5, 31)
