"""The forecasting model: its tokens, its norm of a window, and what it cannot see."""

import pytest
import torch

from titans_pretrain.config import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.config.check import check_fields
from titans_pretrain.forecasting.config import ForecastConfig, SeriesConfig
from titans_pretrain.forecasting.model import NORM_EPS, Forecaster
from titans_pretrain.forecasting.series import Windows, split_rows, training_scale
from titans_pretrain.models.rotary import rotation


def model_config(variant: str = "lmm") -> ModelConfig:
    return ModelConfig(
        variant=variant, dim=16, layers=2, heads=2, window=4, persistent_tokens=2, ffn_dim=32,
        memory=MemoryConfig(heads=2, expansion=1, chunk_size=4), mac=MacConfig(segment=4),
    )  # fmt: skip


def forecaster(variant: str = "lmm", horizon: int = 5, **series) -> Forecaster:
    torch.manual_seed(0)
    config = SeriesConfig(**({"lookback": 24, "patch": 6, "stride": 3} | series))
    return Forecaster(model_config(variant), config, horizon).eval()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "variant", ["lmm", "mag", *(pytest.param(v, marks=SLOW) for v in ("mac", "mal", "transformer"))]
)
def test_the_forward_pass_is_that_of_a_loop(variant):
    model = forecaster(variant)
    windows = torch.randn(3, 24) * 5 + 2
    for x, found in zip(windows, model(windows)):
        values = x.tolist()
        mean = sum(values) / 24
        std = (sum((v - mean) ** 2 for v in values) / 24 + NORM_EPS) ** 0.5
        patches = [[(values[start + i] - mean) / std for i in range(6)] for start in range(0, 19, 3)]
        tokens = torch.tensor(patches) @ model.in_proj.weight.T
        by = {4: rotation(torch.arange(7)[None], 4, 10000.0, torch.float32)}
        tokens = tokens[None]
        for layer in model.layers:
            tokens, _ = layer(tokens, None, by, None)
        scale = model.norm.weight * torch.rsqrt(tokens[0].square().mean(-1, keepdim=True) + 1e-6)
        expected = (tokens[0] * scale).reshape(-1) @ model.head.weight.T * std + mean
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_linear_map_is_added_and_both_begin_at_nothing():
    """A fresh forecast is the window's mean."""
    model, x = forecaster(linear_skip=True), torch.randn(3, 24) * 5 + 2
    torch.testing.assert_close(model(x), x.mean(1, keepdim=True).expand(-1, 5))
    plain = forecaster()
    plain.load_state_dict(model.state_dict(), strict=False)
    for part in (model, plain):
        part.head.weight.data = torch.randn(5, 7 * 16, generator=torch.Generator().manual_seed(0))
    model.skip.weight.data = torch.randn(5, 24)
    std = (x.var(1, correction=0) + NORM_EPS).sqrt()
    expected = [
        plain(x)[i] + std[i] * torch.stack([sum(w * v for w, v in zip(row, z)) for row in model.skip.weight])
        for i, z in enumerate((x - x.mean(1, keepdim=True)) / std[:, None])
    ]
    torch.testing.assert_close(model(x), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_shifted_and_stretched_window_has_the_forecast_shifted_and_stretched():
    x = torch.randn(4, 24)
    model = forecaster()
    torch.testing.assert_close(model(100 * x - 7), 100 * model(x) - 7, rtol=1e-3, atol=1e-2)
    plain = forecaster(normalize=False)
    assert (plain(100 * x - 7) - (100 * plain(x) - 7)).abs().max() > 1
    assert torch.isfinite(model(torch.ones(1, 24))).all()  # a window that never changes


def test_dropout_is_of_training_alone():
    model, x = forecaster(head_dropout=0.5), torch.randn(2, 24)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_what_comes_after_a_window_changes_neither_its_forecast_nor_anything_before():
    torch.manual_seed(1)
    values = torch.randn(200, 2, dtype=torch.float64)
    changed = values.clone()
    changed[160:] += 100.0
    rows = split_rows(200, "shares", "mine")
    assert rows["test"] == range(160, 200)
    model = forecaster()

    def forecasts(values: torch.Tensor, part: str) -> torch.Tensor:
        scaled = training_scale(values, rows["train"]).standardized(values).float()
        windows = Windows(scaled, rows[part], 24, 5)
        return model(windows[torch.arange(len(windows))][0])

    for part in ("train", "validation"):
        assert torch.equal(forecasts(values, part), forecasts(changed, part))
    before, after = forecasts(values, "test"), forecasts(changed, "test")
    assert torch.equal(before[:2], after[:2])  # the first test window ends where the changes begin
    assert not torch.equal(before[2:4], after[2:4])


def test_initial_values_reach_every_parameter():
    with torch.device("meta"):
        model = Forecaster(model_config("mag"), SeriesConfig(lookback=24, patch=6, stride=3, linear_skip=True), 5)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(torch.nan)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("series", "told"),
    [
        (
            {"lookback": 25},
            r"lookback=25 is not covered by patches of 16 every 8 rows: 1 are left over; try .*=24 or 32",
        ),
        ({"lookback": 8}, r"series\.patch=16 is longer than series\.lookback=8"),
        ({"horizons": []}, r"series\.horizons = \[\]"),
        ({"horizons": [0]}, r"series\.horizons = \[0\]"),
        ({"horizons": [9.5]}, r"series\.horizons = \[9\.5\]"),
        ({"head_dropout": 1.0}, r"head_dropout must lie in \[0, 1\), got 1\.0"),
        ({"stride": 0}, r"series\.stride must be 1 or more"),
    ],
)
def test_settings_that_do_not_fit(series, told):
    with pytest.raises(ValueError, match=told):
        SeriesConfig(**series)


def test_a_vocabulary_is_refused():
    check_fields(ForecastConfig())
    with pytest.raises(ValueError, match=r"mean nothing for a series"):
        ForecastConfig(model=ModelConfig(vocab_size=8))
