"""Tokenizes text a piece at a time, and remembers pieces: the turns of a conversation repeat their history."""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

MAX_CHARACTERS = 2**25  # of the pieces remembered


class PieceTokenizer:
    """Text to the token ids that the tokenizer gives to the whole of it, without tokens added around it.

    A fast tokenizer first splits a text at its added tokens, such as <|im_end|>, and tokenizes what is between two of
    them on its own. So a piece seen before need not be tokenized again. Where an added token takes blanks or letters
    around it into account, or the first piece of a text is treated differently, a text is one piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, np.ndarray] = {}
        self._characters = 0
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        self._splits = _splits_at_added_tokens(tokenizer)
        self._added = {text: np.array([number], np.int32) for text, number in added.items()} if self._splits else {}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)")

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids, int32 [length], of each text."""
        pieces = [[piece for piece in self._pattern.split(text) if piece] for text in texts]
        missing = {p: None for split in pieces for p in split if p not in self._known and p not in self._added}
        ids = dict(zip(missing, self._tokenize(list(missing)), strict=True))
        results = [self._join(split, ids) for split in pieces]
        self._remember(ids)
        return results

    def _join(self, pieces: Sequence[str], new: dict[str, np.ndarray]) -> np.ndarray:
        def parts() -> Iterator[np.ndarray]:
            for piece in pieces:
                found = self._added.get(piece)
                if found is None:
                    found = new.get(piece)
                yield self._known[piece] if found is None else found

        return np.concatenate([np.empty(0, np.int32), *parts()])

    def _tokenize(self, pieces: list[str]) -> list[np.ndarray]:
        if not pieces:
            return []
        encoded = self._tokenizer(pieces, add_special_tokens=False, return_attention_mask=False)
        return [np.array(ids, np.int32) for ids in encoded["input_ids"]]

    def _remember(self, ids: dict[str, np.ndarray]) -> None:
        if self._characters > MAX_CHARACTERS:
            self._known, self._characters = {}, 0
        self._known |= ids
        self._characters += sum(map(len, ids))


def _splits_at_added_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "split_special_tokens", False):
        return False
    looks_around = any(
        token.lstrip or token.rstrip or token.single_word or (token.normalized and backend.normalizer is not None)
        for token in tokenizer.added_tokens_decoder.values()
    )
    return not looks_around and "prepend_scheme=first" not in repr(backend.pre_tokenizer)
