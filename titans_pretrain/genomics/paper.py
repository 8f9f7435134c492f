"""Table 4 of Titans (arXiv 2501.00663): top-1 accuracy in percent on five sets of GenomicsBenchmarks."""

# data set, as genomic-benchmarks calls it: {model: accuracy}; a model that the paper has no figure of is left out
TABLE = {
    "human_enhancers_cohn": {
        "Titans (LMM)": 75.2, "Based": 74.6, "Transformer++": 73.4, "HyenaDNA": 74.2, "Mamba": 73.0, "CNN": 69.5,
    },
    "human_enhancers_ensembl": {"Titans (LMM)": 89.6, "Based": 89.5, "Transformer++": 89.5, "HyenaDNA": 89.2, "CNN": 68.9},
    "human_ensembl_regulatory": {"Titans (LMM)": 89.3, "Based": 89.5, "Transformer++": 89.9, "HyenaDNA": 93.8, "CNN": 93.3},
    "human_nontata_promoters": {
        "Titans (LMM)": 96.6, "Based": 96.8, "Transformer++": 94.4, "HyenaDNA": 96.6, "Mamba": 96.6, "CNN": 84.6,
    },
    "human_ocr_ensembl": {"Titans (LMM)": 79.9, "Based": 79.0, "Transformer++": 79.5, "HyenaDNA": 80.9, "CNN": 68.0},
}  # fmt: skip


def paper_rows(name: str) -> dict[str, float]:
    """The rows of a data set, by its folder's name; none for one that the paper does not have."""
    return TABLE.get(name, {})
