"""The scripts as a user runs them, but by calls of main(): imports would take ten seconds."""

import functools
import importlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from curves import read_log
from pretokenize import Images, Tokens, to_float
from sample import SHIPPED
from tokenizer import Tokenizer

torch.set_num_threads(1)  # copies of a process that has used more may hang
TEMPORARY = tempfile.TemporaryDirectory()  # gone when the tests end
TRAINERS = ["train_stage1", "train_ar"]
STEPS = ["--steps", 6, "--save_every", 2, "--eval_every", 3, "--log_every", 1, "--batch_size", 8,
         "--warmup", 1, "--hold", 1000]


@functools.cache
def folder():
    """48 random training and 16 held-out images in two classes."""
    root = Path(TEMPORARY.name) / "images"
    rng = np.random.default_rng(0)
    for name, count in (("train/bag", 24), ("train/dog", 24), ("val/bag", 8), ("val/dog", 8)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (28, 28, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def call(name, *args):
    """Runs a script as `python name.py args` does."""
    with mock.patch.object(sys, "argv", [f"{name}.py", *map(str, args)]):
        importlib.import_module(name).main()


def printed(name, *args):
    """What a script prints on a terminal that knows English letters only."""
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    with redirect_stdout(terminal):
        call(name, *args)
    return terminal.buffer.getvalue().decode()


def refusal(name, *args):
    """The sentence that ends a script; an error of another kind, with a traceback, fails a test."""
    with pytest.raises(SystemExit) as caught:
        call(name, *args)
    return str(caught.value)


def copies(count, *words, before=lambda rank: None):
    """Runs a script in copies of this process, as ranks in the environment that launchers set.
    Each calls `before` first. Returns their exit codes, below 0 a signal, and what they print."""
    printed = [Path(TEMPORARY.name) / f"printed_by_{rank}" for rank in range(count)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank):
        signal.alarm(90)  # should it hang
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.stdout = sys.stderr = open(printed[rank], "w", buffering=1)
        before(rank)
        call(*words)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [(process.exitcode, path.read_text()) for process, path in zip(processes, printed)]


def kill_at(moment):
    """Kills this process at this call or return of a function, counted from the first step on."""
    events = iter(range(moment))
    register_optimizer_step_post_hook(lambda *_: sys.setprofile(
        lambda *_: next(events, None) is None and signal.raise_signal(signal.SIGKILL)))


def trainer(name, out):
    """The words of the pipeline's run of a trainer, into the folder `out`."""
    if name == "train_stage1":
        return [name, "--data", folder() / "train", "--out", out, *STEPS]
    return [name, "--codes", pipeline() / "codes.safetensors", "--tokenizer",
            pipeline() / "tokenizer.safetensors", "--out", out, *STEPS]


@functools.cache
def pipeline():
    """What the scripts leave in one folder, with six steps of each trainer."""
    out = Path(TEMPORARY.name) / "out"
    call(*trainer("train_stage1", out))
    call("pretokenize", "--data", folder() / "train", "--flip", "--out", out)
    call("train_ar", "--out", out, *STEPS)
    call("sample", "--out", out, "--num_samples", 6, "--columns", 2)
    return out


def log(path):
    """The curves in a log, {key: {step: value}}, without those of times."""
    curves = read_log(path)
    del curves["images_per_s"], curves["minutes_left"]
    return curves


def contents(out, pattern="*"):
    return {path.name: path.read_bytes() for path in out.rglob(pattern) if path.is_file()}


def test_pipeline_leaves_what_it_says(tmp_path):
    out = pipeline()
    assert contents(out).keys() == {
        "tokenizer.safetensors", "joint_ar.safetensors", "train_stage1.jsonl", "train_stage1.png",
        "train_stage1.pt", "codes.safetensors", "codes_val.safetensors", "ar.safetensors",
        "ar_best.safetensors", "train_ar.jsonl", "train_ar.pt", "samples.npz", "samples.png",
        "fixed_prologue.png"}
    path = shutil.copy(out / "codes.safetensors", tmp_path)
    tokens = Tokens(path)
    np.memmap(path, np.uint16, "r+")[-1] = 9
    assert tokens.codes[47, 1, 8 + 48] == 9  # they are mapped from disk, not a copy in memory
    images = Images(folder() / "train")
    x = to_float(torch.tensor(np.stack([images.open(5), ImageOps.mirror(images.open(30))])))
    codes, labels = tokens.batch([5, 30], [0, 1])
    tokenizer = Tokenizer.load(out / "tokenizer.safetensors")
    assert torch.equal(tokenizer.encode(x), codes)
    assert tokenizer.decoder.out.bias.all()  # the EMA has followed: they were zeros
    assert labels.tolist() == [0, 1]
    samples = np.load(out / "samples.npz")
    assert samples["arr_1"].tolist() == [0, 1, 0, 1, 0, 1]
    assert json.loads(str(samples["how"]))["preset"] == "tiny"
    for name in TRAINERS:
        curves = log(out / f"{name}.jsonl")
        assert [[*curves["lr"]], [*curves["val_nats"]]] == [[1, 2, 3, 4, 5, 6], [3, 6]]


def test_every_layout_goes_through_all_scripts(tmp_path):
    shipped = SHIPPED / "tokenizer.safetensors"
    flags = {"2d": ["--layout", "2d"], "onestage": ["--onestage"],
             "post": ["--layout", "post", "--init", tmp_path / "2d" / "tokenizer.safetensors"],
             "1d": ["--layout", "1d", "--direct_ce", "--tau", 1, "--ce_weight", 0.3],
             "shipped": ["--init", shipped, "--lr", 0, "--min_lr", 0]}
    for name, chosen in flags.items():
        out = ["--out", tmp_path / name]
        call(*trainer("train_stage1", tmp_path / name), "--steps", 1, *chosen)
        if name != "onestage":
            call("pretokenize", "--data", folder() / "train", *out)
            call("train_ar", *STEPS, "--steps", 1, *out)
        call("sample", *out, "--num_samples", 4, "--columns", 1)
        assert torch.get_float32_matmul_precision() == "highest"  # the trainers had left "high"
    plain, post = (load_file(tmp_path / name / "codes.safetensors") for name in ("2d", "post"))
    assert torch.equal(plain["codes"], post["codes"][..., 8:])  # what makes them is frozen
    found = load_file(tmp_path / "shipped" / "tokenizer.safetensors")
    torch.testing.assert_close(found, load_file(shipped), rtol=0, atol=0)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_that_is_killed_or_cut_ends_as_one_that_never_was(tmp_path, name):
    words = [*trainer(name, tmp_path), "--resume"]  # at first there is nothing to resume
    for moment in (20_000, 60_000, 120_000):  # in a step, half-way through weights or a state
        ((code, text),) = copies(1, *words, before=lambda _, moment=moment: kill_at(moment))
        assert code == -signal.SIGKILL, text
    for half_written in ("train_stage1.pt.123.tmp", "train_ar.pt.123.tmp"):
        (tmp_path / half_written).touch()
    call(*words, "--steps", 3)
    call(*words)
    call(*words)  # nothing is left to do
    assert len(list(tmp_path.glob("*.tmp"))) == 1  # the other trainer may be at work
    assert log(tmp_path / f"{name}.jsonl") == log(pipeline() / f"{name}.jsonl")
    for file, content in contents(tmp_path, "*.safetensors").items():
        assert content == (pipeline() / file).read_bytes(), file
    assert "was made with seed 0 and not 1" in refusal(*words, "--seed", 1)
    if name == "train_stage1":
        call(*words, "--tau", 0.1)  # as it is without the flag
        assert "made with tau 0.1 and not 1.0" in refusal(*words, "--tau", 1)


def test_pretokenize_goes_on_from_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("pretokenize.PART_SIZE", 10)
    words = ["pretokenize", "--data", folder() / "train", "--flip", "--batch_size", 6,
             "--num_workers", 1, "--tokenizer", pipeline() / "tokenizer.safetensors", "--out"]
    real = Images.open
    with mock.patch.object(Images, "open", autospec=True) as opened:
        opened.side_effect = lambda images, i: real(images, i) if i != 35 else sys.exit("power cut")
        assert refusal(*words, tmp_path / "one") == "power cut"
        opened.reset_mock()
        opened.side_effect = real
        call(*words, tmp_path / "one")
        assert opened.call_count <= 16 + 28  # not the first two of the five training parts
    assert {code for code, _ in copies(2, *words, tmp_path / "ranks")} == {0}
    for out in (tmp_path / "one", tmp_path / "ranks"):
        assert contents(out) == contents(pipeline(), "codes*")


# Without the discriminator, whose BatchNorm sees the images of one forward, and without dropout
@pytest.mark.parametrize("name, flag, graphs", [("train_stage1", "--gan_weight", 3),
                                                ("train_ar", "--dropout", 1)])
def test_ranks_and_micro_batches_train_as_one_process(tmp_path, name, flag, graphs):
    def backend(graph, _):  # no C++ compiler is needed
        print("compiled, to be split by DDP:", torch._dynamo.config.optimize_ddp)
        return graph

    def before(_):
        torch.compile = functools.partial(torch.compile, backend=backend, fullgraph=True)

    flags = ["--steps", 3, flag, 0]
    call(*trainer(name, tmp_path / "one"), *flags)
    flags += ["--micro_batch_size", 2, "--gradient_checkpointing", "--compile"]
    words = [*trainer(name, tmp_path / "ranks"), *flags]
    (first, text), (second, _) = copies(2, *words, before=before)
    assert [first, second] == [0, 0], text
    assert text.count("compiled, to be split by DDP: False") == graphs  # equal blocks once
    expected, found = (log(tmp_path / out / f"{name}.jsonl") for out in ("one", "ranks"))
    for key in expected.keys() - {"accuracy"}:  # it is of the last micro-batch
        assert found[key] == pytest.approx(expected[key], rel=1e-4), key
    for path in tmp_path.glob("ranks/*.safetensors"):
        expected = load_file(tmp_path / "one" / path.name)
        torch.testing.assert_close(load_file(path), expected, atol=3e-5, rtol=0)


def test_the_weights_of_two_ranks_are_the_same_in_each_step(tmp_path):
    show = functools.partial(register_optimizer_step_post_hook, lambda optimizer, *_: print(sum(
        p.double().sum() for group in optimizer.param_groups for p in group["params"])))
    (_, first), (_, second) = copies(2, *trainer("train_stage1", tmp_path), before=lambda _: show())
    assert set(second.splitlines()) < set(first.splitlines())
    assert second.count("tensor") == 2 * 6  # of tokenizer and AR model, and the discriminator's


def test_samples_depend_on_seed_and_number_alone(tmp_path):
    words = ["sample", "--pair", pipeline(), "--num_samples", 6, "--columns", 2, "--out"]
    call(*words, tmp_path / "seed", "--seed", 1)
    (first, text), (second, _) = copies(2, *words, tmp_path / "ranks", "--batch_size", 4)
    assert [first, second] == [0, 0] and "2 x cpu" in text
    expected, seed, ranks = (np.load(folder / "samples.npz")["arr_0"] for folder in
                             (pipeline(), tmp_path / "seed", tmp_path / "ranks"))
    assert np.array_equal(ranks, expected)
    assert not np.array_equal(seed, expected)


def test_a_rank_that_fails_ends_the_other(tmp_path):
    words = [*trainer("train_stage1", tmp_path), "--steps", 1000]
    broken = mock.patch.object(Images, "open", lambda *_: sys.exit("7.png cannot be read"))
    (first, text), second = copies(2, *words, before=lambda rank: rank and broken.start())
    assert second == (1, "7.png cannot be read\n")
    assert first == 1, text  # and not the signal of the alarm


@pytest.mark.parametrize("name, limit", [  # of the state, weights, a part of the tokens, pictures
    ("train_ar", 5_000_000), ("train_ar", 20_000), ("pretokenize", 2000), ("sample", 2000)])
def test_a_full_disk_gets_a_sentence_and_spoils_nothing(tmp_path, name, limit):
    shutil.copytree(pipeline(), tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path, "*.*t*")  # .safetensors, .pt, .tmp
    words = [name, "--out", tmp_path]
    if name == "train_ar":  # one more step, which leaves the weights as they are
        words += [*STEPS, "--resume", "--steps", 7, "--lr", 0, "--min_lr", 0]
    full = (resource.RLIMIT_FSIZE, (limit, limit))  # bytes of a file
    ((code, text),) = copies(1, *words, before=lambda _: resource.setrlimit(*full))
    assert code == 1
    assert "cannot be written (is the disk full?)" in text and "Traceback" not in text
    assert contents(tmp_path, "*.*t*") == before
