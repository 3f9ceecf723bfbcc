"""Each tool once, on the pair of two classes that test_scripts.py trains, and the notebook."""

import json
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import ROOT, call, folder, pipeline, printed, refusal

import ar
import claims
from attention import known_labels
from curves import read_log
from demo import Buttons
from pretokenize import Images
from sample import load_pair


def test_sweep_scores_the_images_that_sample_py_draws(tmp_path):
    call("sweep", "cfg_visual=2,1", "--pair", pipeline(), "--num_samples", 6, "--out", tmp_path)
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    gfid = {row["cfg_visual"]: row["gfid"] for row in rows}
    assert list(gfid.values()) == sorted(gfid.values())
    drawn = json.loads(printed("fid", "--out", pipeline()))  # with guidance 2
    assert drawn["reference"] == str(folder() / "train")  # which codes.safetensors names
    assert gfid == {2: pytest.approx(drawn["fid"], rel=1e-4), 1: mock.ANY}
    for axis in ["top_p=nan", "top_p=-1", "top_p=inf", "top_k=1.5", "cfg_schedule=sine", "noise=1"]:
        assert refusal("sweep", "temperature=1", axis).startswith(f"{axis}: ")


def test_curves_are_of_the_last_run_and_of_what_a_resumed_one_said_last(tmp_path):
    lines = [{"step": 1, "lr": 9}, {"settings": {"lr": 1}}, {"step": 1, "nats": 9},
             {"step": 2, "nats": 8}, {"step": 2, "val_nats": 7}, {"step": 2, "nats": 6}]
    path = tmp_path / "train_ar.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "na')
    assert read_log(path) == {"step": {1: 1, 2: 2}, "nats": {1: 9, 2: 6}, "val_nats": {2: 7}}


def test_attention_knows_classes_by_their_names():
    def labels(folders, names):
        images = SimpleNamespace(path="val", classes=folders, labels=torch.tensor([0, 1, 1]))
        ar = SimpleNamespace(config=SimpleNamespace(classes=names))
        return known_labels(images, ar).tolist()

    assert labels(["bag", "dog"], ["dog", "cat", "bag"]) == [2, 0, 0]
    with pytest.raises(SystemExit, match="not trained on the class dog, but on bag, cat$"):
        labels(["bag", "dog"], ["bag", "cat"])
    numbers = [f"n{1440764 + i:08}" for i in range(1000)]  # ImageNet's folders
    assert labels(numbers, [str(i) for i in range(1000)]) == [0, 1, 1]


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
    words = ["nearest", tmp_path / "samples.npz", "--data"]
    said = printed(*words, folder() / "train")
    assert "4 samples, 1 of them exact copies" in said
    assert "of 4 samples 0.00\n" in said
    assert "--val_data is needed" in refusal(*words, folder() / "val")


def test_released_names_the_file_that_it_lacks(monkeypatch, tmp_path):
    words = ["released", "2d", "--out", tmp_path]
    file = "2d-tokenizer/model_2.safetensors"
    assert refusal(*words, "--from", "ckpts").startswith(f"ckpts/{file} cannot be read (")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    assert refusal(*words).startswith(f"{file} cannot be read (import of huggingface_hub halted")


def test_buttons_of_the_demo(monkeypatch):
    buttons = Buttons(*load_pair(pipeline(), "cpu"), columns=3)
    chosen = (2.0, 1.0, 0.25, 1.0, 1.0)
    seed, pictures, _, _, prologue, asked = buttons.resample("dog", 4, None, *chosen)
    assert seed == 4
    assert buttons.resample("dog", 4, asked, *chosen)[0] == 5  # once more
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


def test_classes_of_imagenet_get_their_names(tmp_path):
    path = tmp_path / "ar.safetensors"
    ar.AR(ar.ARConfig(1, 32, 32, num_classes=3, classes=["n01", "n02", "n03"])).save(path)
    table = "n01 tench, Tinca tinca\r\nn02 crane\r\nn03 crane\r\n"
    with zipfile.ZipFile(tmp_path / "k.zip", "w") as archive:
        archive.writestr("LOC_synset_mapping.txt", table)
    call("name_classes", tmp_path, "--data", tmp_path)  # where no table is
    assert ar.AR.load(path).config.classes == ["n01", "n02", "n03"]
    call("name_classes", tmp_path, "--data", tmp_path / "k.zip" / "ILSVRC")
    assert ar.AR.load(path).config.classes == ["tench", "crane (n02)", "crane (n03)"]


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


def test_walkthrough(monkeypatch):
    """The notebook's code cells run, here without Jupyter, and its pictures are kept."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "tools" / "walkthrough.ipynb").read_text()
    assert len(text) < 400_000
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert text.count('"image/png"') == 10
    # What its last two pictures say
    reached = [name for name, norm in names["norms"]["ce"].items() if norm > 0]
    assert reached == ["encoder", "prologue projection", "prologue codebook", "AR model"]
    into = names["into"]  # (K, L): from the CE of a position into a prologue token
    assert (into.tril() == 0).all()
    assert (into[:, 8:] > 0).all()
