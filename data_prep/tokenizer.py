"""Tokenizers: text to ids and back, and the folder they travel in.

    titans_tokenizer.json       kind, vocabulary size, ids of the control pieces, fingerprint
    tokenizer.model             sentencepiece only
    tokenizer.json              the Hugging Face fast tokenizer with the same ids
    tokenizer_config.json       loads it as PreTrainedTokenizerFast

No kind adds anything to a text: `encode` gives the text's own ids, and `titans-data tokenize` ends each document with eos.
"""

import json
import logging
import os
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from titans_pretrain.data.manifest import token_dtype
from titans_pretrain.data.tokenizer import DEFINITION, ENTRY, NUCLEOTIDES, TokenizerEntry, read_tokenizer_entry
from titans_pretrain.disk import sync

log = logging.getLogger(__name__)

FILES = (ENTRY, "tokenizer.model", "tokenizer.json", "tokenizer_config.json")
# Names of control pieces, for kinds that have no names of their own: nothing that a text holds
CONTROLS = {"unk": "<|titans_unk|>", "bos": "<|titans_bos|>", "eos": "<|titans_eos|>", "pad": "<|titans_pad|>"}
# A text is a sequence of these: a line's end, or blanks (which sentencepiece writes as U+2581) and what follows them
_WORD = re.compile("\n|[ ▁]*[^ ▁\n]+|[ ▁]+")
CACHED_CHARACTERS = 4_000_000  # of words whose ids are remembered, some 100 MB in each process


class Tokenizer:
    """Base of all kinds. `definition` is the content of the file that fixes the ids."""

    definition: bytes = b""

    def __init__(self, entry: TokenizerEntry):
        self.entry = entry.with_fingerprint(self.definition)
        self.dtype = token_dtype(entry.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, [tokens] in the type that shards store; no eos."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        """Text of ids; control pieces are left out."""
        raise NotImplementedError

    def piece(self, token: int) -> str | None:
        """Name of one id, as the Hugging Face form has it."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> None:
        from titans_pretrain.data_prep.huggingface import save_huggingface

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if DEFINITION[self.entry.kind]:
            (folder / DEFINITION[self.entry.kind]).write_bytes(self.definition)
        try:
            save_huggingface(self, folder)
        except ValueError as error:
            (folder / "tokenizer.json").unlink(missing_ok=True)  # of another tokenizer
            log.warning("%s: written without a Hugging Face form, `titans-pretrain export` will need one", error)
        (folder / ENTRY).write_text(json.dumps(asdict(self.entry), indent=1) + "\n")
        sync_tokenizer(folder)

    def _controls(self) -> set[int]:
        return {i for i in (self.entry.eos_id, self.entry.bos_id, self.entry.pad_id) if i is not None}


class SentencePieceTokenizer(Tokenizer):
    def __init__(self, definition: bytes):
        from sentencepiece import SentencePieceProcessor

        self.definition = definition
        self._model = model = SentencePieceProcessor(model_proto=definition)
        ids = {name: i if (i := getattr(model, name + "_id")()) >= 0 else None for name in ("eos", "bos", "pad")}
        if ids["eos"] is None:
            raise ValueError("this sentencepiece model has no eos piece; documents could not be told apart")
        super().__init__(
            TokenizerEntry("sentencepiece", model.get_piece_size(), ids["eos"], bos_id=ids["bos"], pad_id=ids["pad"])
        )
        self._words_are_independent = self._check_words()
        self._known: dict[str, bytes] = {}  # word -> its ids as stored
        self._known_characters = 0

    def _check_words(self) -> bool:
        """Whether a text's ids are those of its words one after the other, a word being blanks and what follows them.

        True if no piece reaches from a word into the next, or over a line's end, and nothing depends on the text's
        beginning: then no BPE merge ever crosses a border. So it is for what `train_sentencepiece` makes.
        """
        from sentencepiece import sentencepiece_model_pb2

        spec = sentencepiece_model_pb2.ModelProto.FromString(self.definition)
        trainer, rules = spec.trainer_spec, spec.normalizer_spec
        normal, user_defined = type(spec).SentencePiece.NORMAL, type(spec).SentencePiece.USER_DEFINED
        return (
            trainer.model_type == trainer.BPE
            and trainer.byte_fallback
            and not (rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces)
            and not any(piece.type == user_defined for piece in spec.pieces)
            and all(re.fullmatch(_WORD, piece.piece) for piece in spec.pieces if piece.type == normal)
        )

    def encode(self, text: str) -> np.ndarray:
        if not self._words_are_independent:
            return np.array(self._model.encode(text), self.dtype)
        words = re.findall(_WORD, text)
        known = self._known
        new = [word for word in set(words) if word not in known]
        if self._known_characters > CACHED_CHARACTERS:
            known.clear()
            self._known_characters, new = 0, list(set(words))
        known.update(zip(new, (np.array(ids, self.dtype).tobytes() for ids in self._model.encode(new))))
        self._known_characters += sum(map(len, new))
        return np.frombuffer(b"".join(map(known.__getitem__, words)), self.dtype)

    def decode(self, ids) -> str:
        return self._model.decode([int(i) for i in ids])

    def piece(self, token: int) -> str | None:
        return self._model.id_to_piece(token)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json as it is. Control pieces come from tokenizer_config.json beside it, or from `eos`."""

    def __init__(self, definition: bytes, config: dict | None = None, eos: str | None = None):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # `titans-data` runs one process per core
        from tokenizers import Tokenizer as FastTokenizer

        self.definition = definition
        try:
            self._model = FastTokenizer.from_str(definition.decode())
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"not a tokenizer.json ({error})") from None
        self.config = dict(config or {})
        if eos:
            self.config["eos_token"] = eos
        ids = {name: self._control_id(self.config.get(name + "_token")) for name in ("eos", "bos", "pad")}
        if ids["eos"] is None:
            raise ValueError(
                "which piece ends a document? no eos_token in a tokenizer_config.json beside tokenizer.json; pass --eos PIECE"
            )
        size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        super().__init__(TokenizerEntry("huggingface", size, ids["eos"], bos_id=ids["bos"], pad_id=ids["pad"]))
        # a literal "</s>" in a text is text
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()

    def _control_id(self, token) -> int | None:
        if token is None:
            return None
        piece = token if isinstance(token, str) else token["content"]
        found = self._model.token_to_id(piece)
        if found is None:
            raise ValueError(f"the control piece {piece!r} is not in this tokenizer's vocabulary")
        return found

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text, add_special_tokens=False).ids, self.dtype)

    def decode(self, ids) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece(self, token: int) -> str | None:
        return self._model.id_to_token(token)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes; ids 256 to 258 are the control pieces."""

    def __init__(self):
        super().__init__(TokenizerEntry("byte", 259, eos_id=256, bos_id=257, pad_id=258))

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def piece(self, token: int) -> str | None:
        return f"<0x{token:02X}>" if token < 256 else CONTROLS[("eos", "bos", "pad")[token - 256]]


class NucleotideTokenizer(Tokenizer):
    """One id per base, ids 0 to 4 for A C G T N. Case is dropped, U reads as T, every other letter as N."""

    def __init__(self):
        super().__init__(TokenizerEntry("nucleotide", 8, eos_id=5, bos_id=6, pad_id=7))
        self._table = np.full(256, NUCLEOTIDES.index("N"), self.dtype)
        for i, base in enumerate(NUCLEOTIDES):
            self._table[[ord(base), ord(base.lower())]] = i
        self._table[[ord("U"), ord("u")]] = NUCLEOTIDES.index("T")

    def encode(self, text: str) -> np.ndarray:
        # one id per character, also for characters of several bytes
        return self._table[np.frombuffer(text.encode("ascii", "replace"), np.uint8)]

    def decode(self, ids) -> str:
        return "".join(NUCLEOTIDES[int(i)] for i in ids if i < len(NUCLEOTIDES))

    def piece(self, token: int) -> str | None:
        names = [*NUCLEOTIDES, CONTROLS["eos"], CONTROLS["bos"], CONTROLS["pad"]]
        return names[token]


def sync_tokenizer(folder: Path) -> None:
    """Puts a tokenizer folder on disk."""
    for path in [*(folder / name for name in FILES), folder]:
        if path.exists():
            sync(path)


def refuse_another(entry: TokenizerEntry, folder: Path) -> None:
    """Raises ValueError if `folder` holds a tokenizer that is not this one, for `save` would write over it."""
    held = [name for name in FILES if (folder / name).exists()]
    with suppress(ValueError):
        if not held or read_tokenizer_entry(folder) == entry:
            return
    raise ValueError(f"{folder} already holds another tokenizer ({held[0]}); choose another folder")


def load_tokenizer(path: str | Path, eos: str | None = None) -> Tokenizer:
    """A tokenizer from a folder that `save` wrote, a sentencepiece .model, a tokenizer.json (or a folder with one), or
    by the names `byte` and `nucleotide`. Raises ValueError."""
    if str(path) == "byte":
        return ByteTokenizer()
    if str(path) == "nucleotide":
        return NucleotideTokenizer()
    path = Path(path)
    if (path / ENTRY).exists():
        entry = read_tokenizer_entry(path)
        if entry.kind in ("byte", "nucleotide"):
            return load_tokenizer(entry.kind)
        return load_tokenizer(path / DEFINITION[entry.kind], None)
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).exists():
                return load_tokenizer(path / name, eos)
        raise ValueError(f"{path} holds neither {ENTRY} nor tokenizer.json nor tokenizer.model")
    try:
        definition = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"no tokenizer at {path} ({error.strerror}); give a folder, .model, tokenizer.json, byte or nucleotide"
        ) from None
    try:
        if path.suffix == ".json":
            config = path.with_name("tokenizer_config.json")
            return HuggingFaceTokenizer(definition, json.loads(config.read_text()) if config.exists() else None, eos)
        return SentencePieceTokenizer(definition)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a sentencepiece model ({error})") from None
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer that can be used: {error}") from None
