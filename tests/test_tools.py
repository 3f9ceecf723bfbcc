"""Each tool once, on the pair of two classes that test_scripts.py trains."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import call, folder, pipeline, printed, refusal

import claims
from attention import known_labels
from curves import read_log
from demo import Buttons
from pretokenize import Images
from sample import load_pair


def test_sweep_scores_the_images_that_sample_py_draws(tmp_path):
    call("sweep", "cfg_visual=2,1", "top_k=0", "--pair", pipeline(), "--num_samples", 6, "--out",
         tmp_path)
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    gfid = {(row["cfg_visual"], row["top_k"]): row["gfid"] for row in rows}
    assert list(gfid.values()) == sorted(gfid.values())
    drawn = json.loads(printed("fid", "--out", pipeline()))  # with guidance 2
    assert gfid == {(2, 0): pytest.approx(drawn["fid"], rel=1e-4), (1, 0): mock.ANY}


def test_sweep_refuses_values_that_are_none():
    for axis in ("temperature=nan", "top_p=-1", "cfg_visual=abc", "cfg_visual=inf", "top_k=1.5",
                 "cfg_schedule=sine", "noise=1"):
        assert refusal("sweep", "temperature=1", axis).startswith(f"{axis}: ")


def test_curves_are_of_the_last_run_and_of_what_a_resumed_one_said_last(tmp_path):
    lines = [{"step": 1, "lr": 9}, {"settings": {"lr": 1}}, {"step": 1, "nats": 9},
             {"step": 2, "nats": 8}, {"step": 2, "val_nats": 7}, {"step": 2, "nats": 6}]
    path = tmp_path / "train_ar.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "na')
    curves = read_log(path)
    assert curves == {"step": {1: 1, 2: 2}, "nats": {1: 9, 2: 6}, "val_nats": {2: 7}}


def test_attention_knows_classes_by_their_names():
    images = Images(folder() / "val")  # 8 of bag, then 8 of dog

    def labels(*classes):
        config = SimpleNamespace(classes=list(classes))
        return known_labels(images, SimpleNamespace(config=config)).tolist()

    assert labels("dog", "cat", "bag") == [2] * 8 + [0] * 8
    with pytest.raises(SystemExit, match="not trained on the class dog, but on bag, cat$"):
        labels("bag", "cat")
    numbers = SimpleNamespace(classes=[f"n{1440764 + i:08}" for i in range(1000)],
                              labels=torch.tensor([3]))  # as ImageNet's folders
    names = SimpleNamespace(config=SimpleNamespace(classes=list(map(str, range(1000)))))
    assert known_labels(numbers, names).tolist() == [3]


def test_curves_and_attention_leave_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    call("curves", pipeline(), "--path", tmp_path / "c.png")
    call("attention", "--pair", pipeline(), "--images", 4, "--out", tmp_path)
    for name in ("c.png", "ar_attention.png", "prologue_attention.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 1


def test_probe():
    said = printed("probe", pipeline() / "tokenizer.safetensors", "--data", folder() / "train",
                   "--epochs", 2)
    assert "(prologue, first 8 tokens)" in said
    assert said.count("top-5 1.0000") == 2  # of two classes


def test_nearest_finds_what_was_copied(tmp_path):
    images = Images(folder() / "train")
    np.savez(tmp_path / "samples.npz", [np.asarray(images.open(i)) for i in (3, 5, 40, 40)])
    said = printed("nearest", tmp_path / "samples.npz", "--data", folder() / "train")
    assert "4 samples, 1 of them exact copies" in said
    assert "of 4 samples 0.00\n" in said
    assert "--val_data is needed" in refusal("nearest", tmp_path / "samples.npz", "--data",
                                             folder() / "val")
    assert "none.npz does not exist" in refusal("nearest", tmp_path / "none.npz")


def test_released_names_the_file_that_it_lacks(monkeypatch, tmp_path):
    words = ["released", "2d", "--out", tmp_path]
    file = "2d-tokenizer/model_2.safetensors"
    assert refusal(*words, "--from", "ckpts").startswith(f"ckpts/{file} cannot be read (")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    said = refusal(*words)
    assert said.startswith(f"{file} cannot be read (import of huggingface_hub halted")
    assert f"from huggingface.co/Zyriix/prologue to DIR/{file} for --from DIR" in said


def test_buttons_of_the_demo(monkeypatch):
    buttons = Buttons(*load_pair(pipeline(), "cpu"), columns=3)
    chosen = (2.0, 1.0, 0.25, 1.0, 1.0)
    seed, pictures, _, _, prologue, asked = buttons.resample("dog", 4, None, *chosen)
    assert seed == 4
    seed, others, *_ = buttons.resample("dog", 4, asked, *chosen)  # once more
    assert seed == 5
    assert not np.array_equal(others[0][0], pictures[0][0])
    seed, *_, kept, _ = buttons.keep_prologue("dog", 4, 2, prologue, *chosen)
    assert seed == 5
    assert torch.equal(kept, prologue[[1, 1, 1]])
    _, after, *_, changed, _ = buttons.change_token("dog", 4, 3, 1, 63, prologue, *chosen)
    assert (changed != prologue).nonzero().tolist() == [[2, 0]]
    assert np.array_equal(after[0][0], pictures[0][0])  # the noise is the same
    *_, kept, _ = buttons.vary("dog", 4, Images(folder() / "val").open(0), 0.5, *chosen)
    assert len(kept.unique(dim=0)) == 1
    _, unconditional, *_ = buttons.resample("no class", 4, None, *chosen)
    _, unguided, *_ = buttons.resample("no class", 4, None, 1.0, *chosen[1:])
    assert np.array_equal(unconditional[0][0], unguided[0][0])  # nothing to guide towards
    gradio = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    for seed in (None, -1):
        assert buttons.keep_prologue("dog", seed, 2, prologue, *chosen) == [gradio.skip()] * 6
    assert gradio.Warning.call_count == 2


def test_variations_of_a_picture(tmp_path):
    file = folder() / "val" / "bag" / "0.png"
    apart = {}  # how far two variations lie apart
    for keep in (0, 0.9):
        call("variations", file, "--pair", pipeline(), "--keep", keep, "--columns", 2, "--out",
             tmp_path)
        sheet = np.asarray(Image.open(tmp_path / "variations.png")).astype(int)
        assert np.array_equal(sheet[2:58:2, 2:58:2], Image.open(file))
        apart[keep] = np.abs(sheet[:, 118:174] - sheet[:, 176:232]).mean()
    assert 0 < apart[0.9] < apart[0] / 2


def test_bench_times_a_step():
    words = ["bench", "ar", "--size", "tiny", "--batch_size", 2, "--repeat", 1]
    assert "ar tiny, 2 images: " in printed(*words)


def test_claims(tmp_path, monkeypatch):
    """A row with all of its scripts, which run in this process and draw few images."""

    def run(command, **_):
        few = [{"500": 6, "2000": 20}.get(word, word) for word in command[2:]]
        return SimpleNamespace(returncode=0, stdout=printed(Path(command[1]).stem, *few))

    monkeypatch.setattr(claims, "subprocess", SimpleNamespace(run=run, PIPE=None))
    pool = nullcontext(SimpleNamespace(map=map))  # setup() wants the main thread
    monkeypatch.setattr(claims, "ThreadPoolExecutor", lambda jobs: pool)
    monkeypatch.setattr(claims, "BUNDLED", folder())
    monkeypatch.setattr(claims, "PLAIN", ["temperature=0.9,1", "temperature_prologue=1"])
    (tmp_path / "fashion_mnist_full.zip").symlink_to(folder())
    table = printed("claims", "2d", "--seeds", 0, "--scale", 0.002, "--out", tmp_path)
    assert table.splitlines()[-1].startswith("| 2d | 0 | ")
