"""Series from CSV files, splits, windows, scaling and errors: against slices and loops."""

import numpy as np
import pytest
import torch

from titans_pretrain.forecasting.baselines import RIDGES, fit_linear, repeat_last
from titans_pretrain.forecasting.metrics import errors
from titans_pretrain.forecasting.paper import TABLE, paper_rows
from titans_pretrain.forecasting.series import Windows, read_series, split_rows, training_scale

HEADER = "date,load,oil\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        (tmp_path / "series.csv").write_text(text)
        return tmp_path / "series.csv"

    return write


def test_a_csv_is_read(write):
    series = read_series(write("\ufeffdate,load,oil\n2016-07-01 00:00:00,5.5,-2\n\n2016-07-01 01:00:00,1e2,3\n"))
    assert series.variates == ["load", "oil"]
    assert torch.equal(series.values, torch.tensor([[5.5, -2], [100, 3]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (HEADER + "a,1,2\nb,1\n", r"series\.csv, line 3: 2 fields, the header has 3"),
        (HEADER + "a,1,2\nb,1,2,3\n", r"line 3: 4 fields"),
        (HEADER + "a,1,2\n\nb,1,x\n", r"line 4: oil is 'x', no finite number"),
        (HEADER + "a,,2\n", r"line 2: load is '', no finite number; fill gaps before"),
        (HEADER + "a,nan,2\n", r"line 2: load is 'nan'"),
        (HEADER + "a,1,inf\n", r"line 2: oil is 'inf'"),
        (HEADER, r"a header and no rows"),
        ("", r"line 1: a header of a date column"),
        ("date\na\n", r"line 1: a header of a date column"),
    ],
)
def test_what_is_no_series_is_named_with_its_line(write, text, told):
    with pytest.raises(ValueError, match=told):
        read_series(write(text))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "series.csv").write_bytes(b"date,load\na,\xff\n")
    with pytest.raises(ValueError, match=r"series\.csv is no CSV"):
        read_series(tmp_path / "series.csv")


def test_the_public_splits():
    months = split_rows(17420, "auto", "ETTh2")
    assert months == {"train": range(8640), "validation": range(8640, 11520), "test": range(11520, 14400)}
    assert split_rows(69680, "auto", "ETTm1")["test"] == range(46080, 57600)
    shares = split_rows(26304, "auto", "electricity")  # of ECL's public file
    assert shares == {"train": range(18412), "validation": range(18412, 21044), "test": range(21044, 26304)}
    assert split_rows(17420, "shares", "ETTh1")["train"] == range(12194)
    with pytest.raises(ValueError, match=r"ETTm1 has 17420 rows, its split of 12, 4 and 4 months needs 57600"):
        split_rows(17420, "auto", "ETTm1")


def test_scaling_knows_the_training_rows_only():
    values = torch.randn(50, 3, dtype=torch.float64) * 4 + 2
    values[:30, 2] = 7.0  # never changes in training
    scaling = training_scale(values, range(30))
    for v in range(2):
        column = values[:30, v].tolist()
        mean = sum(column) / 30
        assert scaling.mean[v] == pytest.approx(mean)
        assert scaling.std[v] == pytest.approx((sum((x - mean) ** 2 for x in column) / 30) ** 0.5)
    assert scaling.mean[2] == 7.0 and scaling.std[2] == 1.0
    changed = values.clone()
    changed[30:] = 1e6
    again = training_scale(changed, range(30))
    assert torch.equal(again.mean, scaling.mean) and torch.equal(again.std, scaling.std)
    torch.testing.assert_close(scaling.standardized(values)[:30, 0].mean(), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_windows_are_slices(part):
    lookback, horizon = 5, 3
    values = torch.arange(40 * 2.0).view(40, 2)
    rows = {"train": range(20), "validation": range(20, 30), "test": range(30, 40)}[part]
    windows = Windows(values, rows, lookback, horizon)
    expected = []
    for end in range(rows.start, rows.stop + 1):  # the row after a window's last target
        start = end - horizon - lookback
        if start >= 0 and end - horizon >= rows.start:
            for variate in range(2):
                expected.append((values[start : start + lookback, variate], values[end - horizon : end, variate]))
    assert len(windows) == len(expected) and windows.count == len(expected) // 2
    x, y = windows[torch.arange(len(windows))]
    for i, (before, after) in enumerate(expected):
        assert torch.equal(x[i], before) and torch.equal(y[i], after)
    # every row of the split is a target; of the first, only what has a whole window before it
    targets = {int(v) // 2 for v in y.flatten()}
    assert targets == set(range(max(rows.start, lookback), rows.stop))


def test_a_split_without_a_window_is_refused():
    with pytest.raises(ValueError, match=r"10 rows of a split hold no window of 5 and 11 rows"):
        Windows(torch.zeros(40, 2), range(20, 30), 5, 11)


def test_every_epoch_has_each_example_once():
    windows = Windows(torch.arange(15.0)[:, None], range(15), 2, 1)  # 13 examples
    batches = windows.shuffled(4, seed=3)
    for _ in range(2):
        firsts = [int(v) for _ in range(3) for v in next(batches)[0][:, 0]]
        assert len(set(firsts)) == 12 and firsts != sorted(firsts)
    whole = torch.cat([x[:, 0] for x, _ in windows.batches(4)])
    assert whole.tolist() == list(range(13))


def test_errors_are_those_of_a_loop():
    torch.manual_seed(0)
    windows = Windows(torch.randn(30, 2), range(30), 4, 3)
    squares, sizes, count = 0.0, 0.0, 0
    for example in range(len(windows)):
        x, y = windows[torch.tensor([example])]
        for value, truth in zip(repeat_last(3)(x)[0].tolist(), y[0].tolist()):
            squares, sizes, count = squares + (value - truth) ** 2, sizes + abs(value - truth), count + 1
    found = errors(repeat_last(3), windows, batch=7)
    assert found["mse"] == pytest.approx(squares / count) and found["mae"] == pytest.approx(sizes / count)


def test_the_linear_baseline_is_the_ridge_that_validates_best():
    torch.manual_seed(0)
    values = torch.randn(200, 2).cumsum(0)
    train, validation = Windows(values, range(120), 6, 2), Windows(values, range(120, 160), 6, 2)

    def ridge(strength: float):
        x, y = (part.double().numpy() for part in train[torch.arange(len(train))])
        mean = x.mean(1, keepdims=True)
        inputs = np.concatenate((x - mean, np.ones_like(mean)), 1)
        scale = (inputs[:, :-1] ** 2).sum() / 6
        # rows that pull every weight but the intercept to zero
        pull = np.sqrt(strength * scale) * np.eye(7)[:6]
        weights = np.linalg.lstsq(
            np.concatenate((inputs, pull)), np.concatenate((y - mean, np.zeros((6, 2)))), rcond=None
        )[0]

        def forecast(x):
            x = x.double().numpy()
            mean = x.mean(1, keepdims=True)
            return torch.from_numpy(np.concatenate((x - mean, np.ones_like(mean)), 1) @ weights + mean)

        return forecast

    best = min(map(ridge, RIDGES), key=lambda f: errors(f, validation, 64)["mse"])
    x, _ = validation[torch.arange(10)]
    torch.testing.assert_close(fit_linear(train, validation, batch=50)(x).double(), best(x), rtol=1e-4, atol=1e-4)


def test_the_papers_rows_are_found_by_the_names_of_the_public_files():
    assert paper_rows("ETTh1")["Titans (LMM)"] == (0.420, 0.421)
    assert paper_rows("electricity") == TABLE["ECL"] and paper_rows("weather") == TABLE["Weather"]
    assert paper_rows("mine") == {}
