"""Tests of the parts of tools/claims.py and tools/why.py that do not train.

    python -m pytest tests/test_claims.py
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

import claims
import why
from ar import AR
from tokenizer import Tokenizer

SHIPPED = ROOT / "checkpoints" / "fashion_mnist"


def test_k_means_codes_tell_more_with_every_token():
    codes = claims.residual_k_means(num_tokens=2, size=8, seed=0)
    train = claims.pixels("train")
    assert codes["train"].shape == (len(train), 2)
    assert codes["val"].max() < 8
    rest = train - train.mean(0)
    errors = [np.square(rest).mean()]
    for token in codes["train"].T:
        for code in range(8):
            rest[token == code] -= rest[token == code].mean(0)
        errors.append(np.square(rest).mean())
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.97 * errors[1]


def test_other_prologues_replace_the_learned_one_and_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    config = json.dumps({"tokenizer": {"num_prologue": 3, "prologue_codebook_size": 16}})
    before = {}
    for name in ("codes.npz", "codes_val.npz"):
        before[name] = dict(codes=rng.integers(0, 16, (40, 1, 3 + 4)).astype(np.uint16),
                            labels=rng.integers(0, 10, 40), config=config)
        np.savez(tmp_path / name, **before[name])
    for kind in ("constant", "shuffled", "class"):
        target = tmp_path / kind
        claims.write_tokens(tmp_path, target, kind, seed=0)
        for name, old in before.items():
            new = np.load(target / name)
            assert np.array_equal(new["codes"][..., 3:], old["codes"][..., 3:])
            prologue = new["codes"][:, 0, :3]
            if kind == "constant":
                assert not prologue.any()
            elif kind == "class":
                assert np.array_equal(prologue[:, 0], old["labels"])
                assert not prologue[:, 1:].any()
            else:
                learned = old["codes"][:, 0, :3]
                assert not np.array_equal(prologue, learned)
                assert sorted(map(tuple, prologue)) == sorted(map(tuple, learned))


def test_every_row_takes_the_tokenizer_of_one_that_trains_it(tmp_path):
    cells = claims.build_cells(tmp_path, [0], threads=1)
    for (name, seed), cell in cells.items():
        source = cells[cell.row.tokenizer or name, seed]
        assert not source.row.tokenizer
        assert cell.tokenizer_folder() == source.out
        assert cell.row.stage2 == source.row.stage2, name
        assert cell.row.full == source.row.full, name
        if cell.row.init:
            frozen = cells[cell.row.init, seed].row
            assert frozen.stage1 == cell.row.stage1
            assert frozen.full == cell.row.full
    assert len({cell.out for cell in cells.values()}) == len(cells)


class Shipped(why.Pair):
    """The shipped pair in the place of a cell, with random codes."""

    def __init__(self):
        self.tokenizer = Tokenizer.load(SHIPPED / "tokenizer.safetensors")
        self.ar = AR.load(SHIPPED / "ar.safetensors")
        self.codes = torch.randint(64, (6, 8 + 49), generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(6)
        self.cell = {"settings_no_cfg": {"temperature": 0.8}}
        self.k = 8
        self.grid = 7


@torch.no_grad()
def test_measures_of_why():
    pair = Shipped()
    measured = pair.ar.measure(pair.codes, pair.labels)
    rows = why.nats_by_row(pair)
    assert rows.shape == (7,)
    assert rows.sum().item() == pytest.approx(measured["nats_visual"].mean().item(), rel=1e-4)

    unknown = pair.ar.measure(pair.codes, torch.full((6,), 10))
    for name, saved in zip(("nats_prologue", "nats_visual"), why.class_nats(pair)):
        assert saved == pytest.approx((unknown[name] - measured[name]).mean().item(), rel=1e-3)

    # All rows but the last given: completions and reconstructions have the same upper rows, nearly
    drawn = why.Completions(pair, kept=6, count=6)[0:6]
    assert drawn.shape == (6, 28, 28, 3)
    others = why.Completions(pair, kept=0, count=6)[0:6]
    whole = pair.tokenizer.decode(pair.codes).permute(0, 2, 3, 1).numpy() * 127.5 + 128
    near = np.abs(drawn[:, :12] - whole[:, :12]).mean()
    far = np.abs(others[:, :12] - whole[:, :12]).mean()
    assert near < 0.3 * far
