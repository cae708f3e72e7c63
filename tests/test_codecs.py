"""What codecs promise: error, size, the same bits each time, NaN and Inf noticed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.errors import ConfigError
from longspan.outer.compress import codec
from longspan.planner.sites import _SENT

NAMES = ("fp32", "bf16", "int8", "int4", "e3m0")


def there_and_back(name: str, values: torch.Tensor) -> torch.Tensor:
    codes = torch.zeros(codec(name).wire_bytes(len(values), values.dtype), dtype=torch.uint8)
    assert codec(name).encode(values, codes)
    again = torch.full_like(codes, 255)
    assert codec(name).encode(values, again) and torch.equal(codes, again)
    decoded = torch.full_like(values, torch.nan)
    codec(name).decode(codes, decoded)
    return decoded


def plain(name: str, values: torch.Tensor) -> torch.Tensor:
    """Each number rounded to the nearest code, one block after another."""
    if name in ("fp32", "bf16"):
        return values if name == "fp32" else values.bfloat16().to(values.dtype)
    levels = {
        "int8": torch.arange(-127, 128) / 127,
        "int4": torch.arange(-7, 9) / 8,
        "e3m0": torch.tensor([0.0, *(s * 2.0**-k for k in range(7) for s in (1, -1))]),
    }[name]
    levels = levels.double().sort().values
    size = 64 if name == "int4" else 128
    blocks = torch.cat([values, values.new_zeros(-len(values) % size)]).double().view(-1, size)
    scales = blocks.abs().amax(1, keepdim=True).float().clamp(min=1e-30).bfloat16().double()
    if name == "int4":
        scales *= blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).sign()
    scaled = (blocks / scales).nan_to_num(0.0)  # a block of zeros has no sign
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
    return (levels[codes] * scales).view(-1)[: len(values)].to(values.dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=20)
@given(
    numel=st.sampled_from([0, 1, 63, 64, 127, 128, 129, 255, 257, 1000, 131072, 131200, 262200]),
    power=st.floats(-20, 10),
)
def test_numbers_come_back_as_the_nearest_codes(
    name: str, dtype: torch.dtype, numel: int, power: float
) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel), dtype=dtype)
    values *= 10**power
    found, expected = there_and_back(name, values), plain(name, values)
    if name in ("fp32", "bf16"):
        assert torch.equal(found, expected)
    elif numel:
        # A number in the very middle between two codes may go to either.
        error, least = (found - values).abs(), (expected - values).abs()
        scale = values.abs().max()
        assert (error <= least + 1e-3 * scale).all()
        assert ((found - expected).abs() > 1e-5 * scale).float().mean() < 0.005


@pytest.mark.parametrize("name", NAMES)
def test_extremes(name: str) -> None:
    values = torch.zeros(1000)
    assert (there_and_back(name, values) == 0).all()
    values[::7] = 1e-38
    assert torch.isfinite(there_and_back(name, values)).all()
    values[500] = -9e34
    found = there_and_back(name, values)
    torch.testing.assert_close(found[500], values[500], rtol=0.005, atol=0)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 999):
            spoilt = values.clone()
            spoilt[place] = wrong
            codes = torch.zeros(codec(name).wire_bytes(1000), dtype=torch.uint8)
            assert not codec(name).encode(spoilt, codes)


def test_sizes() -> None:
    sizes = {name: 4 * 2**20 / codec(name).wire_bytes(2**20) for name in NAMES}
    assert sizes["fp32"] == 1 and sizes["bf16"] == 2
    assert sizes["int4"] >= 7.5 and sizes["e3m0"] >= 7.5 and sizes["int8"] > 3.9
    assert codec("fp32").wire_bytes(10, torch.float64) == 80
    for name, bits in _SENT.items():  # the planner's
        assert codec(name).wire_bytes(2**20) * 8 == bits * 2**20
    with pytest.raises(ConfigError, match="unknown codec 'fp3'"):
        codec("fp3")


@pytest.mark.parametrize(("name", "least"), [("e3m0", 0.98), ("int4", 0.995)])
def test_the_mean_of_codes_points_where_the_exact_mean_does(name: str, least: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sites = [torch.randn(2**18, generator=generator) for _ in range(2)]
    exact, found = sum(sites), sum(there_and_back(name, site) for site in sites)
    assert torch.cosine_similarity(exact, found, dim=0) >= least
