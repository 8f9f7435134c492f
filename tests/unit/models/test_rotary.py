"""Rotary positions: what a rotation must do, where its angles are taken, and what carries no position at all."""

import math

import pytest
import torch
from torch.testing import assert_close

from titans_pretrain.config.model import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.models import build_model
from titans_pretrain.models.rotary import rotate, rotation, without_position

FAR = 2_000_000
THETA = 10000.0


def vectors(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by(position, rotary_dim=8, theta=THETA, dtype=torch.float64):
    return rotation(torch.tensor([[position]]), rotary_dim, theta, dtype)


@pytest.mark.parametrize("i, j", [(5, 5), (7, 2), (300, 11), (2, 9)])
@pytest.mark.parametrize("shift", [1, 4096, FAR])
def test_scores_depend_on_the_distance_only(i, j, shift):
    q, k = vectors(1, 1, 3, 12), vectors(1, 1, 3, 12, seed=1)

    def scores(a, b):
        return (rotate(q, by(a)) * rotate(k, by(b))).sum(-1)

    assert_close(scores(i + shift, j + shift), scores(i, j), rtol=0, atol=1e-8)  # an angle of 2e6 has an ulp of 2e-10
    if i != j:
        assert (scores(i, j) - scores(j, i)).abs().min() > 1e-3  # and on its sign
        assert (scores(i, j) - scores(i + 1, j)).abs().min() > 1e-3


@pytest.mark.parametrize("position", [0, 1, 77, FAR])
def test_norms_are_kept_and_the_rest_is_untouched(position):
    x = vectors(1, 1, 3, 12)
    y = rotate(x, by(position))
    assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)
    assert torch.equal(y[..., 8:], x[..., 8:])
    assert torch.equal(y, x) == (position == 0)


def test_each_plane_turns_by_its_own_frequency():
    """Dimensions i and i + half; counter-clockwise; theta^(-2i / rotary_dim) radians per token."""
    for i in range(4):
        x = torch.zeros(1, 1, 1, 12, dtype=torch.float64)
        x[..., i] = 1
        y = rotate(x, by(3)).flatten()
        angle = 3 * THETA ** (-2 * i / 8)
        expected = torch.zeros(12, dtype=torch.float64)
        expected[i], expected[i + 4] = math.cos(angle), math.sin(angle)
        assert_close(y, expected, rtol=1e-14, atol=1e-15)


def test_angles_are_taken_in_float64():
    """At two million tokens, whatever dtype is asked for. Angles in float32 are off by more than a percent of a turn there."""
    positions = torch.arange(FAR - 50, FAR + 50)[None]
    cos, sin = rotation(positions, 16, THETA, torch.float32)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (1, 100, 1, 8)
    angles = [[p * THETA ** (-i / 8) for i in range(8)] for p in positions[0].tolist()]
    for found, function in ((cos, math.cos), (sin, math.sin)):
        expected = torch.tensor([[function(a) for a in row] for row in angles], dtype=torch.float64)
        assert_close(found[0, :, 0].double(), expected, rtol=0, atol=1e-7)
        exponent = torch.arange(0, 16, 2, dtype=torch.float32) / 16
        single = getattr((positions[0, :, None].float() * THETA**-exponent).double(), function.__name__)()
        assert (single - expected).abs().max() > 0.02


def test_padding_has_the_rotation_of_a_first_token():
    cos, sin = rotation(torch.tensor([[-1, 0]]), 4, THETA, torch.float64)
    assert (cos == 1).all() and (sin == 0).all()


def test_without_position_leaves_nothing_to_turn():
    k = vectors(2, 3, 12)
    bare = without_position(k, 8)
    assert torch.equal(bare[..., 8:], k[..., 8:]) and not bare[..., :8].any()


def small(variant, **options):
    config = ModelConfig(
        variant, dim=16, layers=2, heads=2, vocab_size=31, window=6, persistent_tokens=3, ffn_dim=24,
        memory=MemoryConfig(heads=2, chunk_size=4), **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return build_model(config).double()


@pytest.mark.parametrize(
    "variant, mac",
    [("transformer", {}), ("mag", {}), ("mal", {}), ("mac", {}), ("mac", dict(memory_tokens=2))],
    ids=["transformer", "mag", "mal", "mac", "mac-queries"],
)
def test_a_shifted_document_gives_the_same_logits(variant, mac):
    """Persistent and queried keys have no position, so no score knows where the document stands."""
    model = small(variant, mac=MacConfig(segment=8, **mac))
    tokens = torch.randint(0, 31, (2, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(20).expand(2, -1).contiguous()
    here = model(tokens, positions=positions).logits
    for shift in (40, FAR):
        assert_close(model(tokens, positions=positions + shift).logits, here, rtol=0, atol=1e-8)
    doubled = model(tokens, positions=2 * positions).logits  # the distances do matter
    assert (doubled - here).abs().max() > 1e-4


def test_position_of_the_next_token():
    """T further on; after positions, one more than the last; after padding a new document's first."""
    model = small("lmm")
    tokens = torch.zeros(3, 8, dtype=torch.int64)
    positions = torch.tensor([[*range(8)], [*range(5), -1, -1, -1], [*range(40, 48)]])
    state = model(tokens, positions=positions).state
    assert state.position.tolist() == [8, 0, 48]
    assert model(tokens).state.position.tolist() == [8, 8, 8]
    assert model(tokens, state=model(tokens).state).state.position.tolist() == [16, 16, 16]
