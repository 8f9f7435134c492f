"""Running text of any number of tokens, cut to an exact length, and where between its sentences something may be put."""

import random
import re
from collections.abc import Sequence

import numpy as np

from titans_pretrain.data_prep.tokenizer import Tokenizer
from titans_pretrain.evaluation.texts import Texts


class Haystack:
    """sentences: their ids. anywhere: whether a cut may begin at any of them; else it begins at the first."""

    def __init__(self, sentences: Sequence[np.ndarray], anywhere: bool):
        sentences = [ids for ids in sentences if len(ids)]
        if not sentences:
            raise ValueError("the text to hide something in is empty; give another file or data.path")
        self._ids, self._anywhere = np.concatenate(sentences), anywhere
        self._ends = np.cumsum([len(ids) for ids in sentences])

    def cut(self, tokens: int, draw: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """So many ids, of a text that is repeated as often as need be; and the places in them where a sentence begins or ends, in
        order, 0 and `tokens` among them. The last sentence may be cut short."""
        begin = 0
        if self._anywhere and (number := draw.randrange(len(self._ends))):
            begin = int(self._ends[number - 1])
        times = max(1, -(-(begin + tokens) // len(self._ids)))
        ids = np.tile(self._ids, times)[begin : begin + tokens]
        ends = (self._ends + len(self._ids) * np.arange(times)[:, None]).ravel() - begin
        inside = ends[(ends > 0) & (ends < tokens)]
        return ids, np.concatenate([[0], inside, [tokens] if tokens else []]).astype(np.int64)


def haystack_of(texts: Texts, path: str | None, tokenizer: Tokenizer, tokens: int) -> Haystack:
    """The first documents that hold so many tokens; all of them if there are fewer."""
    sentences, found = [], 0
    for ids in texts.documents(path, tokenizer):
        sentences += [tokenizer.encode(sentence) for sentence in split_sentences(tokenizer.decode(ids))]
        found += len(ids)
        if found >= tokens:
            break
    return Haystack(sentences, anywhere=True)


def split_sentences(text: str) -> list[str]:
    """A text's sentences and lines, whose join is the text; a sentence has the blank before it."""
    return [part for part in re.split(r"(?<=[.!?])(?=\s)|(?<=\n)", text) if part]
