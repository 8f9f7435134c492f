import json
import os
from pathlib import Path

import pytest
from corpora import write_corpus


@pytest.fixture
def corpus(tmp_path):
    """Folder and documents of a corpus with short, long and one-token documents in many shards."""
    lengths = [1, 2, 7, 8, 9, 63, 64, 65, 200, 5, 31, 128, 129, 16, 3, 77, 500, 8, 40, 11]
    return tmp_path / "corpus", write_corpus(tmp_path / "corpus", lengths)


@pytest.fixture(scope="session")
def source_files() -> list[Path]:
    """Real text that every machine has: some of Python's own modules."""
    return sorted(Path(os.__file__).parent.glob("*.py"))[:60]


@pytest.fixture
def inputs(tmp_path):
    """Five files of 40 documents."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    texts = [f"document {i} " + "xyz\n" * (i % 50) for i in range(200)]
    for part in range(5):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[40 * part : 40 * part + 40]]
        (folder / f"{part}.jsonl").write_text("".join(lines))
    return folder, texts


@pytest.fixture
def quick_disk(monkeypatch):
    """Nothing here cuts the power: who waits for the disk is seen by its calls."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
