"""A tokenizer's tokens as the bytes they write, which is how llguidance sees a vocabulary. Knows no grammars."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ..prompt import Tokenizer

_SENTINEL = "\x02"


class Vocabulary:
    """A tokenizer's tokens as bytes, as grammars see them; made once per model.

    `width` is the number of logits; ids past the tokenizer's are never allowed. `end_tokens` are the model's own,
    beside the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer, width: int, end_tokens: Collection[int] = ()) -> None:
        from llguidance import LLTokenizer

        self.width = width
        self.end_tokens = frozenset((tokenizer.eos_id, *end_tokens))
        source = _Source(tokenizer)
        self.compiler = LLTokenizer(source)  # type: ignore[arg-type]
        # Spaces that a detokenizer keeps where it drops a first one: those written as a byte, not as a piece.
        self.kept_spaces = [n for n, text in enumerate(source.tokens) if text == b" " and n != source(" ")[0]]

    def is_text(self, token: int) -> bool:
        """Whether a token is one of the tokenizer's, and no end."""
        return 0 <= token < self.size and token not in self.end_tokens

    def bools(self, bits: bytes) -> np.ndarray:
        """llguidance's packed mask → (V,) bools."""
        mask = np.zeros(self.width, np.bool_)
        found = np.unpackbits(np.frombuffer(bits, np.uint8), count=self.size, bitorder="little")
        mask[: len(found)] = found
        return mask

    @property
    def size(self) -> int:
        """Tokens that can be allowed."""
        return min(self.width, self.compiler.vocab_size)


class _Source:
    """A tokenizer as llguidance asks for it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.eos_token_id = tokenizer.eos_id
        self.special_token_ids = [token for token, text in enumerate(texts) if text is None]
        self.tokens = [f"<{token}>".encode() if text is None else text for token, text in enumerate(texts)]
        self._encode = tokenizer.encode
        self._before = len(self._encode(_SENTINEL, bos=False))

    def __call__(self, text: str) -> list[int]:
        # SentencePiece writes a space before a text: here before a letter that joins no other.
        return self._encode(_SENTINEL + text, bos=False)[self._before :]
