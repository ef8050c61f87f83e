"""Attention over folded rows: the same numbers as row by row, or a refusal."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from dsft.dataset.folding import attention_mask, fold, pack
from dsft.dataset.micro_batches import MicroBatches, MicroBatchOptions, packed
from dsft.errors import UserError
from dsft.loss import TargetHead, source_losses, summed_loss
from dsft.model import tree_attention as tree_attention_module
from dsft.model.flops import Cost
from dsft.model.tree_attention import (
    NAME,
    Tree,
    cut_into_blocks,
    flex_block_mask,
    flex_length,
    tree_attention,
    tree_unsupported_reason,
)
from tests.helpers import token_dataset

CPU = torch.device("cpu")
PROPERTY = settings(deadline=None, database=None, max_examples=150)
TOKENS = st.lists(st.integers(3, 5), min_size=1, max_size=10)
FORESTS = st.lists(st.lists(TOKENS, min_size=1, max_size=7), min_size=1, max_size=3)
DENSE = st.sampled_from([1, 2, 3, 4, 6, 10, 128])


def forest(groups):
    """Each group one tree or several, side by side, as one micro-batch has them."""
    return pack([fold([(np.array(row, np.int32), np.ones(len(row), bool)) for row in rows]) for rows in groups])


def mask_of(blocks) -> np.ndarray:
    """What the blocks let each token see, as a whole mask."""
    mask = np.zeros((blocks[-1].end, blocks[-1].end), bool)
    for block in blocks:
        for start, end in block.ancestors:
            mask[block.start : block.end, start:end] = True
        count = block.end - block.start
        causal = np.tril(np.ones((count, count), bool))  # what no mask means
        mask[block.start : block.end, block.start : block.end] = causal if block.mask is None else block.mask.numpy()
    return mask


@PROPERTY
@given(FORESTS, DENSE)
@example([[[3, 3, 3], [3, 3, 4], [3, 4], [4]]], 1)
@example([[[3] * 10, [3] * 5 + [4] * 5, [3] * 5 + [5] * 5]], 2)
def test_blocks_let_every_token_see_what_the_mask_says(groups, dense):
    folded = forest(groups)
    blocks = list(cut_into_blocks(folded.subtree_end, folded.parent, dense))
    assert [block.start for block in blocks] == [0, *(block.end for block in blocks[:-1])]
    assert blocks[-1].end == len(folded)
    for block in blocks:
        bounds = [bound for part in (*block.ancestors, (block.start, block.end)) for bound in part]
        assert bounds == sorted(bounds)
        assert all(start < end for start, end in block.ancestors)
    assert (mask_of(blocks) == attention_mask(folded)).all()


@settings(deadline=None, database=None, max_examples=20)
@given(st.integers(0, 2**16), st.sampled_from([8, 32, 128]))
def test_blocks_of_dialogues_of_a_real_size(seed, dense):
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(3):
        rows, history = [], rng.integers(3, 90, rng.integers(1, 80)).tolist()
        for _ in range(rng.integers(1, 6)):
            thinking, answer, user = (rng.integers(3, 90, rng.integers(1, 60)).tolist() for _ in range(3))
            rows.append(history + thinking + answer)
            history = history + answer + user
        groups.append(rows)
    folded = forest(groups)
    assert (mask_of(list(cut_into_blocks(folded.subtree_end, folded.parent, dense))) == attention_mask(folded)).all()


def test_a_chain_is_one_plain_causal_block():
    folded = forest([[[3] * n for n in (2, 500, 300)]])
    [block] = cut_into_blocks(folded.subtree_end, folded.parent)
    assert (block.start, block.end, block.ancestors, block.mask) == (0, 500, (), None)


def test_no_work_is_spent_on_other_dialogues():
    folded = forest([[[3] * 300], [[4] * 300], [[5] * 200]])
    blocks = list(cut_into_blocks(folded.subtree_end, folded.parent))
    assert [(block.start, block.end, block.ancestors, block.mask) for block in blocks] == [
        (0, 300, (), None), (300, 600, (), None), (600, 800, (), None),
    ]  # fmt: skip


# FlexAttention, which has no backward pass on CPU


def whole_blocks(folded) -> Tree:
    return Tree(folded.subtree_end, folded.parent).filled(flex_length(len(folded)))


def large_forest(seed: int, tokens: int):
    """Random rows with shared beginnings, about so many tokens."""
    random = np.random.default_rng(seed)
    groups, total = [], 0
    while total < tokens:
        base = random.integers(0, 9, random.integers(20, 200)).tolist()
        cuts = random.integers(1, len(base), random.integers(1, 5)).tolist()
        groups.append([[*base[:cut], *random.integers(0, 9, random.integers(1, 150)).tolist()] for cut in cuts])
        total += sum(map(len, groups[-1]))
    return forest(groups)


@pytest.mark.parametrize("seed", range(12))
def test_the_block_mask_is_that_of_all_pairs(seed):
    folded = large_forest(seed, 150 * (1 + seed))
    tree = whole_blocks(folded)
    found = flex_block_mask(tree._subtree_end, CPU)
    expected = create_block_mask(found.mask_mod, None, None, len(tree), len(tree), device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    assert torch.equal(found.to_dense(), expected.to_dense())
    index = torch.arange(len(folded))
    seen = found.mask_mod(0, 0, index[:, None], index[None, :])
    assert (seen.numpy() == attention_mask(folded)).all()


def test_lengths_are_whole_blocks():
    assert [flex_length(tokens) for tokens in (1, 256, 257, 1000)] == [256, 256, 384, 1024]


def test_flex_attention_with_grouped_heads_gives_the_loss_of_single_rows(monkeypatch):
    def to(tree, _device):
        tree.block_mask = flex_block_mask(tree._subtree_end, CPU)
        return tree

    monkeypatch.setattr(Tree, "to", to)
    monkeypatch.setattr(tree_attention_module, "compiled_flex_attention", lambda: flex_attention)
    model, rows = built("Llama", {}), made_rows()
    expected = per_row(model, rows)
    model.set_attn_implementation(NAME)
    batch = packed([fold(rows[:5]), fold(rows[5:])])
    batch = batch.filled(flex_length(len(batch.tree))).to(CPU)
    with torch.no_grad():
        loss = summed_loss(model, TargetHead(model), batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("trained", ["qkv", "qv"], ids=["LoRA on all layers", "LoRA on q and v"])
def test_random_trees_are_compiled_at_most_four_times(trained, monkeypatch):
    """50 of them, training and validation in turn; in the first layer only what LoRA is on needs a gradient."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    compilations = []

    def counting(graph, _inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    attend = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=counting)
    for step in range(50):
        tree = whole_blocks(large_forest(step, 20 + 12 * step))
        block_mask = flex_block_mask(tree._subtree_end, CPU)
        with torch.set_grad_enabled(step % 2 == 0):
            for layer in range(2):
                query, key, value = (
                    torch.ones(1, heads, len(tree), 4, requires_grad=layer > 0 or name in trained)
                    for name, heads in (("q", 2), ("k", 1), ("v", 1))
                )
                output = attend(query, key, value, block_mask=block_mask, scale=0.5, enable_gqa=True)
                if output.requires_grad:
                    output.sum().backward()
    assert 1 <= len(compilations) <= 4


class Waits(TorchDispatchMode):
    """Notes the operations for whose result a GPU would have to finish all that came before."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_in_a_micro_batch():
    """Of a tree; for padded rows, transformers asks once per forward whether they are packed."""
    model = built("Llama", {}).train()
    model.set_attn_implementation(NAME)
    head, batch = TargetHead(model), packed([fold(made_rows())]).to(CPU)
    summed_loss(model, head, batch)  # the first one checks how the head computes
    with Waits() as waits:
        loss = summed_loss(model, head, batch)
        loss.backward()
        source_losses(head, batch)
    assert waits.found == []
    with waits:
        loss.item()
    assert waits.found == ["_local_scalar_dense"]


def test_heads_that_flex_attention_refuses_fold_chains_on_cuda():
    model = built("Llama", {})
    reason = tree_unsupported_reason(model, "auto", torch.device("cuda"))
    assert reason == "LlamaForCausalLM has heads of size 4, and FlexAttention needs 16"


# The function itself


@settings(deadline=None, database=None, max_examples=60)
@given(
    FORESTS, DENSE, st.sampled_from([1, 2, 3, 256]), st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]), st.booleans(),
    st.integers(0, 2**16),
)  # fmt: skip
def test_outputs_and_gradients_are_those_of_masked_softmax(groups, dense, tile, heads, scaled, seed):
    folded = forest(groups)
    size, scaling = 4, 0.3 if scaled else None
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, count, len(folded), size, dtype=torch.float64, generator=generator, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    )
    tree = Tree(folded.subtree_end, folded.parent)
    tree.blocks = list(cut_into_blocks(folded.subtree_end, folded.parent, dense))
    with mock.patch.object(tree_attention_module, "TILE", tile):
        found, _ = tree_attention(nn.Module(), query, key, value, None, scaling=scaling, tree=tree)
        towards = torch.randn(found.shape, dtype=torch.float64, generator=generator)
        ours = torch.autograd.grad(found, (query, key, value), towards)

    groups_of_heads = heads[0] // heads[1]
    keys, values = (t.repeat_interleave(groups_of_heads, dim=1) for t in (key, value))
    scores = query @ keys.transpose(2, 3) * (scaling or 1 / math.sqrt(size))
    scores = scores.masked_fill(~torch.from_numpy(attention_mask(folded)), -torch.inf)
    expected = (scores.softmax(dim=-1) @ values).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    theirs = torch.autograd.grad(expected, (query, key, value), towards)
    torch.testing.assert_close(ours, theirs)


def test_without_a_tree_it_is_plain_causal_attention():
    query, key, value = (torch.randn(2, 2, 7, 4, dtype=torch.float64) for _ in range(3))
    causal = nn.Module()
    causal.is_causal = True
    found, _ = tree_attention(causal, query, key, value, None)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2))


# Models

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = {"head_dim": 4}
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FOLLOW = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": HEADS,
    "Qwen3Moe": HEADS | EXPERTS,
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0},
    "Mistral": {"sliding_window": None},
    "Mixtral": {"sliding_window": None} | EXPERTS,
    "Phi": {},
    "Phi3": {"sliding_window": None},
    "Gemma": HEADS,
    "Granite": {"logits_scaling": 4.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5},
    "Cohere": {"logit_scale": 0.25},
    "Olmo2": {},
    "SmolLM3": {},
    "Helium": HEADS,
    "DeepseekV3": LATENT,
}
REFUSED = {
    "sliding window": ("Mistral", {"sliding_window": 8}, "MistralForCausalLM has sliding-window attention"),
    "some layers slide": ("Gemma2", HEADS | {"sliding_window": 8}, "Gemma2ForCausalLM has sliding_attention"),
    "capped logits": (
        "Gemma2", HEADS | {"sliding_window": None, "layer_types": ["full_attention"] * 2},
        "Gemma2ForCausalLM caps the logits of attention",
    ),
    "chunks": ("Llama4Text", HEADS | EXPERTS, "Llama4ForCausalLM has chunked_attention"),
    "sinks": ("GptOss", HEADS | {"sliding_window": 8} | EXPERTS, "GptOssForCausalLM has sliding_attention"),
    "convolutions": (
        "Lfm2", {"layer_types": ["conv", "full_attention"]}, "Lfm2ForCausalLM has conv",
    ),
    "state space": ("Mamba", {}, "MambaForCausalLM has an attention of its own"),
    "ALiBi": ("Bloom", {"n_layer": 2, "n_head": 4}, "BloomForCausalLM has an attention of its own"),
    "arguments dropped": ("Nemotron", HEADS, "NemotronForCausalLM does not pass arguments to its attention"),
    "dropout": ("Llama", {"attention_dropout": 0.1}, "config.json sets attention_dropout"),
    "dropout by default": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 4}, "config.json sets attn_pdrop"),
    "positions from 1": (
        "Roberta", {"is_decoder": True, "attention_probs_dropout_prob": 0.0},
        "RobertaForCausalLM counts positions from its pad token",
    ),
}  # fmt: skip


def built(family: str, settings: dict) -> nn.Module:
    """A tiny model whose attention matters: weights large enough that every token changes what follows."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SMALL | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    return model


def made_rows(seed=0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Turns of a dialogue, the like without its thinking, two answers to a prompt, a row twice, and one alone."""
    rng = np.random.default_rng(seed)
    base = rng.integers(3, 40, 24).tolist()
    shapes = [(6, 5), (11, 4), (15, 0), (15, 6), (20, 3), (24, 4), (11, 7)]
    rows = [base[:kept] + rng.integers(3, 40, more).tolist() for kept, more in shapes]
    rows += [rows[0], rng.integers(3, 40, 9).tolist()]
    return [(np.array(row, np.int32), np.arange(len(row)) >= len(row) // 2) for row in rows]


def per_row(model, rows) -> torch.Tensor:
    """The summed loss, each row by itself, unfolded, by full logits."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens, is_target in rows:
        ids, mask = torch.tensor(tokens).long()[None], torch.tensor(is_target)[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1][mask]
        total = total + F.cross_entropy(logits.double(), ids[0, 1:][mask], reduction="sum")
    return total


def gradients_of(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance=1e-5) -> None:
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("family", FOLLOW)
def test_a_model_of_this_family_gives_folded_rows_the_loss_and_gradients_of_single_ones(family, monkeypatch):
    monkeypatch.setattr(cut_into_blocks, "__defaults__", (8,))  # several blocks, though the rows are short
    model = built(family, FOLLOW[family])
    assert tree_unsupported_reason(model, "auto", CPU) is None
    rows = made_rows()
    expected = per_row(model, rows)
    wanted = gradients_of(model, expected)
    model.set_attn_implementation(NAME)
    head = TargetHead(model)
    loss = summed_loss(model, head, packed([fold(rows[:5]), fold(rows[5:])]).to(CPU))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients_of(model, loss), wanted, 2e-5)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma"])
def test_each_target_costs_what_it_costs_in_its_row(family):
    model = built(family, FOLLOW[family])
    rows = made_rows()
    folded = fold(rows)
    model.set_attn_implementation(NAME)
    batch = packed([folded]).to(CPU)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, tree=batch.tree).logits[0]
        mask = attention_mask(folded)
        for index in range(len(folded)):
            beginning = torch.from_numpy(folded.tokens[np.flatnonzero(mask[index])]).long()
            alone = model(input_ids=beginning[None]).logits[0, -1]
            torch.testing.assert_close(logits[index], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_cannot_follow_a_tree_is_refused(what):
    family, settings, reason = REFUSED[what]
    assert tree_unsupported_reason(built(family, settings), "auto", CPU) == reason


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2", "paged|sdpa"])
def test_an_attention_that_the_user_chose_is_kept(implementation):
    assert (
        tree_unsupported_reason(built("Llama", {}), implementation, CPU) == f"--attn_implementation is {implementation}"
    )


@pytest.mark.parametrize("implementation", ["auto", "sdpa", "flex_attention"])
def test_an_attention_that_computes_the_same_is_replaced(implementation):
    assert tree_unsupported_reason(built("Llama", {}), implementation, CPU) is None


def test_layers_that_do_not_follow_the_tree_are_noticed_at_the_first_forward():
    """As in a model of which nobody knows that it drops the argument."""
    model = built("Nemotron", HEADS)
    model.set_attn_implementation(NAME)
    head = TargetHead(model)
    rows = made_rows()
    with pytest.raises(UserError) as caught:
        summed_loss(model, head, packed([fold(rows)]).to(CPU))
    assert str(caught.value) == (
        "2 of this model's 2 layers do not follow folded rows; "
        "use --attn_implementation eager, which folds only what needs no mask"
    )


def test_what_attention_is_asked_beside_the_tree_is_noticed_at_the_first_forward():
    model = built("Gemma2", HEADS | {"sliding_window": 64})
    model.set_attn_implementation(NAME)
    with pytest.raises(UserError, match=r"^this model's attention needs softcap; use --attn_implementation eager"):
        summed_loss(model, TargetHead(model), packed([fold(made_rows())]).to(CPU))


def test_dropout_of_attention_under_an_unknown_name_is_not_passed_over():
    model = built("Llama", {})
    model.set_attn_implementation(NAME)
    head, batch = TargetHead(model), packed([fold(made_rows())]).to(CPU)
    summed_loss(model, head, batch)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    summed_loss(model, head, batch)  # in evaluation nothing is dropped
    with pytest.raises(UserError, match=r"^this model drops attention weights.*; use --attn_implementation eager"):
        summed_loss(model.train(), head, batch)


# Whatever the rows


@pytest.fixture(scope="module")
def llama():
    return built("Llama", {})


WITH_TARGETS = st.lists(
    st.lists(st.tuples(st.integers(3, 5), st.booleans()), min_size=1, max_size=12).map(lambda row: [*row, (6, True)]),
    min_size=1, max_size=10,
)  # fmt: skip
APART = [[(10 + i, False), (3, True), (20 + i, True)] for i in range(4)]
TWICE = [[(3, False), (4, True)]] * 3 + [[(3, False), (4, True), (5, False), (6, True)]] * 2
ANSWERS = [[(3, False), (4, False), (i, True), (i + 1, True)] for i in range(5, 12)]


@settings(deadline=None, database=None, max_examples=60)
@given(WITH_TARGETS, st.sampled_from([(True, True), (True, False)]), st.integers(1, 3), st.integers(0, 40), DENSE)
@example(APART, (True, True), 1, 40, 4)
@example(TWICE, (True, True), 2, 0, 1)
@example(TWICE, (True, False), 2, 0, 1)
@example(ANSWERS, (True, True), 1, 40, 128)
@example(ANSWERS, (True, False), 1, 40, 128)
def test_any_rows_in_any_micro_batches_give_the_loss_and_gradients_of_single_rows(
    llama, rows, fold_and_trees, ranks, slack, dense
):
    pairs = [([t for t, _ in row], [m for _, m in row]) for row in rows]
    data = token_dataset(pairs)
    reference = per_row(llama, [data[row] for row in range(len(data))])
    wanted = gradients_of(llama, reference)
    budget = int(data.lengths.max()) + slack
    batches = MicroBatches(data, MicroBatchOptions(ranks, budget, *fold_and_trees), Cost(10, 1, 5), 0)
    head = TargetHead(llama)
    total = torch.zeros(())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut_into_blocks, "__defaults__", (dense,))
        llama.set_attn_implementation(NAME if fold_and_trees[1] else "sdpa")
        try:
            for part in [part for parts in batches.plan(np.arange(len(data))).parts for part in parts]:
                total = total + summed_loss(llama, head, batches.make(part).to(CPU))
            found = gradients_of(llama, total)
        finally:
            llama.set_attn_implementation("sdpa")
    assert total.item() == pytest.approx(reference.item(), rel=1e-5)
    assert_same(found, wanted)
