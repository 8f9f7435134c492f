"""Table 3 of Titans (arXiv 2501.00663): MSE and MAE at a lookback of 96, each the mean over the horizons 96, 192, 336 and 720."""

HORIZONS = (96, 192, 336, 720)

# data set: {model: (MSE, MAE)}
TABLE = {
    "ETTm1": {"Titans (LMM)": (0.358, 0.387), "Simba": (0.383, 0.396), "iTransformer": (0.407, 0.410), "DLinear": (0.403, 0.407)},
    "ETTm2": {"Titans (LMM)": (0.261, 0.309), "Simba": (0.271, 0.327), "iTransformer": (0.288, 0.332), "DLinear": (0.350, 0.401)},
    "ETTh1": {"Titans (LMM)": (0.420, 0.421), "Simba": (0.441, 0.432), "iTransformer": (0.454, 0.447), "DLinear": (0.456, 0.452)},
    "ETTh2": {"Titans (LMM)": (0.336, 0.382), "Simba": (0.361, 0.391), "iTransformer": (0.383, 0.407), "DLinear": (0.559, 0.515)},
    "ECL": {"Titans (LMM)": (0.162, 0.261), "Simba": (0.169, 0.274), "iTransformer": (0.178, 0.270), "DLinear": (0.212, 0.300)},
    "Traffic": {"Titans (LMM)": (0.415, 0.289), "Simba": (0.493, 0.291), "iTransformer": (0.428, 0.282), "DLinear": (0.625, 0.383)},
    "Weather": {"Titans (LMM)": (0.231, 0.265), "Simba": (0.255, 0.280), "iTransformer": (0.258, 0.278), "DLinear": (0.265, 0.317)},
}  # fmt: skip
_FILES = {"electricity": "ECL"}  # as the public file is called


def paper_rows(name: str) -> dict[str, tuple[float, float]]:
    """The rows of a data set, by the name of its file in any spelling; none for a file that the paper does not have."""
    known = {key.lower(): key for key in TABLE} | _FILES
    return TABLE.get(known.get(name.lower(), ""), {})
