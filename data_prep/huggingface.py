"""The Hugging Face form of a tokenizer: tokenizer.json and tokenizer_config.json with the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from titans_pretrain.data.tokenizer import NUCLEOTIDES

if TYPE_CHECKING:
    from titans_pretrain.data_prep.tokenizer import Tokenizer

# Texts on which both forms must agree before the Hugging Face form is written.
PROBES = (
    "",
    " ",
    "Hello, world!",
    "  two blanks, a tab\tand\r\nline ends\n\n\n",
    "\tdef f(x):\n\t\treturn x ** 2  # 1234567890\n",
    "naïve café ﬁne ½ ² Å Å",
    "e\u0301 combining, \u200d joiner, \u00a0 no-break, \ufeff mark, \u2028 separator",
    "日本語のテキスト 한국어 العربية עברית हिन्दी ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "\x00\x01\x1b[0m\x7f",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ACGTNacgtnRYKMuU",
)


def save_huggingface(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes both files. Raises ValueError if the converted tokenizer would give other ids than this one."""
    kind = tokenizer.entry.kind
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # loads in transformers 4 and 5
        "clean_up_tokenization_spaces": False,
        # a control piece's name in a text is text, as it is for the shards
        "split_special_tokens": True,
        "model_max_length": int(1e30),
    }
    for name, token in (
        ("eos", tokenizer.entry.eos_id),
        ("bos", tokenizer.entry.bos_id),
        ("pad", tokenizer.entry.pad_id),
    ):
        if token is not None:
            config[name + "_token"] = tokenizer.piece(token)
    if kind == "huggingface":
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer.config | config, indent=1) + "\n")
        return
    fast = {"sentencepiece": _from_sentencepiece, "byte": _bytes, "nucleotide": _nucleotides}[kind](tokenizer)
    differing = differing_texts(tokenizer, fast, PROBES)
    if differing:
        raise ValueError(
            f"this {kind} tokenizer has no exact Hugging Face form: ids differ for {differing[0]!r} "
            f"and {len(differing) - 1} more of {len(PROBES)} texts"
        )
    (folder / "tokenizer.json").write_bytes(fast.to_str(pretty=True).encode())
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def differing_texts(tokenizer: Tokenizer, fast, texts) -> list[str]:
    """Texts that the two forms encode differently. `fast` is a tokenizers.Tokenizer."""
    fast.encode_special_tokens = True
    return [
        text for text in texts if fast.encode(text, add_special_tokens=False).ids != tokenizer.encode(text).tolist()
    ]


def _special(names):
    from tokenizers import AddedToken

    return [AddedToken(name, normalized=False, special=True) for name in names]


def _bytes(tokenizer: Tokenizer):
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models

    vocab = {tokenizer.piece(i): i for i in range(tokenizer.entry.vocab_size)}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens(_special(list(vocab)[256:]))
    return fast


def _nucleotides(tokenizer: Tokenizer):
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, normalizers

    vocab = {tokenizer.piece(i): i for i in range(tokenizer.entry.vocab_size)}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="N", fuse_unk=False))
    pairs = [(base.lower(), base) for base in NUCLEOTIDES] + [("u", "T"), ("U", "T")]
    fast.normalizer = normalizers.Sequence([normalizers.Replace(old, new) for old, new in pairs])
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens(_special(list(vocab)[len(NUCLEOTIDES) :]))
    return fast


def _from_sentencepiece(tokenizer: Tokenizer):
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, decoders, models, normalizers
    from tokenizers import Tokenizer as FastTokenizer

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.definition)
    trainer, rules = model.trainer_spec, model.normalizer_spec
    types = type(model).SentencePiece
    unknown = model.pieces[trainer.unk_id].piece
    if trainer.model_type == trainer.BPE:
        fast = FastTokenizer(
            models.BPE(
                vocab={piece.piece: i for i, piece in enumerate(model.pieces)},
                merges=_merges(model.pieces, types.NORMAL),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )
        )
    elif trainer.model_type == trainer.UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in model.pieces]
        fast = FastTokenizer(models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    else:
        raise ValueError("only BPE and unigram sentencepiece models have a Hugging Face form")
    steps = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    fast.normalizer = normalizers.Sequence(steps)
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(decoding)
    fast.add_special_tokens(_special(p.piece for p in model.pieces if p.type in (types.UNKNOWN, types.CONTROL)))
    fast.add_tokens([AddedToken(p.piece, normalized=False) for p in model.pieces if p.type == types.USER_DEFINED])
    return fast


def _merges(pieces, normal: int) -> list[tuple[str, str]]:
    """The merges behind a BPE vocabulary, best first: every way to make a piece of two, by the piece's rank."""
    rank = {piece.piece: i for i, piece in enumerate(pieces) if piece.type == normal}
    merges = []
    for piece, i in rank.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in rank and right in rank:
                merges.append((-pieces[i].score, rank[left], rank[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]
