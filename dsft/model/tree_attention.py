"""Attention over folded rows: every token sees its ancestors in the prefix tree and itself.

On CPU the tree is cut into blocks of tokens that have their ancestors in common, and each block is one call of
scaled-dot-product attention on exactly the keys that it may see: no work is spent on other dialogues, and a dialogue
without branches is a plain causal call. On CUDA FlexAttention skips what the mask rules out.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from dsft.errors import UserError

NAME = "dsft_tree"
DENSE_BLOCK = 128  # tokens; smaller subtrees share one masked call
REPLACED = ("auto", "sdpa", "flex_attention")  # implementations that compute the same as ours
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some models ask of attention beside a mask
FORGETFUL = ("nemotron",)  # kinds of models whose layers do not hand arguments on to attention


def why_no_trees(model: Any, attn_implementation: str) -> str | None:
    """Why a model's attention cannot take the structure of a tree; None where it can.

    Args:
        model: of transformers, not yet wrapped.
        attn_implementation: the flag.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    parameters = inspect.signature(model.forward).parameters
    if attn_implementation not in REPLACED:
        return f"--attn_implementation is {attn_implementation}"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} has an attention of its own"
    if kinds or getattr(config, "sliding_window", None) is not None:
        return f"{type(model).__name__} has {', '.join(sorted(kinds)) or 'sliding-window attention'}"
    if "position_ids" not in parameters or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return f"{type(model).__name__}.forward takes no positions, or no arguments for attention"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{type(model).__name__} caps the logits of attention"
    if config.model_type in FORGETFUL:
        return f"{type(model).__name__} keeps arguments from its attention"
    if any(
        name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        for name, module in model.named_modules()
    ):
        return f"{type(model).__name__} counts positions from its pad token"
    return None


@dataclass(frozen=True)
class Block:
    """Consecutive tokens whose ancestors outside the block are the same.

    length: tokens
    ancestors: earlier blocks, root first, of which its tokens see everything
    mask: bool [length, tokens of all ancestors + length], what they see; None where that is all before them
    """

    length: int
    ancestors: tuple[int, ...]
    mask: torch.Tensor | None


class Tree:
    """The attention structure of one packed micro-batch, in the form that the device's kernel wants."""

    def __init__(self, subtree_end: np.ndarray, parent: np.ndarray) -> None:
        self.subtree_end = torch.from_numpy(subtree_end)
        self._parent = parent
        self.blocks: list[Block] = []
        self.block_mask: Any = None
        self.uses = 0  # calls of attention that have followed it
        self.asked: set[str] = set()  # what they were asked to do and did not

    def check_use(self, layers: int) -> None:
        """To be called after a forward: the model's layers may not have followed the structure.

        Raises:
            UserError: some did not, so what they computed is wrong.
        """
        problem = ""
        if self.asked:
            problem = f"this model's attention needs {', '.join(sorted(self.asked))}"
        elif self.uses < layers:
            problem = f"{layers - self.uses} of this model's {layers} layers do not follow folded rows"
        if problem:
            raise UserError(f"{problem}; choose --attn_implementation eager, which folds only what needs no mask")

    def to(self, device: torch.device) -> "Tree":
        """Build what attention on this device needs."""
        if device.type == "cuda":
            self.block_mask = flex_block_mask(self.subtree_end.to(device))
        else:
            self.blocks = list(cut_into_blocks(self.subtree_end.numpy(), self._parent))
        return self


def flex_block_mask(subtree_end: torch.Tensor) -> Any:
    """FlexAttention's block mask of a tree. subtree_end: int64 [tokens], see dsft.dataset.folding."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query < subtree_end[key])

    length = len(subtree_end)
    return create_block_mask(sees, None, None, length, length, device=str(subtree_end.device))


def cut_into_blocks(subtree_end: np.ndarray, parent: np.ndarray, dense: int = DENSE_BLOCK) -> Iterator[Block]:
    """The blocks of a forest in the order of its tokens.

    A subtree of at most `dense` tokens lies in one block, with small siblings beside it. A larger one is a block of the
    tokens before its first branch, then the blocks of its branches.

    Args:
        subtree_end: int64 [tokens], see dsft.dataset.folding.
        parent: int64 [tokens], likewise.
        dense: tokens.
    """
    index = np.arange(len(parent))
    goes_on = (parent == index - 1) & (subtree_end == np.roll(subtree_end, 1)) & (index > 0)
    run_ends = np.append(np.flatnonzero(~goes_on)[1:], len(parent))  # of tokens without a branch between them
    starts = [0]  # of the blocks so far, and of the next
    waiting: list[tuple[int, int, tuple[int, ...]]] = [(0, len(parent), ())]  # begin, end, ancestors
    while waiting:
        begin, end, ancestors = waiting.pop()
        start, here = begin, begin
        while here < end:
            after = int(subtree_end[here])
            if after - start > dense and here > start:
                break  # the small siblings before it are a block
            if after - here > dense:
                run_end = int(run_ends[np.searchsorted(run_ends, here, side="right")])
                waiting.append((after, end, ancestors))
                waiting.append((run_end, after, (*ancestors, len(starts) - 1)))
                here = end = run_end
                break
            here = after
        else:
            end = here
        if here < end:
            waiting.append((here, end, ancestors))
        if here > start:
            known = sum(starts[a + 1] - starts[a] for a in ancestors)
            yield Block(here - start, ancestors, _mask(subtree_end, parent, start, here, known))
            starts.append(here)


def _mask(subtree_end: np.ndarray, parent: np.ndarray, start: int, end: int, known: int) -> torch.Tensor | None:
    index = np.arange(start, end)
    plain = bool((parent[start + 1 : end] == index[:-1]).all())
    if plain and known == 0:
        return None
    seen = (index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[start:end][None, :])
    return torch.from_numpy(np.concatenate([np.ones((end - start, known), bool), seen], axis=1))


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree: Tree | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Transformers' attention interface; `tree` comes from the keyword arguments of the model's forward.

    query is [1, heads, tokens, head size]; key and value have fewer heads where those are grouped. `tree` is the
    structure of the tokens; without one this is transformers' own scaled-dot-product attention.
    """
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    tree.uses += 1
    tree.asked |= {name for name in UNKNOWN if kwargs.get(name) is not None}
    if tree.block_mask is not None:
        return flex_attention_forward(module, query, key, value, tree.block_mask, scaling, dropout=dropout)
    groups = query.shape[1] // key.shape[1]
    sizes = [block.length for block in tree.blocks]
    queries = query.split(sizes, dim=2)
    keys = repeat_kv(key, groups).split(sizes, dim=2)
    values = repeat_kv(value, groups).split(sizes, dim=2)
    outputs = []
    for index, block in enumerate(tree.blocks):
        path = (*block.ancestors, index)
        outputs.append(
            F.scaled_dot_product_attention(
                queries[index],
                torch.cat([keys[i] for i in path], dim=2) if len(path) > 1 else keys[index],
                torch.cat([values[i] for i in path], dim=2) if len(path) > 1 else values[index],
                attn_mask=block.mask,
                dropout_p=dropout,
                is_causal=block.mask is None,
                scale=scaling,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, tree_attention)
