"""Attention over folded rows: every token attends to its ancestors in the prefix tree and itself.

On CPU the tree is cut into blocks of tokens whose ancestors are the same, and each block attends to exactly the keys it
may see: no work is spent on other dialogues. The products are plain matrix products on tiles of queries, in bfloat16 up
to twice as fast as torch's fused kernel for CPU (scripts/bench_kernels.py). On CUDA it is FlexAttention, which skips
what the block mask rules out.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dsft.errors import UserError
from dsft.model.library_internals import has_attention_interface, softmax_backward

NAME = "dsft_tree"
DENSE_BLOCK = 128  # tokens; smaller subtrees are one block with a mask
TILE = 256  # queries at once
FLEX_BLOCK = 128  # tokens, FlexAttention's default
SMALLEST_HEAD = 16  # that FlexAttention's kernels for CUDA take
REPLACED = ("auto", "sdpa", "flex_attention")  # implementations that compute the same as ours
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # arguments of attention, in some models, besides a mask
DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")  # of attention weights
DROP_ARGUMENTS = ("nemotron",)  # model types whose layers do not pass arguments on to attention


def tree_unsupported_reason(model: Any, attn_implementation: str, device: torch.device) -> str | None:
    """Why the attention of a transformers model, not yet wrapped, cannot follow a tree; None if it can."""
    config, name = model.config.get_text_config(), type(model).__name__
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    parameters = inspect.signature(model.forward).parameters
    dropouts = [setting for setting in DROPOUTS if getattr(config, setting, None)]
    if attn_implementation not in REPLACED:
        return f"--attn_implementation is {attn_implementation}"
    if not has_attention_interface(model):
        return f"{name} has an attention of its own"
    if kinds or getattr(config, "sliding_window", None) is not None:
        return f"{name} has {', '.join(sorted(kinds)) or 'sliding-window attention'}"
    if "position_ids" not in parameters or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return f"{name}.forward takes no position_ids, or no arguments for attention"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{name} caps the logits of attention"
    if dropouts:
        return f"config.json sets {dropouts[0]}"
    if device.type == "cuda":
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if size < SMALLEST_HEAD:
            return f"{name} has heads of size {size}, and FlexAttention needs {SMALLEST_HEAD}"
    if config.model_type in DROP_ARGUMENTS:
        return f"{name} does not pass arguments to its attention"
    if any(
        path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        for path, module in model.named_modules()
    ):
        return f"{name} counts positions from its pad token"
    return None


@dataclass(frozen=True)
class Block:
    """Consecutive tokens with the same ancestors outside the block."""

    start: int
    end: int
    ancestors: tuple[tuple[int, int], ...]  # ranges of earlier tokens; each token of the block attends to all of them
    mask: torch.Tensor | None  # bool [tokens, tokens], attention within the block; None if causal


class Tree:
    """The attention structure of one packed micro-batch, in the form that the device's kernel needs."""

    def __init__(self, subtree_end: np.ndarray, parent: np.ndarray) -> None:
        """subtree_end, parent: int64 [tokens], see dsft.dataset.folding."""
        self._subtree_end, self._parent = subtree_end, parent
        self.blocks: list[Block] = []
        self.block_mask: BlockMask | None = None
        self.uses = 0  # calls of attention that followed it
        self.ignored: set[str] = set()  # arguments of these calls that were ignored

    def check_use(self, layers: int) -> None:
        """To be called after a forward: the model's layers may have ignored the tree.

        Raises:
            UserError: some did, so what they computed is wrong.
        """
        problem = ""
        if self.ignored:
            problem = f"this model's attention needs {', '.join(sorted(self.ignored))}"
        elif self.uses < layers:
            problem = f"{layers - self.uses} of this model's {layers} layers do not follow folded rows"
        if problem:
            raise UserError(f"{problem}; use --attn_implementation eager, which folds only what needs no mask")

    def __len__(self) -> int:
        return len(self._parent)

    def filled(self, length: int) -> "Tree":
        """With tokens at the end, up to `length`, that attend to themselves alone."""
        more = np.arange(len(self), length)
        return Tree(
            np.concatenate([self._subtree_end, more + 1]), np.concatenate([self._parent, np.full_like(more, -1)])
        )

    def to(self, device: torch.device) -> "Tree":
        """Build what attention on this device needs."""
        if device.type == "cuda":
            self.block_mask = flex_block_mask(self._subtree_end, device)
        else:
            self.blocks = list(cut_into_blocks(self._subtree_end, self._parent))
        return self


def flex_length(tokens: int) -> int:
    """The next length of whole blocks, at least two: other lengths would each be compiled anew."""
    return max(2, -(-tokens // FLEX_BLOCK)) * FLEX_BLOCK


def flex_block_mask(subtree_end: np.ndarray, device: torch.device) -> BlockMask:
    """FlexAttention's block mask of a tree; subtree_end: int64 [tokens], whole blocks, see dsft.dataset.folding.

    torch's create_block_mask computes the mask of all pairs of tokens. In a tree, the queries that see a key are those
    from the key itself to the end of its subtree. So some query of a block sees some key of another unless it begins
    after the last subtree's end, and all of a later block see all keys if it ends by the first one's.
    """
    count = len(subtree_end) // FLEX_BLOCK
    ends = subtree_end.reshape(count, FLEX_BLOCK)
    query, key = np.arange(count)[:, None], np.arange(count)[None, :]
    seen = (query >= key) & (query * FLEX_BLOCK < ends.max(axis=1))
    whole = (query > key) & ((query + 1) * FLEX_BLOCK <= ends.min(axis=1))
    end = torch.from_numpy(subtree_end).to(device)

    def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query < end[key])

    def listed(blocks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """How many key blocks each query block has, and their numbers first: int32 [1, 1, blocks (, blocks)]."""
        numbers = np.argsort(~blocks, axis=1, kind="stable")
        found = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (blocks.sum(axis=1), numbers))
        counts, order = (x[None, None] for x in found)
        return counts, order

    lengths = (len(subtree_end), len(subtree_end))
    return BlockMask.from_kv_blocks(
        *listed(seen & ~whole), *listed(whole), BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees, seq_lengths=lengths
    )


@cache
def compiled_flex_attention() -> Callable[..., torch.Tensor]:
    """Compiled for any length at once.

    transformers' own wrapper is compiled anew for lengths and for which inputs need a gradient, up to dynamo's limit;
    then it silently takes a kernel that holds all scores. Here that limit is an error.
    """
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def cut_into_blocks(subtree_end: np.ndarray, parent: np.ndarray, dense: int = DENSE_BLOCK) -> Iterator[Block]:
    """The blocks of a forest in the order of its tokens.

    A subtree of at most `dense` tokens is in one block, with small siblings next to it. A larger one is a block of the
    tokens before its first branch, then the blocks of its branches. subtree_end, parent: see dsft.dataset.folding.
    """
    index = np.arange(len(parent))
    continues = (parent == index - 1) & (subtree_end == np.roll(subtree_end, 1)) & (index > 0)
    run_ends = np.append(np.flatnonzero(~continues)[1:], len(parent))  # of tokens without a branch between them
    waiting: list[tuple[int, int, tuple[tuple[int, int], ...]]] = [(0, len(parent), ())]  # start, end, ancestors
    while waiting:
        start, end, ancestors = waiting.pop()
        if start == end:
            continue
        here = start
        while here < end and int(subtree_end[here]) - start <= dense:  # small siblings are one block
            here = int(subtree_end[here])
        if here == start:
            here, after = int(run_ends[np.searchsorted(run_ends, start, side="right")]), int(subtree_end[start])
            waiting += [(after, end, ancestors), (here, after, _joined(ancestors, start, here))]
        else:
            waiting.append((here, end, ancestors))
        yield Block(start, here, ancestors, _mask(subtree_end, parent, start, here))


def _joined(ranges: tuple[tuple[int, int], ...], start: int, end: int) -> tuple[tuple[int, int], ...]:
    if ranges and ranges[-1][1] == start:
        return (*ranges[:-1], (ranges[-1][0], end))
    return (*ranges, (start, end))


def _mask(subtree_end: np.ndarray, parent: np.ndarray, start: int, end: int) -> torch.Tensor | None:
    index = np.arange(start, end)
    if (parent[start + 1 : end] == index[:-1]).all():
        return None
    return torch.from_numpy((index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[start:end][None, :]))


class BlockAttention(torch.autograd.Function):
    """Attention block by block, on tiles of queries; backward recomputes the attention weights."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: list[Block]
    ) -> torch.Tensor:
        """From a scaled query [key heads, groups, tokens, head size], key and value [key heads, tokens, head size]."""
        ctx.save_for_backward(query, key, value)
        ctx.blocks = blocks
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        for block in blocks:
            keys, values = _seen(key, block), _seen(value, block)
            for tile, known in _tiles(block):
                weights = _weights(query[:, :, tile], keys[:, :known], block, tile)
                product = torch.bmm(weights, values[:, :known])
                output[:, :, tile] = product.unflatten(1, (query.shape[1], -1))
        return output

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value = ctx.saved_tensors
        query_gradient = torch.empty_like(query)
        exact = torch.promote_types(query.dtype, torch.float32)  # many queries add to the gradient of one key
        key_gradient, value_gradient = (x.new_zeros(x.shape, dtype=exact) for x in (key, value))
        for block in ctx.blocks:
            keys, values = _seen(key, block), _seen(value, block)
            key_part, value_part = (x.new_zeros(x.shape, dtype=exact) for x in (keys, values))
            for tile, known in _tiles(block):
                queries = query[:, :, tile]
                weights = _weights(queries, keys[:, :known], block, tile)
                slope = outer[0][:, :, tile].flatten(1, 2)
                value_part[:, :known] += torch.bmm(weights.transpose(1, 2), slope)
                slopes = torch.bmm(slope, values[:, :known].transpose(1, 2))
                slopes = softmax_backward(slopes, weights)
                query_gradient[:, :, tile] = torch.bmm(slopes, keys[:, :known]).unflatten(1, (query.shape[1], -1))
                key_part[:, :known] += torch.bmm(slopes.transpose(1, 2), queries.flatten(1, 2))
            at = 0
            for start, end in _ranges(block):
                key_gradient[:, start:end] += key_part[:, at : at + end - start]
                value_gradient[:, start:end] += value_part[:, at : at + end - start]
                at += end - start
        return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype), None


def _ranges(block: Block) -> tuple[tuple[int, int], ...]:
    """Of the tokens that a block attends to, including itself."""
    return _joined(block.ancestors, block.start, block.end)


def _seen(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """The part of [heads, tokens, head size] that a block attends to."""
    parts = [tensor[:, start:end] for start, end in _ranges(block)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _tiles(block: Block) -> Iterator[tuple[slice, int]]:
    """Tiles of a block's queries, each with the number of its keys up to the last query of the tile."""
    known = sum(end - start for start, end in block.ancestors)
    for start in range(block.start, block.end, TILE):
        end = min(start + TILE, block.end)
        yield slice(start, end), known + end - block.start


def _weights(queries: torch.Tensor, keys: torch.Tensor, block: Block, tile: slice) -> torch.Tensor:
    """Attention weights [key heads, groups * queries, keys]. Scores are rounded to the dtype, as in eager attention."""
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2))
    count = tile.stop - tile.start
    if block.mask is None:
        hidden = scores.new_full((count, count), float("-inf")).triu_(1)
    else:
        inside = slice(tile.start - block.start, tile.stop - block.start)
        hidden = scores.new_zeros(count, inside.stop)
        hidden.masked_fill_(~block.mask[inside, : inside.stop].to(scores.device), float("-inf"))
    scores.unflatten(1, (queries.shape[1], count))[..., -hidden.shape[1] :].add_(hidden)
    return torch.softmax(scores, dim=-1)


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
    """Follows transformers' AttentionInterface; `tree` comes from the keyword arguments of the model's forward.

    query is [1, heads, tokens, head size]; key and value may have fewer heads (grouped-query attention). Without a tree
    this is transformers' own scaled-dot-product attention.
    """
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:  # under a name that DROPOUTS lacks; a forward in evaluation may have come before
        raise UserError(
            "this model drops attention weights, which folded rows do not support; use --attn_implementation eager"
        )
    tree.uses += 1
    tree.ignored |= {name for name in UNSUPPORTED if kwargs.get(name) is not None}
    if tree.block_mask is not None:
        grouped = key.shape[1] < query.shape[1]
        attend = compiled_flex_attention()
        output = attend(query, key, value, block_mask=tree.block_mask, scale=scaling, enable_gqa=grouped)
        return output.transpose(1, 2).contiguous(), None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    by_group = (query[0] * scaling).unflatten(0, (key.shape[1], -1))
    output = BlockAttention.apply(by_group, key[0], value[0], tree.blocks)
    return output.flatten(0, 1).transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(NAME, tree_attention)
