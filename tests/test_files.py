"""What people's real files and machines do: odd pictures, folders, zips and names, bad input."""

import os
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_scripts import ROOT, SHIPPED, STEPS, call, folder, pipeline, printed, refusal, trainer

from pretokenize import Images, default_val, open_image

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
    for file in ("turned.png", "turned.tif"):  # Pillow turns a TIFF itself
        assert np.array_equal(pixels(photo, file, exif=exif), np.rot90(photo, -1))
    # EXIF that cannot be parsed, or not rewritten after turning because its width is text
    assert pixels(photo, "odd.jpg", exif=b"Exif\0\0MM\0*").shape == (2, 4, 3)
    turn = b"Exif\0\0MM\0*\0\0\0\x08\0\2\1\x12\0\3\0\0\0\1\0\6\0\0"
    width = b"\1\0\0\2\0\0\0\4abc\0\0\0\0\0"
    assert pixels(photo, "odd.jpg", exif=turn + width).shape == (4, 2, 3)
    assert (pixels(Image.new("RGBA", (2, 2), (200, 0, 0, 0)), "rgba.png") == 255).all()
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([200, 0, 0])
    assert (pixels(palette, "clear.png", transparency=0) == 255).all()
    deep = Image.fromarray(np.full((2, 2), 40_000, np.uint16))
    assert (pixels(deep, "deep.png") == 40_000 // 256).all()
    text = PngInfo()
    text.add_text("comment", 2_000_000 * "x", zip=True)
    assert (pixels(Image.new("L", (2, 2), 7), "text.png", pnginfo=text) == 7).all()
    (tmp_path / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(SystemExit, match="script.png cannot be .*: cannot identify"):
        open_image(tmp_path / "script.png")  # and Ghostscript is not asked
    for mode in ("F", "I"):
        with pytest.raises(SystemExit, match=f"{mode}.tiff has floats or 32-bit integers"):
            pixels(Image.new(mode, (2, 2)), f"{mode}.tiff")


@pytest.mark.parametrize("end", ["", ".zip"])
def test_what_counts_as_an_image_and_as_a_class(tmp_path, end):
    mine = files(tmp_path / f"mine{end}", "cat/1.jfif", "cat/.2.png", "cat/._1.png", "dog/1.xyz",
                 "dog/1.PNG", "dog/sub/2.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png",
                 "emu/1.xyz", "LICENSE")
    images = Images(mine)
    assert images.names == ["cat/1.jfif", "dog/1.PNG", "dog/sub/2.png"]
    assert images.classes == ["cat", "dog"]
    assert str(images).endswith("classes, left out: 1 others, 2 .xyz, and so all of emu")
    data = files(tmp_path / f"kaggle{end}", "LOC_val_solution.csv", "Data/val/a.JPEG",
                 "Data/val/b.JPEG", "Data/train/n1/n1_1.JPEG", "Data/test/test_1.JPEG") / "Data"
    assert Images(data / "val").classes == ["n1", "n2"]
    assert Images(data / "val").labels.tolist() == [1, 0]
    assert len(Images(data / "train" / "n1").classes) == len(Images(data / "test").classes) == 1


@pytest.mark.parametrize("train, val", [("Train", "validation"), ("training", "test")])
def test_a_folder_of_splits_is_no_folder_of_classes(tmp_path, train, val):
    names = [f"{side}/{name}/1.png" for side in (train, val) for name in ("cat", "dog")]
    mine = files(tmp_path / "mine", *names)
    with pytest.raises(SystemExit, match="holds no classes but"):
        Images(mine)
    assert Images(mine / train).classes == ["cat", "dog"]
    assert default_val(mine / train) == (str(mine / val) if train == "Train" else None)
    tiny = files(tmp_path / "tiny", "a/images/1.png", "b/images/1.png")  # Tiny ImageNet's layout
    assert Images(tiny).classes == ["a", "b"]


def test_odd_entries_of_zips_and_folders(tmp_path):
    names = ["mine\\train\\cat\\1.png", "/mine/train/dog/1.png", "./mine/train/emu/1.png"]
    images = Images(files(tmp_path / "windows.zip", *names) / "mine" / "train")
    assert images.names == ["cat/1.png", "dog/1.png", "emu/1.png"]
    assert [images.open(i).size for i in range(3)] == 3 * [(28, 28)]
    mine = files(tmp_path / "mine", "cat/1.png", "dog/1.png")
    (mine / "cat" / "loop").symlink_to(mine)
    (mine / "emu").symlink_to(mine / "dog")  # two names of one folder are two classes
    assert Images(mine).names == ["cat/1.png", "dog/1.png", "emu/1.png"]
    (mine / "dog" / "itself").symlink_to("itself")  # is no file and no folder, says the system
    with pytest.raises(SystemExit, match="dog cannot be read: .*symbolic links"):
        Images(mine)
    (mine / "dog" / "itself").unlink()
    os.mkfifo(mine / "cat" / "pipe.png")
    with pytest.raises(SystemExit, match="pipe.png is no regular file, or a link to nothing"):
        Images(mine)


def test_classes_in_any_script_on_any_terminal(tmp_path):
    apart, whole, latin1 = "cafe\u0301", "caf\u00e9", os.fsdecode(b"gar\xe7on")  # not UTF-8
    for split, cafe in (("train", apart), ("val", whole)):
        files(tmp_path / split, f"{cafe}/1.png", f"{latin1}/1.png", f"{latin1}/2.png", "猫/1.png")
    data = ["--data", tmp_path / "train", "--out", tmp_path / "out"]
    printed("train_stage1", *data, "--steps", 1, "--batch_size", 2, "--onestage")
    printed("pretokenize", *data)
    said = printed("sample", *data[2:], "--num_samples", 3, "--classes", apart, "猫")
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
    """Data A; then data B, stopped after its held-out tokens by a broken training image."""
    shutil.copytree(pipeline(), tmp_path, dirs_exist_ok=True)
    data = files(tmp_path / "b", "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")
    words = ["pretokenize", "--out", tmp_path, "--data"]
    (data / "train" / "b" / "1.png").write_bytes(SHOE[:500])
    assert "1.png cannot be read as an image" in refusal(*words, data / "train")
    train = ["train_ar", "--out", tmp_path, *STEPS, "--overwrite"]
    assert "codes.safetensors are of two runs" in refusal(*train)
    (data / "train" / "b" / "1.png").write_bytes(SHOE)
    call(*words, data / "train")
    data.rename(tmp_path / "moved")
    assert "is up to date" in printed(*words, tmp_path / "moved" / "train")
    assert not list(tmp_path.glob("*.parts"))
    assert "made with classes ['bag', 'dog'] and not ['a', 'b']" in refusal(*train, "--resume")
    call(*train)


def test_odd_flags_and_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # without the rest of what torchrun sets
    seed = ["--seed", 1_795_684_812_123_456_789]  # date +%s%N
    none = ["--log_every", 0, "--eval_every", 0, "--save_every", 0, "--eval_images", 0]
    call("train_stage1", "--data", folder() / "val", "--out", tmp_path, *seed, *none, "--steps", 2)
    settings, line = (tmp_path / "train_stage1.jsonl").read_text().splitlines()
    assert '"hold": 1,' in settings  # half of the steps, so that the rate falls in any run
    assert '"step": 2,' in line  # 0 means at the end only
    call(*trainer("train_ar", tmp_path / "tuned"), *seed, "--steps", 1)  # copies the tokenizer
    call("sample", "--out", tmp_path / "tuned", *seed, "--num_samples", 2, "--columns", 1)


def test_bad_input_gets_a_sentence_and_leaves_nothing(tmp_path):
    pair = pipeline()
    made = tmp_path / "made"
    cats = files(made / "cats", "train/cat/1.png", "val/dog/1.png") / "train"
    np.savez(made / "large.npz", np.zeros((4, 32, 32, 3), np.uint8))
    np.savez(made / "few.npz", np.zeros((3, 28, 28, 3), np.uint8), mu=0, sigma=0)
    (made / "cut.npz").write_bytes((made / "large.npz").read_bytes()[:100])
    (made / "mixed").mkdir()
    shutil.copy(SHIPPED / "tokenizer.safetensors", made / "mixed")
    shutil.copy(pair / "ar.safetensors", made / "mixed")
    state = made / "train_ar.pt"  # a pickle that makes a folder
    state.write_bytes(f"cos\nmkdir\n(S'{tmp_path}/it_was_run'\ntR.".encode())
    out = ["--out", tmp_path / "out"]
    other = [*out, "--tokenizer", SHIPPED / "tokenizer.safetensors"]
    draw = ["sample", "--pair", pair, *out]
    stage1 = ["train_stage1", *STEPS, *out, "--data"]
    stage2 = trainer("train_ar", tmp_path / "out")
    for sentence, *words in [
        ("nowhere is no folder, no zip file", *stage1, "nowhere"),
        ("cannot be written to", *draw, "--out", state / "below"),
        ("1 or more prologue tokens", *stage1, cats, "--num_prologue", 0),
        ("val: 1 images of 1 classes has other classes", *stage1, cats, "--onestage"),
        ("is there already: give --resume", *stage1, cats, "--out", made / "mixed"),
        ("is there already: give --resume", *stage2, "--out", pair),
        ("codes of another tokenizer", *stage2, "--init", SHIPPED / "ar.safetensors"),
        ("are 65,536 at most", *stage1, cats, "--codebook_size", 70_000),
        ("notes.zip holds no images", *stage1, files(made / "notes.zip", "notes.csv")),
        ("a dataset.json of StyleGAN", *stage1, files(made / "s.zip", "0/1.png", "dataset.json")),
        ("images beside folders", *stage1, files(made / "beside", "cat/1.png", "1.png")),
        ("holds no classes but ['mine']", *stage1, files(made / "z.zip", "mine/cat/1.png")),
        ("--patch_size 5 does not divide 28", *stage1, cats, "--patch_size", 5),
        ("does not divide into 1 ranks", *stage1, cats, "--micro_batch_size", 3),
        ("'cat' is in one of them only", "pretokenize", *other, "--data", cats),
        ("tokenizer.safetensors did not make", *stage2, *other),
        ("not a whole training state", *stage2, "--out", made, "--resume"),
        ("codes of another tokenizer", *draw, "--pair", made / "mixed"),
        ("which train_ar.py makes", *stage2, "--init", ROOT / "results" / "shoe.png"),
        ("mnie holds no ar.safetensors: --pair", "sample", "--out", tmp_path / "mnie"),
        ("--classes 7: a number from 0 to 1", *draw, "--classes", 7),
        ("few.npz holds 3 images", "fid", made / "few.npz"),
        ("cut.npz is not a whole .npz file", "fid", pair / "samples.npz", made / "cut.npz"),
        ("mu is not of 128 features", "fid", pair / "samples.npz", made / "few.npz"),
        ("Inception cannot be loaded", "fid", pair / "samples.npz", "--inception", state),
        ("images to compare with are needed", "fid", made / "large.npz"),
        ("large.npz is 32 x 32 and not 28 x 28", "fid", pair / "samples.npz", made / "large.npz"),
    ]:
        said = refusal(*words)
        assert sentence in said and "\n" not in said
        left = {path.name for path in tmp_path.rglob("*") if made not in path.parents}
        assert left <= {"made", "out"}


@pytest.mark.parametrize("words", [
    "train_ar --lr nan", "train_ar --steps 0", "train_ar --micro_batch_size 0",
    "train_stage1 --patch_size 0", "pretokenize --batch_size 0", "fid --batch_size 0",
    "sample --columns 0", "sample --top_p -0.1", "variations 1.png --keep -0.5"])
def test_numbers_that_make_no_sense(words, capsys):
    *_, flag, value = words.split()
    assert refusal(*words.split()) == "2"
    assert f"{flag} {value} should be" in capsys.readouterr().err
