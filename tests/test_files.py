"""What people's real files and machines do: odd pictures, folders, zips and names, bad input."""

import functools
import os
import resource
import shutil
import sys
import zipfile
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from test_scripts import ROOT, STEPS, TRAINERS, call, copies, pipeline, printed, refusal, trainer

from pretokenize import Images, center_crop, default_val, open_image
from tokenizer import read_safetensors, save_checkpoint

SHOE = (ROOT / "results" / "shoe.png").read_bytes()  # 28 x 28
TABLE = "ImageId,PredictionString\na,n2 1 2 3 4 n2 5 6 7 8\nb,n1 1 2 3 4\n"  # as Kaggle's


def files(root, *names):
    """Writes a picture under each name, or a table, below a folder or into a zip."""
    for name in names:
        content = TABLE.encode() if name.endswith(".csv") else SHOE
        if root.suffix == ".zip":
            with zipfile.ZipFile(root, "a") as archive:
                archive.writestr(name, content)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
    return root


def test_pixels_are_those_that_a_viewer_shows(tmp_path):
    def pixels(image, file, **how):
        image.save(tmp_path / file, **how)
        return np.asarray(open_image(tmp_path / file))

    photo = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    assert np.array_equal(pixels(photo, "turned.png", exif=exif), np.rot90(photo, -1))
    assert (pixels(Image.new("RGBA", (2, 2), (200, 0, 0, 0)), "rgba.png") == 255).all()
    assert (pixels(Image.new("LA", (2, 2), (50, 0)), "la.png") == 255).all()
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([200, 0, 0])
    assert (pixels(palette, "clear.png", transparency=0) == 255).all()
    deep = Image.fromarray(np.full((2, 2), 40_000, np.uint16))
    assert (pixels(deep, "deep.png") == 40_000 // 256).all()
    text = PngInfo()
    text.add_text("comment", 2_000_000 * "x", zip=True)
    assert (pixels(Image.new("L", (2, 2), 7), "text.png", pnginfo=text) == 7).all()
    # EXIF that cannot be parsed, or not rewritten after turning: width as text, a float as software
    assert pixels(photo, "odd.jpg", exif=b"Exif\0\0MM\0*").shape == (2, 4, 3)
    turn = b"Exif\0\0MM\0*\0\0\0\x08\0\2\1\x12\0\3\0\0\0\1\0\6\0\0"
    for entry in (b"\1\0\0\2\0\0\0\4abc\0", b"\1\x31\0\x0b\0\0\0\1\x7f\xc0\0\0"):
        assert pixels(photo, "odd.jpg", exif=turn + entry + bytes(4)).shape == (4, 2, 3)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for file in ("viewed.png", "viewed.tif"):  # Pillow turns a TIFF itself
            photo.save(tmp_path / file, exif=exif)
            viewed = ImageOps.exif_transpose(Image.open(tmp_path / file))
            assert np.array_equal(open_image(tmp_path / file), viewed)
    (tmp_path / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(SystemExit, match="script.png cannot be .*: cannot identify"):
        open_image(tmp_path / "script.png")  # and Ghostscript is not asked
    for mode in ("F", "I"):
        with pytest.raises(SystemExit, match=f"{mode}.tiff has floats or 32-bit integers"):
            pixels(Image.new(mode, (2, 2)), f"{mode}.tiff")


def test_a_banner_is_cut_in_little_memory():
    banner = Image.new("RGB", (8000, 2), "blue")
    banner.paste("red", (3990, 0, 4010, 2))
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, before[1]))
    try:
        assert (center_crop(banner, 256) == np.full((256, 256, 3), (255, 0, 0))).all()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("end", ["", ".zip"])
def test_what_counts_as_an_image_and_as_a_class(tmp_path, end):
    mine = files(tmp_path / f"mine{end}", "cat/1.jfif", "cat/.2.png", "cat/._1.png", "dog/1.txt",
                 "dog/1.PNG", "dog/sub/2.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png")
    assert Images(mine).names == ["cat/1.jfif", "dog/1.PNG", "dog/sub/2.png"]
    assert Images(mine).classes == ["cat", "dog"]
    data = files(tmp_path / f"kaggle{end}", "LOC_val_solution.csv", "Data/val/a.JPEG",
                 "Data/val/b.JPEG", "Data/train/n1/n1_1.JPEG", "Data/test/test_1.JPEG") / "Data"
    assert Images(data / "val").classes == ["n1", "n2"]
    assert Images(data / "val").labels.tolist() == [1, 0]
    assert len(Images(data / "train" / "n1").classes) == len(Images(data / "test").classes) == 1


def test_photos_that_are_left_out_are_counted(tmp_path):
    mine = files(tmp_path / "mine", "cat/1.png", "cat/2.xyz", "cat/3.xyz", "dog/4.xyz", "LICENSE")
    said = str(Images(mine))
    assert said.endswith("1 images of 1 classes, left out: 3 .xyz, 1 others, and so all of dog")
    files(tmp_path / "mine.zip", "cat/1.png", "cat/2.xyz")
    assert str(Images(tmp_path / "mine.zip")).endswith("1 classes, left out: 1 .xyz")


@pytest.mark.parametrize("train, val", [("train", "test"), ("Train", "Val"), ("train", "valid"),
                                        ("training", "validation")])
def test_a_folder_of_splits_is_no_folder_of_classes(tmp_path, train, val):
    mine = files(tmp_path / "mine", *(f"{side}/{name}/1.png" for side in (train, val)
                                      for name in ("cat", "dog")))
    with pytest.raises(SystemExit, match="holds no classes but"):
        Images(mine)
    assert Images(mine / train).classes == ["cat", "dog"]
    known = {"valid": "valid", "validation": None}.get(val)  # beside `train` alone
    assert default_val(mine / train) == (known and str(mine / known))
    tiny = files(tmp_path / "tiny", *(f"{name}/images/1.png" for name in "ab"))
    assert Images(tiny).classes == ["a", "b"]  # as Tiny ImageNet is laid out


def test_odd_entries_of_zips_and_folders(tmp_path):
    names = ["mine\\train\\cat\\1.png", "/mine/train/dog/1.png", "./mine/train/emu/1.png"]
    images = Images(files(tmp_path / "windows.zip", *names) / "mine" / "train")
    assert images.names == ["cat/1.png", "dog/1.png", "emu/1.png"]
    assert [images.open(i).size for i in range(3)] == 3 * [(28, 28)]
    mine = files(tmp_path / "mine", "cat/1.png", "dog/1.png")
    (mine / "cat" / "loop").symlink_to(mine)
    (mine / "emu").symlink_to(mine / "dog")  # two names of one folder are two classes
    assert Images(mine).names == ["cat/1.png", "dog/1.png", "emu/1.png"]
    (mine / "nothing.png").symlink_to(tmp_path / "nothing")
    (mine / "nothing.png").rename(mine / "cat" / "nothing.png")
    with pytest.raises(SystemExit, match="nothing.png is no regular file, or a link to nothing"):
        Images(mine)
    (mine / "cat" / "nothing.png").unlink()
    (mine / "dog" / "itself").symlink_to("itself")  # is no file and no folder, says the system
    with pytest.raises(SystemExit, match="dog cannot be read: .*symbolic links"):
        Images(mine)
    (mine / "dog" / "itself").unlink()
    os.mkfifo(mine / "cat" / "pipe.png")
    ((code, text),) = copies(1, *trainer("train_stage1", tmp_path), "--data", mine)
    assert code == 1 and "pipe.png is no regular file" in text  # and not the alarm


def test_classes_in_any_script_on_any_terminal(tmp_path):
    apart, whole, latin1 = "cafe\u0301", "caf\u00e9", os.fsdecode(b"gar\xe7on")  # not UTF-8
    for split, cafe in (("train", apart), ("val", whole)):
        files(tmp_path / split, f"{cafe}/1.png", f"{latin1}/1.png", f"{latin1}/2.png", "猫/1.png")
    data = ["--data", tmp_path / "train", "--out", tmp_path / "out"]
    printed("train_stage1", *data, "--steps", 1, "--batch_size", 2, "--onestage")
    printed("pretokenize", *data)
    said = printed("sample", *data[2:], "--num_samples", 3, "--columns", 1, "--classes", apart,
                   "猫")
    assert (tmp_path / "out" / "samples.npz").exists()
    assert r"a row each of 0 caf\xe9, 2 \u732b" in said


def test_images_replaced_under_their_names_are_noticed_and_copies_are_not(tmp_path):
    mine = files(tmp_path / "mine", "cat/1.png", "cat/2.png")
    words = [*trainer("train_stage1", tmp_path / "out"), "--data", mine]
    call(*words, "--steps", 1)
    os.utime(mine / "cat" / "1.png", (0, 0))  # as a plain copy changes it
    call(*words, "--steps", 2, "--resume")
    Image.new("L", (28, 28)).save(mine / "cat" / "1.png")
    said = refusal(*words, "--resume")
    assert "was made with data " in said and "only data may differ, with --overwrite" in said
    call(*words, "--resume", "--overwrite")
    table = files(tmp_path / "kaggle", "LOC_val_solution.csv", "val/a.JPEG", "val/b.JPEG")
    digest = Images(table / "val").digest()
    (table / "LOC_val_solution.csv").write_text(TABLE.replace("b,n1", "b,n2"))
    assert Images(table / "val").digest() != digest


def test_tokens_of_two_runs_are_told_apart(tmp_path):
    """Data A; then data B, stopped after its held-out tokens."""
    shutil.copytree(pipeline(), tmp_path, dirs_exist_ok=True)
    names = [f"{side}/{name}/{i}.png" for side in ("train", "val") for name in "abc" for i in "12"]
    words = ["pretokenize", "--data", files(tmp_path / "b", *names) / "train", "--out", tmp_path]
    with mock.patch("pretokenize.image_crops", side_effect=functools.partial(stop_at_train, [])):
        assert refusal(*words) == "power cut"
    train = ["train_ar", "--out", tmp_path, *STEPS, "--overwrite"]
    assert "codes.safetensors are of two runs" in refusal(*train)
    call(*words)
    (tmp_path / "b").rename(tmp_path / "moved")
    words[2] = tmp_path / "moved" / "train"
    assert "is up to date" in printed(*words)
    assert not list(tmp_path.glob("*.parts"))
    call(*train)


def stop_at_train(calls, images, index, size, crop, flip):
    calls.append(index)
    return np.zeros((1, 28, 28, 3), np.uint8) if len(calls) <= 6 else sys.exit("power cut")


def test_what_a_killed_run_leaves_goes_away(tmp_path):
    for name in TRAINERS:
        (tmp_path / f"{name}.pt.123.tmp").touch()
    call(*trainer("train_stage1", tmp_path), "--steps", 1)
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["train_ar.pt.123.tmp"]


def test_what_other_machines_leave(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # without the rest of what torchrun sets
    seed = ["--seed", 1_795_684_812_123_456_789]  # date +%s%N
    call(*trainer("train_stage1", tmp_path), *seed, "--steps", 1)
    call(*trainer("train_ar", tmp_path), *seed, "--steps", 1, "--out", tmp_path / "tuned")
    few = ["--num_samples", 2, "--columns", 1]
    call("sample", "--out", tmp_path / "tuned", *seed, *few)  # has a copy of the tokenizer
    for kind in ("tokenizer", "ar"):  # as those do who share weights in half precision
        path = tmp_path / "tuned" / f"{kind}.safetensors"
        tensors, config = read_safetensors(path, kind)
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
        save_checkpoint(path, kind, tensors, config)
    call("sample", "--pair", tmp_path / "tuned", *few, "--out", tmp_path / "half")
    assert len(list(tmp_path.glob("*/samples.npz"))) == 2


def test_bad_input_gets_a_sentence_and_leaves_nothing(tmp_path):
    pair = pipeline()
    made = tmp_path / "made"
    cow = files(made / "cow", "cow/1.png")
    splits = ["mine/train/cat/1.png", "mine/val/cat/1.png"]
    (files(made / "broken", "cat/half.png") / "cat" / "half.png").write_bytes(SHOE[:500])
    np.savez(made / "large.npz", np.zeros((4, 32, 32, 3), np.uint8))
    np.savez(made / "few.npz", np.zeros((3, 28, 28, 3), np.uint8))
    np.savez(made / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(made / "scalar.npz", mu=0.0, sigma=0.0)
    (made / "cut.npz").write_bytes((made / "large.npz").read_bytes()[:100])
    other = ["--tokenizer", ROOT / "checkpoints" / "fashion_mnist" / "tokenizer.safetensors"]
    for folder, ar in (("mixed", (pair / "ar.safetensors").read_bytes()), ("cut", SHOE[:500])):
        (made / folder).mkdir()
        (made / folder / "ar.safetensors").write_bytes(ar)
        (made / folder / "tokenizer.safetensors").write_bytes(other[1].read_bytes())
    state = made / "train_ar.pt"  # a pickle that makes a folder
    state.write_bytes(f"cos\nmkdir\n(S'{tmp_path}/it_was_run'\ntR.".encode())
    out = ["--out", tmp_path / "out"]
    draw = ["sample", "--pair", pair, *out]
    stage1 = ["train_stage1", *STEPS, *out, "--data"]
    for sentence, *words in [
        ("nowhere is no folder, no zip file", *stage1, "nowhere"),
        ("cannot be written to", *stage1, cow, "--out", state),
        ("cannot be written to", *draw, "--out", state / "below"),
        ("1 or more prologue tokens", *stage1, cow, "--num_prologue", 0, "--onestage"),
        ("is there already: give --resume", *stage1, cow, "--out", made / "mixed"),
        ("is there already: give --resume", *trainer("train_ar", pair)),
        ("codes of another tokenizer", *trainer("train_ar", tmp_path / "out"), "--init",
         ROOT / "checkpoints" / "fashion_mnist" / "ar.safetensors"),
        ("are 65,536 at most", *stage1, cow, "--codebook_size", 70_000),
        ("notes.zip holds no images", *stage1, files(made / "notes.zip", "notes.csv")),
        ("a dataset.json of StyleGAN", *stage1, files(made / "s.zip", "0/1.png", "dataset.json")),
        ("images beside folders", *stage1, files(made / "beside", "cat/1.png", "1.png")),
        ("holds no classes but ['train', 'val']", *stage1, files(made / "z.zip", *splits) / "mine"),
        ("holds no classes but ['mine']", *stage1, made / "z.zip"),
        ("half.png cannot be read as an image", *stage1, made / "broken"),
        ("--patch_size 5 does not divide --image_size 28", *stage1, cow, "--patch_size", 5),
        ("does not divide into 1 ranks", *stage1, cow, "--micro_batch_size", 3),
        ("'cat' is in one of them only", "pretokenize", *other, *out, "--data", cow, "--val_data",
         made / "broken"),
        ("tokenizer.safetensors did not make", *trainer("train_ar", tmp_path / "out"), *other),
        ("not a whole training state", *trainer("train_ar", made), "--resume"),
        ("codes of another tokenizer", *draw, "--pair", made / "mixed"),
        ("ar.safetensors, which train_ar.py makes", *draw, "--pair", made / "cut"),
        ("mnie holds no ar.safetensors: --pair", "sample", "--out", tmp_path / "mnie"),
        ("--classes 7: a number from 0 to 1", *draw, "--classes", 7),
        ("nothing.npz does not exist", "fid", "nothing.npz"),
        ("few.npz holds 3 images", "fid", made / "few.npz"),
        ("cut.npz is not a whole .npz file", "fid", pair / "samples.npz", made / "cut.npz"),
        ("mu is not of 128 features", "fid", pair / "samples.npz",
         made / "statistics.npz"),
        ("mu is not of 128 features", "fid", pair / "samples.npz",
         made / "scalar.npz"),
        ("Inception cannot be loaded", "fid", pair / "samples.npz", "--inception", state),
        ("images to compare with are needed", "fid", made / "large.npz"),
        ("large.npz is 32 x 32 and not 28 x 28", "fid", pair / "samples.npz", made / "large.npz"),
    ]:
        said = refusal(*words)
        assert sentence in said and "\n" not in said
        left = {path.name for path in tmp_path.rglob("*") if made not in path.parents}
        assert left <= {"made", "out", "train_stage1.jsonl"}


@pytest.mark.parametrize("words", [
    "train_ar --steps 0", "train_ar --lr nan", "train_ar --warmup -1", "train_ar --seed -1",
    "train_stage1 --patch_size 0", "train_ar --micro_batch_size 0", "pretokenize --batch_size 0",
    "sample --temperature nan", "sample --top_p -0.1", "sample --columns 0", "fid --batch_size 0",
    "variations 1.png --keep -0.5"])
def test_numbers_that_make_no_sense(words, capsys):
    name, *args = words.split()
    assert refusal(name, *args) == "2"
    *_, flag, value = args
    assert f"{flag} {value} should be" in capsys.readouterr().err.replace("-1.0", "-1")


def test_0_means_at_the_end_only(tmp_path):
    none = ["--log_every", 0, "--eval_every", 0, "--save_every", 0, "--eval_images", 0]
    call(*trainer("train_stage1", tmp_path), *none, "--steps", 2)
    _, line = (tmp_path / "train_stage1.jsonl").read_text().splitlines()
    assert '"step": 2' in line
    assert (tmp_path / "tokenizer.safetensors").exists()
