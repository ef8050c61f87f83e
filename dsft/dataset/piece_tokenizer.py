"""Tokenizes text a piece at a time, and remembers pieces: the turns of a conversation repeat their history."""

import re
from collections.abc import Sequence

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
        self._characters = 0
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        self._splits = _splits_at_added_tokens(tokenizer)
        self._added = {text: np.int32(number).tobytes() for text, number in added.items()} if self._splits else {}
        self._known = dict(self._added)
        longest_first = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)")

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids, int32 [length], of each text."""
        pieces = [[piece for piece in self._pattern.split(text) if piece] for text in texts]
        known = self._known
        missing = list({piece: None for split in pieces for piece in split if piece not in known})
        new = dict(zip(missing, self._tokenize(missing), strict=True))
        known.update(new)
        self._characters += sum(map(len, missing))
        results = [np.frombuffer(b"".join([known[piece] for piece in split]), np.int32) for split in pieces]
        if self._characters > MAX_CHARACTERS:
            self._known, self._characters = dict(self._added), 0
        return results

    def _tokenize(self, pieces: list[str]) -> list[bytes]:
        """The token ids of each, as the bytes of int32: the fastest to join."""
        if not pieces:
            return []
        if self._splits:
            encodings = self._tokenizer.backend_tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
            return [np.array(encoding.ids, np.int32).tobytes() for encoding in encodings]
        encoded = self._tokenizer(pieces, add_special_tokens=False, return_attention_mask=False)
        return [np.array(ids, np.int32).tobytes() for ids in encoded["input_ids"]]


def _splits_at_added_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "split_special_tokens", False):
        return False
    if backend.truncation is not None or backend.padding is not None:
        return False
    looks_around = any(
        token.lstrip or token.rstrip or token.single_word or (token.normalized and backend.normalizer is not None)
        for token in tokenizer.added_tokens_decoder.values()
    )
    return not looks_around and "prepend_scheme=first" not in repr(backend.pre_tokenizer)
