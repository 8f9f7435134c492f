"""Labelled sequences in the layouts of GenomicsBenchmarks, and the k-mer baseline: against loops."""

import itertools

import numpy as np
import pytest
import torch

from titans_pretrain.data_prep.tokenizer import NucleotideTokenizer
from titans_pretrain.genomics.kmers import _logistic, kmer_baseline, kmer_shares
from titans_pretrain.genomics.paper import TABLE, paper_rows
from titans_pretrain.genomics.sequences import Labelled, held_out, read_benchmark


def write_folders(root, sequences: dict[str, dict[str, list[str]]]):
    """As the package genomic-benchmarks unpacks a data set."""
    for split, classes in sequences.items():
        for name, texts in classes.items():
            (root / split / name).mkdir(parents=True)
            for i, text in enumerate(texts):
                (root / split / name / f"{i}.txt").write_text(text)
    return root


TINY = {
    "train": {"negative": ["ACGT", "NNA"], "positive": ["TTTT", "acgu", "G"]},
    "test": {"negative": ["C"], "positive": ["GATTACA\n"]},
}


def decoded(labelled: Labelled) -> list[tuple[str, int]]:
    return list(zip(map(NucleotideTokenizer().decode, labelled.sequences), labelled.labels.tolist()))


def test_folders_of_text_files(tmp_path):
    found = read_benchmark(write_folders(tmp_path / "human_x", TINY))
    assert found.name == "human_x" and found.classes == ["negative", "positive"]
    assert decoded(found.train) == [("ACGT", 0), ("NNA", 0), ("TTTT", 1), ("ACGT", 1), ("G", 1)]
    assert decoded(found.test) == [("C", 0), ("GATTACA", 1)]
    assert decoded(read_benchmark(tmp_path / "human_x", max_length=3).test) == [("C", 0), ("GAT", 1)]


@pytest.mark.parametrize("column", ["sequence", "seq"])
def test_csv_files(tmp_path, column):
    (tmp_path / "train.csv").write_text(f"label,{column}\n1,ACGT\n0,GG\n2,T\n")
    (tmp_path / "test.csv").write_text(f"{column},label,note\nCC,2,x\n")
    found = read_benchmark(tmp_path)
    assert found.classes == ["0", "1", "2"]
    assert decoded(found.train) == [("ACGT", 1), ("GG", 0), ("T", 2)] and decoded(found.test) == [("CC", 2)]


@pytest.mark.parametrize(
    ("train", "test", "told"),
    [
        ("seq,label\nAC,0\nA-,1\n", "seq,label\nA,0\n", r"train\.csv, line 3: '-' in a sequence is no base"),
        ("seq,label\nAC,0\n,1\n", "seq,label\nA,0\n", r"train\.csv, line 3: an empty sequence"),
        ("seq,label\nAC,0\nAC,\n", "seq,label\nA,0\n", r"train\.csv, line 3: no label"),
        ("seq,label\nAC\n", "seq,label\nA,0\n", r"train\.csv, line 2: no label"),
        ("id,region,start,end,strand\n1,chr1,5,9,+\n", "", r"coordinates in a genome, .*download_dataset"),
        ("text,label\nA,0\n", "", r"train\.csv, line 1: needs columns sequence \(or seq\) and label, has text, label"),
        ("", "", r"line 1: needs columns .*, has none"),
        ("seq,label\n", "", r"train\.csv holds a header and no rows"),
        ("seq,label\nAC,0\n", "seq,label\nA,0\n", r"all training sequences are of the class 0"),
        ("seq,label\nAC,0\nG,1\n", "seq,label\nA,3\nA,2\n", r"the test has classes that the training has not: 2, 3"),
    ],
)
def test_what_is_no_data_set_is_named_with_its_line(tmp_path, train, test, told):
    (tmp_path / "train.csv").write_text(train)
    (tmp_path / "test.csv").write_text(test)
    with pytest.raises(ValueError, match=told):
        read_benchmark(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither train/CLASS/\*\.txt nor train\.csv"):
        read_benchmark(tmp_path)
    (tmp_path / "package/train").mkdir(parents=True)
    (tmp_path / "package/train/negative.csv.gz").write_bytes(b"")  # as the package's own repository has it
    with pytest.raises(ValueError, match=r"package/train holds coordinates in a genome.*download_dataset"):
        read_benchmark(tmp_path / "package")
    write_folders(tmp_path, TINY | {"test": {}})
    with pytest.raises(ValueError, match=r"holds neither test/CLASS/\*\.txt nor test\.csv"):
        read_benchmark(tmp_path)
    (tmp_path / "train/negative/1.txt").write_text("AC\nGT")
    with pytest.raises(ValueError, match=r"negative/1\.txt: '\\n' in a sequence is no base"):
        read_benchmark(tmp_path)


def test_batches(tmp_path):
    train = read_benchmark(write_folders(tmp_path, TINY)).train
    tokens, lengths, labels = train.select(torch.tensor([4, 1])).padded(7)
    assert tokens.tolist() == [[2, 7, 7], [4, 4, 0]] and tokens.dtype == torch.int64
    assert lengths.tolist() == [1, 3] and labels.tolist() == [1, 0]
    assert [len(part.sequences[0]) for part in train.batches(1)] == [1, 3, 4, 4, 4]
    batches = train.shuffled(2, seed=0)
    for _ in range(3):  # epochs: two batches of two of the five
        seen = [pair for _ in range(2) for part in [next(batches)] for pair in decoded(part)]
        assert len(set(seen)) == 4


def test_a_share_of_each_class_is_held_out():
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 3)
    whole = Labelled([np.array([i]) for i in range(33)], labels)
    kept, out = held_out(whole, 0.2, seed=1)
    assert out.labels.tolist() == [0] * 4 + [1] * 2 + [2]
    ids = [int(s[0]) for s in (*kept.sequences, *out.sequences)]
    assert sorted(ids) == list(range(33)) and kept.labels.tolist() == [int(labels[i]) for i in ids[: len(kept)]]
    assert [int(s[0]) for s in held_out(whole, 0.2, seed=2)[1].sequences] != ids[len(kept) :]
    with pytest.raises(ValueError, match=r"data\.validation=0\.9 leaves none to train on of a class of 3"):
        held_out(whole, 0.9, seed=0)


def test_kmer_shares_are_those_of_a_loop():
    text = "ACGTNACGACGTTTNA"
    for k in (1, 2, 3):
        counts = {"".join(letters): 0 for letters in itertools.product("ACGT", repeat=k)}
        for start in range(len(text) - k + 1):
            if text[start : start + k] in counts:
                counts[text[start : start + k]] += 1
        expected = np.array(list(counts.values())) / sum(counts.values())
        np.testing.assert_allclose(kmer_shares(NucleotideTokenizer().encode(text), k), expected, rtol=1e-6)
    assert not kmer_shares(NucleotideTokenizer().encode("NNNN"), 2).any()
    assert not kmer_shares(NucleotideTokenizer().encode("A"), 2).any()


def test_the_logistic_regression_is_at_its_minimum():
    """Where the penalised loss is least, its gradient, written out, is zero."""
    torch.manual_seed(0)
    x, labels = torch.randn(60, 5), torch.randint(3, (60,))
    weights, bias = _logistic(x, labels, 3, penalty=0.05)
    too_much = torch.softmax(x @ weights + bias, -1) - torch.nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(x.T @ too_much / 60 + 0.05 * weights, torch.zeros(5, 3), rtol=0, atol=1e-3)
    torch.testing.assert_close(too_much.mean(0), torch.zeros(3), rtol=0, atol=1e-3)


def test_the_baseline_tells_compositions_apart():
    draw = np.random.default_rng(0)
    labels = torch.arange(80) % 2
    sequences = [draw.choice(4, 60, p=[0.4, 0.1, 0.1, 0.4] if y else [0.25] * 4).astype(np.uint16) for y in labels]
    whole = Labelled(sequences, labels)
    parts = [whole.select(torch.arange(start, end)) for start, end in ((0, 40), (40, 60), (60, 80))]
    found = kmer_baseline(*parts, classes=2)
    assert found["accuracy"] >= 0.8 and found["k"] in (3, 4, 5)


def test_the_papers_rows():
    assert [TABLE[name]["Titans (LMM)"] for name in TABLE] == [75.2, 89.6, 89.3, 96.6, 79.9]
    assert paper_rows("human_ocr_ensembl")["HyenaDNA"] == 80.9 and paper_rows("mine") == {}
