"""Trains a sentencepiece BPE tokenizer from a sample of lines."""

import io
import random
from collections.abc import Iterable

from titans_pretrain.data_prep.tokenizer import CONTROLS, SentencePieceTokenizer

LONGEST_LINE = 4096  # characters; longer lines enter the sample in parts


def sample_lines(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """A uniform sample of the lines of all texts, in their order (reservoir sampling, Vitter 1985, algorithm R).

    sentencepiece's own sampling differs from run to run even when seeded.
    """
    chance = random.Random(seed)
    kept: list[tuple[int, str]] = []
    seen = 0
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), LONGEST_LINE):
                part = line[start : start + LONGEST_LINE]
                if len(kept) < count:
                    kept.append((seen, part))
                elif (place := chance.randrange(seen + 1)) < count:
                    kept[place] = (seen, part)
                seen += 1
    return [line for _, line in sorted(kept)]


def train_sentencepiece(lines: list[str], vocab_size: int) -> SentencePieceTokenizer:
    """BPE with byte fallback, lossless: no normalisation, no prefix, no blank removed; digits stand alone.
    The same lines give the same bytes. Raises ValueError if they do not hold enough different pieces."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,  # a file would put its path into the model
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=4 * LONGEST_LINE + 4,
            num_threads=1,  # is written into the model
            minloglevel=2,  # pieces with tabs would fill the terminal with warnings
            **{name + "_piece": piece for name, piece in CONTROLS.items()},
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
        )
    except RuntimeError as error:
        told = str(error).rpartition("] ")[2]  # without the line of its source
        advice = (
            "raise --vocab-size" if vocab_size < 1 or "smaller than" in told else "lower --vocab-size or give more text"
        )
        raise ValueError(f"cannot train {vocab_size} pieces from {len(lines)} lines; {advice} ({told})") from None
    return SentencePieceTokenizer(model.getvalue())
