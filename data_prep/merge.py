"""`titans-data merge`: several data folders become one, without copying where the disk allows it."""

import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from titans_pretrain.data.manifest import MANIFEST, SPLITS, Manifest, ShardEntry
from titans_pretrain.data_prep.shards import BLOCK, read_metadata, save_index, sha256_of, write_text, writing
from titans_pretrain.data_prep.tokenizer import refuse_another, sync_tokenizer
from titans_pretrain.disk import sync


def merge(folders: list[str], out: str | None = None, deduplicate: bool = False) -> Manifest:
    """Joins data folders with the same tokenizer, shard by shard, in the order given.

    One folder without `out`: its parts (`tokenize --shard i/N`) become that folder's own shards and disappear. The
    manifest is written last, so a merge that was killed can be repeated. deduplicate drops documents whose text came
    before, validation first (what is held out in one folder does not stay in another's training split); only shards that
    hold such are written anew. Raises ValueError.
    """
    target = Path(out) if out else Path(folders[0])
    if len(folders) > 1 and not out:
        raise ValueError("several folders need --out for the new one")
    if (target / MANIFEST).exists():
        raise ValueError(f"{target} is a finished data folder already; part-* folders in it are left-overs to delete")
    inside = len(folders) == 1
    parts = _parts_inside(Path(folders[0])) if inside else [Path(folder) for folder in folders]
    manifests = [_manifest_of(part) for part in parts]
    if inside and len({manifest.source["run"] for manifest in manifests}) > 1:
        raise ValueError(f"the parts in {folders[0]} were not all made from the same inputs with the same options")
    with writing(target):
        merged = _merge_into(target, parts, manifests, deduplicate)
    if inside and not out:
        for part in parts:
            shutil.rmtree(part)
    return merged


def _merge_into(target: Path, parts: list[Path], manifests: list[Manifest], deduplicate: bool) -> Manifest:
    tokenizer = manifests[0].tokenizer
    for part, manifest in zip(parts, manifests, strict=True):
        if manifest.tokenizer != tokenizer:
            raise ValueError(f"{part} and {parts[0]} were made with different tokenizers")
    target.mkdir(parents=True, exist_ok=True)
    mark = target / "merge.partial"
    shards = [*target.glob("*-*.tar"), *target.glob("*-*.tar.idx.npy")]
    if not mark.exists():
        refuse_another(tokenizer, target / "tokenizer")
        if shards:
            raise ValueError(f"{target} already holds shards of something else; choose an empty folder")
    mark.touch()
    for path in shards:  # of a merge that was killed
        path.unlink()
    seen = set() if deduplicate else None
    splits = {split: _join(parts, manifests, target, split, seen) for split in reversed(SPLITS)}
    shutil.copytree(parts[0] / "tokenizer", target / "tokenizer", dirs_exist_ok=True)
    sync_tokenizer(target / "tokenizer")
    dropped = Counter()
    for manifest in manifests:
        dropped.update(manifest.source.get("dropped", {}))
    before = sum(manifest.totals(split)["documents"] for manifest in manifests for split in SPLITS)
    if duplicates := before - sum(shard.documents for shards in splits.values() for shard in shards):
        dropped["duplicate"] += duplicates
    source = {"dropped": dict(sorted(dropped.items())), "parts": [manifest.source for manifest in manifests]}
    merged = Manifest(tokenizer, {split: splits[split] for split in SPLITS}, source)
    write_text(target / MANIFEST, merged.to_json())
    mark.unlink()
    return merged


def _parts_inside(folder: Path) -> list[Path]:
    parts = {}
    for path in sorted(folder.glob("part-*-of-*")):
        if match := re.fullmatch(r"part-(\d+)-of-(\d+)", path.name):
            parts.setdefault(int(match[2]), {})[int(match[1])] = path
    if len(parts) != 1:
        raise ValueError(
            f"{folder} holds parts of different counts ({', '.join(map(str, sorted(parts)))})"
            if parts
            else f"{folder} holds no parts of `titans-data tokenize --shard i/N`"
        )
    (count, found), *_ = parts.items()
    missing = sorted(set(range(count)) - set(found))
    if missing:
        raise ValueError(f"{folder}: part {', '.join(map(str, missing[:10]))} of {count} is missing")
    return [found[i] for i in range(count)]


def _manifest_of(folder: Path) -> Manifest:
    try:
        return Manifest.from_json((folder / MANIFEST).read_text(), str(folder / MANIFEST))
    except OSError:
        raise ValueError(f"{folder} has no manifest: its tokenize run has not finished") from None


def _join(
    parts: list[Path], manifests: list[Manifest], target: Path, split: str, seen: set[str] | None
) -> list[ShardEntry]:
    joined = []
    for part, manifest in zip(parts, manifests, strict=True):
        for shard in manifest.splits[split]:
            name = f"{split}-{len(joined):06d}.tar"
            new = ShardEntry(**vars(shard) | {"name": name})
            keep = None if seen is None else _first_occurrences(part, shard, seen)
            if keep is None or keep.all():
                _link(part / shard.index_name, target / new.index_name)
                _link(part / shard.name, target / name)
            elif keep.any():
                new = _write_kept(part, shard, keep, target / name, manifest.dtype.itemsize)
            else:
                continue
            joined.append(new)
    return joined


def _first_occurrences(folder: Path, shard: ShardEntry, seen: set[str]) -> np.ndarray:
    """Which documents have a text that `seen` does not hold yet, bool [documents]; adds them to it."""
    keep = np.empty(shard.documents, bool)
    with open(folder / shard.name, "rb") as file:
        for i, (offset, size) in enumerate(np.load(folder / shard.index_name).tolist()):
            digest = read_metadata(file, offset, size)["blake2b"]
            keep[i] = digest not in seen
            seen.add(digest)
    return keep


def _write_kept(folder: Path, shard: ShardEntry, keep: np.ndarray, path: Path, item_size: int) -> ShardEntry:
    """Copies the documents to keep into a new shard."""
    index = np.load(folder / shard.index_name)
    begins = index[:, 0] - BLOCK
    ends = np.append(begins[1:], shard.bytes - 2 * BLOCK)
    rows = np.array([index[keep, 0], index[keep, 1]]).T
    rows[:, 0] = np.cumsum((ends - begins)[keep]) - (ends - begins)[keep] + BLOCK
    with open(folder / shard.name, "rb") as source, open(path, "wb") as out:
        for begin, end in zip(begins[keep].tolist(), ends[keep].tolist(), strict=True):
            source.seek(begin)
            out.write(source.read(end - begin))
        out.write(bytes(2 * BLOCK))
    sync(path)
    save_index(path.with_name(path.name + ".idx.npy"), rows)
    tokens = int(rows[:, 1].sum()) // item_size
    return ShardEntry(path.name, len(rows), tokens, path.stat().st_size, sha256_of(path))


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
        sync(target)
