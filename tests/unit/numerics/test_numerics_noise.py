"""Noise is provably Philox, and a function of key and global coordinates alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fp4pretrain.numerics import Noise, QuantSpec, derive_key, emulate, random_signs
from fp4pretrain.numerics.noise import noise_bytes, noise_words, philox

KAT = json.loads((Path(__file__).parents[2] / "golden" / "philox4x32.json").read_text())["rows"]
CPU = torch.device("cpu")


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("rounds, counter, key, out", KAT)
def test_philox_meets_the_published_vectors(rounds: int, counter: str, key: str, out: str) -> None:
    low, high = words(key)
    got = philox(tuple(words(counter)), high << 32 | low, rounds=rounds)
    assert list(got) == words(out)
    tensors = tuple(torch.tensor([word]) for word in words(counter))
    got = philox(tensors, high << 32 | low, rounds=rounds)
    assert [int(word) for word in got] == words(out)


def test_bytes_are_those_of_the_documented_counter() -> None:
    noise = Noise(0x0123456789ABCDEF, row_offset=70, col_offset=48)
    got = noise_bytes(noise, (300, 64), CPU)
    for row, col in ((0, 0), (5, 17), (299, 63)):
        call = philox(((col + 48) // 16, row + 70, 0, 0), noise.key)
        j = (col + 48) % 16
        assert got[row, col].item() == call[j // 4] >> (8 * (j % 4)) & 0xFF


def test_words_are_those_of_the_documented_counter() -> None:
    noise = Noise(0xFEDCBA9876543210, row_offset=3, col_offset=6)
    got = noise_words(noise, (40, 30), CPU)
    for row, col in ((0, 0), (5, 17), (39, 29)):
        call = philox(((col + 6) // 4, row + 3, 1, 0), noise.key)
        assert got[row, col].item() == call[(col + 6) % 4] >> 8


@pytest.mark.parametrize("draw", [noise_bytes, noise_words])
@pytest.mark.parametrize("row, col", [(0, 0), (37, 16), (200, 21), (1, 96)])
def test_a_slice_draws_what_the_whole_draws_there(draw, row: int, col: int) -> None:
    whole = draw(Noise(9), (1100, 128), CPU)
    part = draw(Noise(9, row, col), (70, 32), CPU)
    assert torch.equal(part, whole[row : row + 70, col : col + 32])


@pytest.mark.parametrize("draw", [noise_bytes, noise_words])
def test_a_shard_in_parts_draws_what_the_whole_draws_there(draw) -> None:
    """Two pieces of 32 rows (and of 64 columns) that lie 96 rows (192 columns) apart."""
    whole = draw(Noise(9), (128, 256), CPU)
    rows = draw(Noise(9, row_offset=8, row_part=32, row_gap=32), (64, 256), CPU)
    assert torch.equal(rows, torch.cat((whole[8:40], whole[72:104])))
    cols = draw(Noise(9, col_offset=16, col_part=64, col_gap=32), (128, 128), CPU)
    assert torch.equal(cols, torch.cat((whole[:, 16:80], whole[:, 112:176]), 1))


@pytest.mark.parametrize("rounding", ["stochastic", "stochastic_full"])
@pytest.mark.parametrize("spec", [QuantSpec("nvfp4"), QuantSpec("mxfp4", "2d")], ids=str)
def test_a_shard_rounds_like_the_whole(rounding: str, spec: QuantSpec) -> None:
    spec = QuantSpec(spec.format, spec.block, rounding=rounding)
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    amax = x.abs().max()
    whole, _ = emulate(x, spec, noise=Noise(3), amax=amax)
    part, _ = emulate(x[64:, 32:96], spec, noise=Noise(3, 64, 32), amax=amax)
    assert torch.equal(part, whole[64:, 32:96])


@pytest.mark.parametrize("rounding", ["stochastic", "stochastic_full"])
def test_a_key_replays_and_another_differs(rounding: str) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec("nvfp4", rounding=rounding)
    first = emulate(x, spec, noise=Noise(derive_key(1, 2, 3)))[0]
    assert torch.equal(first, emulate(x, spec, noise=Noise(derive_key(1, 2, 3)))[0])
    assert not torch.equal(first, emulate(x, spec, noise=Noise(derive_key(1, 2, 4)))[0])
    assert not torch.equal(first, emulate(x, spec, noise=Noise(derive_key(1, 2, 3), 1))[0])


def test_bytes_are_uniform_and_independent() -> None:
    """Chi-square over the 256 values; correlations of neighbours, of keys and of the halves."""
    k = noise_bytes(Noise(derive_key(5)), (1024, 1024), CPU)
    expected = k.numel() / 256
    chi2 = ((torch.bincount(k.flatten().long(), minlength=256) - expected) ** 2 / expected).sum()
    assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5
    u = (k.double() - 127.5) / 73.9
    other = (noise_bytes(Noise(derive_key(6)), (1024, 1024), CPU).double() - 127.5) / 73.9
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u[:, 16:], u[:, :-16]), (u, other)):
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5


def test_derive_key_is_a_chain_of_splitmix64() -> None:
    """The first output of splitmix64 seeded 1234567, as published with its reference code."""
    assert derive_key(1234567) == 6457827717110365317
    keys = [derive_key(1, 2, 3), derive_key(1, 3, 2), derive_key(1, 2), derive_key(1, 2, 0),
            derive_key(2, 1, 3), derive_key(-1), derive_key(1)]  # fmt: skip
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**64 for key in keys)


def test_random_signs() -> None:
    signs = random_signs(derive_key(7), 128)
    assert set(signs) == {1, -1} and len(signs) == 128
    assert (
        random_signs(derive_key(7), 16) == signs[:16] and random_signs(derive_key(8), 128) != signs
    )
    total = sum(sum(random_signs(derive_key(i), 128)) for i in range(200))
    assert abs(total) < 5 * (128 * 200) ** 0.5
