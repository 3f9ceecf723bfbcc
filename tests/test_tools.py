"""Tests of the tools that measure and draw, with the shipped pair and a few images.

    python -m pytest tests/test_tools.py
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

import sample
import sweep
import watch
from ar import AR, ARConfig
from pretokenize import BUNDLED, Images
from tokenizer import SIZES, InputError, Tokenizer, TokenizerConfig, to_float, to_uint8

SHIPPED = ROOT / "checkpoints" / "fashion_mnist"


def run(monkeypatch, name, *args):
    """Runs a script in this process, as if `args` were its command line."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    importlib.import_module(name).main()


def run_script(path, *args):
    """Runs a script in a process of its own: exit code and stderr."""
    result = subprocess.run([sys.executable, ROOT / path, *map(str, args)], capture_output=True,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return result.returncode, result.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with 16 training and 8 held-out images of two classes."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 8), ("val", 4)):
        images = Images(BUNDLED / split)
        for label in (0, 1):
            name = images.classes[label]
            (folder / split / name).mkdir(parents=True)
            numbers = (images.labels == label).nonzero()[:count, 0].tolist()
            for i in numbers:
                images.open(i).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The --out folder of two steps of OneStage, which makes both a tokenizer and an AR model."""
    out = tmp_path_factory.mktemp("trained")
    code, errors = run_script("train_stage1.py", "--data", data / "train", "--out", out,
                              "--onestage", "--steps", 2, "--batch_size", 4, "--gan_weight", 0)
    assert code == 0, errors
    return out


# Images


def test_check_images_names_those_that_cannot_be_read(monkeypatch, capsys, tmp_path, data):
    run(monkeypatch, "check_images", data / "val")
    assert "8 images, 2 classes of 4 to 4 images" in capsys.readouterr().out
    broken = shutil.copytree(data / "val", tmp_path / "val")
    path = next(broken.glob("*/*.png"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, "check_images", broken)
    said = capsys.readouterr().out
    assert f"{path} cannot be read" in said
    assert "\n1 cannot be read" in said
    assert "28 to 28 pixels" in said


# Sweep


def test_sweep_writes_all_combinations_best_first(monkeypatch, tmp_path, data):
    run(monkeypatch, "sweep", "cfg_visual=3,1", "temperature=0.5,1", "top_k=5", "--num", 8,
        "--reference", data / "train", "--out", tmp_path)
    result = json.loads((tmp_path / "sweep.json").read_text())
    rows = result["rows"]
    assert result["swept"] == ["cfg_visual", "temperature", "top_k"]
    tried = {(row["cfg_visual"], row["temperature"], row["top_k"]) for row in rows}
    assert tried == {(1, 0.5, 5), (1, 1, 5), (3, 0.5, 5), (3, 1, 5)}
    gfid = [row["gfid"] for row in rows]
    assert gfid == sorted(gfid)
    assert min(gfid) > 0
    assert all(row["inception_score"] >= 1 for row in rows)
    assert result["num"] == 8
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "sweep.png").stat().st_size > 1000


@torch.no_grad()
def test_sweep_measures_the_images_that_sample_py_draws(monkeypatch, tmp_path):
    run(monkeypatch, "sample", "--num", 8, "--columns", 1, "--cfg_visual", 3, "--batch_size", 8,
        "--out", tmp_path)
    expected = np.load(tmp_path / "samples.npz")["arr_0"]
    tokenizer = Tokenizer.load(SHIPPED / "tokenizer.safetensors")
    ar = AR.load(SHIPPED / "ar.safetensors")
    sample.pack_for_cpu(ar)
    settings = sample.preset_settings("tiny") | {"cfg_visual": 3.0}
    autocast = torch.autocast("cpu", enabled=False)
    samples = sweep.Samples(tokenizer, ar, 8, seed=0, settings=settings, autocast=autocast)
    assert np.array_equal(samples[0:8], expected)


@pytest.mark.parametrize(
    "axes, sentence",
    [
        (["scale=1"], "NAME is one of cfg_visual"),
        (["cfg_visual"], "NAME=VALUE"),
        (["cfg_visual=1,two"], "'two' is not a finite number"),
        (["top_k=1.5"], "'1.5' is not a whole number"),
        (["cfg_schedule=round"], "not one of constant, linear, cosine"),
        (["top_p=0.5", "top_p=0.9"], "top_p is given twice"),
    ],
)
def test_sweep_refuses_what_it_cannot_vary(axes, sentence):
    with pytest.raises(InputError, match=sentence):
        sweep.read_axes(axes)


def test_a_refusal_is_one_line_and_exit_code_1(tmp_path):
    code, errors = run_script("tools/sweep.py", "scale=1", "--out", tmp_path)
    assert code == 1
    assert len(errors.splitlines()) == 1


# Watch


def lines_of(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_watch_measures_what_is_new_and_only_that(monkeypatch, tmp_path, trained, capsys):
    for name in ("tokenizer.safetensors", "ar.safetensors", "train_stage1.pt"):
        shutil.copy(trained / name, tmp_path)
    log = tmp_path / "watch.jsonl"
    once = (tmp_path, "--once", "--num", 4, "--eval_images", 6)

    run(monkeypatch, "watch", *once)
    of_tokenizer, of_ar = lines_of(log)
    for line in (of_tokenizer, of_ar):
        assert line["step"] == 2
        assert line["images"] == 8
    assert of_tokenizer["val_rfid"] > 0
    assert of_tokenizer["val_psnr"] > 0
    assert of_ar["val_gfid"] > 0
    assert of_ar["val_gfid_no_cfg"] > 0
    assert of_ar["val_inception_score"] >= 1

    before = log.read_text()
    run(monkeypatch, "watch", *once)
    assert log.read_text() == before

    # The same step once more, as after a run that was started anew: it takes the place of the old
    os.utime(tmp_path / "tokenizer.safetensors", (1, 1))
    run(monkeypatch, "watch", *once)
    assert [line["file"] for line in lines_of(log)] == ["ar.safetensors", "tokenizer.safetensors"]
    assert lines_of(log)[1]["saved"] == 1

    # An AR model of another tokenizer
    before = log.read_text()
    shutil.copy(SHIPPED / "ar.safetensors", tmp_path)
    run(monkeypatch, "watch", *once)
    assert "not measured" in capsys.readouterr().out
    assert log.read_text() == before


def test_watch_of_a_stage_2_run_takes_the_tokenizer_of_another_folder(monkeypatch, tmp_path, data):
    shutil.copy(SHIPPED / "ar.safetensors", tmp_path)
    run(monkeypatch, "watch", tmp_path, "--once", "--num", 4, "--reference", data / "train",
        "--tokenizer", SHIPPED / "tokenizer.safetensors")
    lines = lines_of(tmp_path / "watch.jsonl")
    assert [line["file"] for line in lines] == ["ar.safetensors"]


def test_watch_once_says_that_nothing_is_there(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        run(monkeypatch, "watch", tmp_path, "--once")


def test_held_out_images_are_spread_over_the_classes(data):
    held_out = watch.HeldOut(data / "val", 4, size=28)
    assert held_out.images.labels[held_out.indices].tolist() == [0, 0, 1, 1]
    assert held_out[1:3].shape == (2, 28, 28, 3)
    assert len(watch.HeldOut(data / "val", 1000, size=28)) == 8


# Curves


def test_curves_of_a_log(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    lines = [{"step": 1, "images": 4, "ce": 2.0}, {"step": 1, "val_nats": 5.0},
             {"step": 2, "images": 8, "ce": 1.0}, {"step": 2, "val_nats": 4.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "train_ar.jsonl").write_text(text + '{"step": 3, "ima')  # cut off by a kill
    for x in ("step", "images"):
        picture = tmp_path / f"{x}.png"
        run(monkeypatch, "curves", tmp_path, "--keys", "ce", "val_nats", "--x", x, "--path",
            picture)
        assert picture.stat().st_size > 1000
    with pytest.raises(InputError, match="holds no val_gfid; it has ce, images, step, val_nats"):
        run(monkeypatch, "curves", tmp_path, "--keys", "val_gfid")
    with pytest.raises(InputError, match="does not exist"):
        run(monkeypatch, "curves", tmp_path, "--log", "watch.jsonl")

    import curves

    entries = curves.read_log(tmp_path / "train_ar.jsonl")
    curves.add_images("the log", entries)
    assert [entry["images"] for entry in entries] == [4, 4, 8, 8]


# Attention, fixed prologues, probe


def test_attention_leaves_its_pictures(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command = ("--out", tmp_path, "--images", 10, "--classes", "bag", 9)
    run(monkeypatch, "attention", *command)
    for name in ("ar_attention.png", "prologue_attention.png", "encoder_attention.png"):
        assert (tmp_path / name).stat().st_size > 10000
    lines = capsys.readouterr().out.splitlines()
    shares = {}
    for line in lines:
        if line.startswith("attention to "):
            name, *layers = line.removeprefix("attention to ").split("layer ")
            shares[name.strip()] = [float(layer.split(":")[1]) for layer in layers]
    # The model has learned to look at the row above, and at the prologue all along
    assert max(shares["above"]) > 0.2
    assert min(shares["prologue"]) > 0.1
    assert all(0 <= share <= 1 for layers in shares.values() for share in layers)


def test_the_map_of_a_patch_is_of_the_position_that_predicts_it():
    pytest.importorskip("matplotlib")
    import attention

    ar = AR.load(SHIPPED / "ar.safetensors")
    k = ar.cfg.num_prologue
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(64, (2, k + ar.cfg.num_visual), generator=generator)
    labels = torch.tensor([0, 9])
    weights = attention.prologue_weights(ar, codes, labels)  # (2, K, N)
    assert weights.shape == (2, k, ar.cfg.num_visual)
    assert weights.min() > 0 and weights.sum(1).max() < 1
    # Another code in patch 20 is seen by the patches behind it, and not by its own
    codes[:, k + 20] = 100
    other = attention.prologue_weights(ar, codes, labels)
    same = torch.isclose(weights, other, atol=1e-7).all(1).all(0)  # (N,)
    assert same[:21].all()
    assert not same[21:].any()


def test_a_shared_prologue_brings_images_closer(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "fixed_prologue", "--out", tmp_path, "--pairs", 40)
    same, other = capsys.readouterr().out.splitlines()[1:]
    for measure in ("pixel distance", "feature distance"):
        distances = [float(line.split(measure)[1].split()[0]) for line in (same, other)]
        assert distances[0] < distances[1]


def test_probe_learns_what_is_linear(monkeypatch):
    import probe

    # Features with a centre for each class, and each number of another scale
    images = Images(BUNDLED / "val")
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for name, dim in (("hidden", 96), ("codes", 8)):
        centres = 6 * torch.randn(len(images.classes), dim, generator=generator)
        noise = torch.randn(len(images), dim, generator=generator)
        rows[name] = (centres[images.labels] + noise) * torch.logspace(-3, 3, dim)
    monkeypatch.setattr(probe, "features", lambda *_: rows)
    tokenizer = Tokenizer.load(SHIPPED / "tokenizer.safetensors")
    args = argparse.Namespace(epochs=10, batch_size=100, lr=0.1, augment=False, num_workers=0)
    probes = probe.train(tokenizer, images, 8, args, torch.device("cpu"))
    for name in rows:
        top1, top5 = probe.accuracy(probes[name], rows[name], images.labels, torch.device("cpu"))
        assert 0.95 < top1 <= top5 <= 1


def test_parts_of_the_probe():
    import probe

    # Warmup, peak, cosine to 0
    rates = [probe.learning_rate(step / 90, peak=0.4) for step in (5, 10, 50, 90)]
    assert rates == pytest.approx([0.2, 0.4, 0.2, 0])

    # Top-1 and top-5: the right class comes first, second, sixth
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [8, 9, 7, 6, 5, 4], [4, 9, 8, 7, 6, 5]])
    scores = probe.accuracy(torch.nn.Identity(), logits, torch.tensor([0, 0, 0]), "cpu")
    assert scores == pytest.approx((1 / 3, 2 / 3))

    # Random crops depend on the epoch and the image alone, and a crop is as large as an image
    images = Images(BUNDLED / "val")
    crops = [probe.resized_crop(images.open(0), 16, random.Random(i)) for i in range(100)]
    assert all(crop.shape == (16, 16, 3) for crop in crops)
    tokenizer = Tokenizer.load(SHIPPED / "tokenizer.safetensors")
    images.names = images.names[:5]
    first = probe.features(tokenizer, images, 8, num_workers=0, epoch=0)
    assert first["hidden"].shape == (5, 96)
    assert first["codes"].shape == (5, 8)
    again = probe.features(tokenizer, images, 8, num_workers=2, epoch=0)
    second = probe.features(tokenizer, images, 8, num_workers=0, epoch=1)
    assert torch.equal(first["hidden"], again["hidden"])
    assert not torch.isclose(first["hidden"], second["hidden"]).all(1).any()


def test_probe(monkeypatch, data, tmp_path, capsys):
    plain = tmp_path / "2d.safetensors"
    Tokenizer(TokenizerConfig(layout="2d", **SIZES["tiny"])).save(plain)
    shipped = SHIPPED / "tokenizer.safetensors"
    command = ("--data", data / "train", "--epochs", 2)

    # As many tokens as the prologue has, also of the tokenizer without one
    for more in ([], ["--augment", "--num_workers", 0]):
        run(monkeypatch, "probe", shipped, plain, *command, *more)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        for line, layout in zip(lines, ("prologue", "2d")):
            assert f"({layout}, first 8 tokens)" in line
            scores = [float(word) for word in line.split() if word[:2] in ("0.", "1.")]
            assert len(scores) == 4
            assert all(0 <= score <= 1 for score in scores)
            assert scores[1] == scores[3] == 1  # there are fewer than five classes
    with pytest.raises(InputError, match="2d.safetensors has no prologue: --tokens"):
        run(monkeypatch, "probe", plain, *command)
    with pytest.raises(InputError, match="has only 8 of the 9 tokens"):
        run(monkeypatch, "probe", shipped, *command, "--tokens", 9)


# The page


def slider_minimum(page, label):
    """The left end of the slider with that label, or None if the page has none."""
    for block in page.blocks.values():
        if getattr(block, "label", None) == label:
            return block.minimum
    return None


def test_buttons_of_the_page():
    import demo

    tokenizer = Tokenizer.load(SHIPPED / "tokenizer.safetensors")
    session = demo.Session(tokenizer, AR.load(SHIPPED / "ar.safetensors"), columns=3)
    chosen = [2.0, 1.0, 0.25, 1.0, 1.0]
    pictures, prologue, table, _ = session.resample_all("bag", 0, *chosen)
    assert len(pictures) == 3
    assert pictures[0].shape == (28, 28, 3)
    assert table[1] == [2, *prologue[1].tolist()]

    _, kept, _, seed, _ = session.keep_prologue("bag", 0, 2, prologue, *chosen)
    assert seed == 1
    assert torch.equal(kept, prologue[[1, 1, 1]])

    code = (int(prologue[2, 0]) + 1) % 64
    after, changed, _, _ = session.change_token("bag", 0, 3, 1, code, prologue, *chosen)
    assert (changed != prologue).nonzero().tolist() == [[2, 0]]
    # Where the prologue is the same, so is the noise, and thereby the picture
    assert np.array_equal(after[0], pictures[0])

    # A picture of one's own: itself, its reconstruction, and drawings that keep its prologue
    uploaded = Images(BUNDLED / "val").open(0)
    x = to_float(torch.tensor(np.asarray(uploaded)).permute(2, 0, 1)[None])
    codes = tokenizer.encode(x)
    after, kept, table, _ = session.vary_picture("bag", 0, uploaded, 0, *chosen)
    rows_kept, _, _, text = session.vary_picture("bag", 0, uploaded, 1, *chosen)
    assert "lower 1 of 7 rows" in text
    assert len(after) == len(rows_kept) == 5
    assert torch.equal(kept, codes[:, :8].expand(3, -1))
    assert table[2] == [3, *codes[0, :8].tolist()]
    reconstruction = to_uint8(tokenizer.decode(codes))[0].numpy()
    for shown in (after, rows_kept):
        assert np.array_equal(shown[0], np.asarray(uploaded))
        assert np.array_equal(shown[1], reconstruction)
    for i, j in ((2, 3), (3, 4), (4, 2)):
        assert not np.array_equal(after[i], after[j])
    upper = reconstruction[:16].astype(int)
    differences = [np.mean([np.abs(image[:16] - upper).mean() for image in shown[2:]])
                   for shown in (after, rows_kept)]
    assert differences[1] < differences[0] / 4
    pictures, _, _, text = session.vary_picture("bag", 0, None, 0, *chosen)
    assert len(pictures) == 3
    assert "upload one" in text

    pytest.importorskip("gradio")
    settings = sample.preset_settings("tiny")
    assert slider_minimum(demo.build_page(session, settings), "share of rows to keep") == 0

    # Without a prologue at least a row has to be kept, and 1d has no rows
    sessions = {}
    for layout in ("2d", "1d"):
        plain = Tokenizer(TokenizerConfig(layout=layout, **SIZES["tiny"])).eval()
        cfg = ARConfig.for_tokenizer(plain.cfg, layers=1, dim=32, head_dim=32, num_classes=2)
        sessions[layout] = demo.Session(plain, AR(cfg).eval(), columns=2)
    page = demo.build_page(sessions["2d"], settings)
    lowest = slider_minimum(page, "share of rows to keep")
    _, _, _, text = sessions["2d"].vary_picture("1", 0, uploaded, lowest, *chosen)
    assert "lower 6 of 7 rows" in text
    page = demo.build_page(sessions["1d"], settings)
    assert slider_minimum(page, "share of rows to keep") is None
