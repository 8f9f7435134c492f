"""`titans-data verify`: finds every way in which a data folder is not what its manifest says."""

import tarfile
from pathlib import Path

import numpy as np

from titans_pretrain.data.manifest import MANIFEST, Manifest, ShardEntry
from titans_pretrain.data.tokenizer import read_tokenizer_entry
from titans_pretrain.data_prep.progress import progress_bar
from titans_pretrain.data_prep.shards import TOKENS, sha256_of


def verify(folder: str | Path, *, quick: bool = False, progress: bool = False) -> list[str]:
    """One line per finding, each naming the file; an empty list means that all is well.

    quick: sizes, counts and index tables, without reading the tokens. Raises ValueError if there is no manifest.
    """
    folder = Path(folder)
    try:
        manifest = Manifest.from_json((folder / MANIFEST).read_text(), str(folder / MANIFEST))
    except OSError as error:
        raise ValueError(
            f"no manifest in {folder} ({error.strerror}): not a data folder, or tokenize did not finish"
        ) from None
    findings = _tokenizer_findings(folder, manifest)
    named = {MANIFEST, "tokenizer"}
    total = sum(manifest.totals(split)["bytes"] for split in manifest.splits)
    with progress_bar(total, "verify", disable=not progress) as bar:
        for shards in manifest.splits.values():
            for shard in shards:
                if shard.name in named:
                    findings.append(f"{shard.name}: named twice in the manifest")
                named |= {shard.name, shard.index_name}
                findings += _shard_findings(folder, shard, manifest, quick)
                bar.update(shard.bytes)
    for path in sorted(folder.iterdir()):
        if path.name not in named and not path.name.startswith("."):
            findings.append(f"{path.name}: not in the manifest")
    return findings


def _tokenizer_findings(folder: Path, manifest: Manifest) -> list[str]:
    try:
        found = read_tokenizer_entry(folder / "tokenizer")
    except ValueError as error:
        return [f"tokenizer: {error}"]
    if found != manifest.tokenizer:
        return [
            f"tokenizer: a foreign tokenizer, fingerprint {found.fingerprint[:12]}, not {manifest.tokenizer.fingerprint[:12]}"
        ]
    return []


def _shard_findings(folder: Path, shard: ShardEntry, manifest: Manifest, quick: bool) -> list[str]:
    path = folder / shard.name
    findings = []
    try:
        size = path.stat().st_size
        if size < shard.bytes:
            findings.append(f"{shard.name}: truncated, {size} bytes of {shard.bytes}")
        elif size > shard.bytes:
            findings.append(f"{shard.name}: {size - shard.bytes} bytes too long")
        elif not quick and sha256_of(path) != shard.sha256:
            findings.append(f"{shard.name}: content changed, sha256 differs")
    except OSError as error:
        return [f"{shard.name}: {error.strerror}"]
    try:
        index = np.load(folder / shard.index_name)
    except (OSError, ValueError, EOFError) as error:
        return [*findings, f"{shard.index_name}: unreadable ({error})"]
    if index.dtype != np.int64 or index.shape != (shard.documents, 2):
        return [
            *findings,
            f"{shard.index_name}: {index.dtype} {index.shape}, the manifest says int64 ({shard.documents}, 2)",
        ]
    item = manifest.dtype.itemsize
    if int(index[:, 1].sum()) != shard.tokens * item:
        findings.append(
            f"{shard.index_name}: {int(index[:, 1].sum()) // item} tokens, the manifest says {shard.tokens}"
        )
    if findings or quick:
        return findings  # the cause is named; what follows from it would only repeat it
    return _content_findings(path, shard, index, manifest)


def _content_findings(path: Path, shard: ShardEntry, index: np.ndarray, manifest: Manifest) -> list[str]:
    """A shard with the right checksum can still be wrong: in its index, or written so."""
    rows, keys, bad_ids, no_eos = [], set(), 0, 0
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            if suffix != TOKENS:
                continue
            rows.append((member.offset_data, member.size))
            keys.add(key)
            tokens = np.frombuffer(tar.extractfile(member).read(), manifest.dtype)
            bad_ids += int((tokens >= manifest.tokenizer.vocab_size).sum())
            no_eos += not len(tokens) or int(tokens[-1]) != manifest.tokenizer.eos_id
    findings = []
    if not np.array_equal(np.array(rows, np.int64).reshape(-1, 2), index):
        findings.append(f"{shard.index_name}: does not describe the {len(rows)} documents in the tar")
    if len(keys) != len(rows):
        findings.append(f"{shard.name}: {len(rows) - len(keys)} keys occur twice")
    if bad_ids:
        findings.append(f"{shard.name}: {bad_ids} ids outside the vocabulary of {manifest.tokenizer.vocab_size}")
    if no_eos:
        findings.append(f"{shard.name}: {no_eos} documents do not end with eos")
    return findings
