"""README.md: its changes to the code work, its links lead somewhere, and its commands, as those of
all recipes, have flags that the scripts know; what the recipes themselves decide."""

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from test_scripts import ROOT, copies, trainer

import ar
import tokenizer
import train_stage1
from tokenizer import read_safetensors

README = (ROOT / "README.md").read_text()
# Rows of the recipes that README.md does not name
RECIPES = """
for row in prologue_l 1d 2d 2d_l post onestage direct_2d_3; do recipes/stage1.sh $row; done
for row in b_l b_xl l_b l_l l_xl 2d_l_b post; do recipes/ar.sh $row; done
recipes/ablations.sh
recipes/one_gpu.sh
for file in recipes/*.sh recipes/../tools/*.sh; do bash -n $file; done
"""
# In the place of python and torchrun: says what it is asked to run, and leaves --out as they do
FAKE = f"""#!/usr/bin/env bash
[[ $1 = -c ]] && exec {sys.executable} "$@"
printf "RUN"; printf " %q" "$@"; echo
while [[ $# -gt 1 ]]; do [[ $1 = --out ]] && mkdir -p "$2"; shift; done
exit ${{STATUS:-0}}
"""


def bash(folder, *lines, **env):
    """Runs lines in a folder with the recipes, where python and torchrun are FAKE and where there
    is a sleep as long as there are files nap*."""
    scripts = {"python": FAKE, "torchrun": FAKE, "sleep": "#!/bin/sh\nrm $(ls nap* | head -n 1)"}
    (folder / "bin").mkdir()
    for name, text in scripts.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    path = f"{folder}/bin:{os.environ['PATH']}"
    return subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=folder, capture_output=True,
                          text=True, env=os.environ | {"PATH": path} | env)


def python_block(word):
    """The one Python block of README.md with this word in it."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    (block,) = [block for block in blocks if word in block]
    return textwrap.dedent(block)


def test_the_changes_that_it_shows(tmp_path):
    """FSQ, the hinge loss and an AR size are put into copies of this process, which train."""
    size = re.search(r'"mine": (dict\(.*?\)),', README)[1]
    source = (ROOT / "train_stage1.py").read_text()
    for line in map(str.strip, python_block("F.relu").splitlines()):
        variable, equals, _ = line.partition(" = ")
        if equals and not line.startswith("#"):
            source, count = re.subn(rf"\b{variable} = F\..*", line, source)
            assert count == 1

    def change(_):
        exec(python_block("VisualQuantizer"), vars(tokenizer))
        ar.SIZES["mine"] = eval(size)
        exec(source, vars(train_stage1))

    ((code, said),) = copies(1, *trainer("train_stage1", tmp_path), "--codebook_size", 256,
                             "--code_dim", 4, "--ar_size", "mine", before=change)
    assert code == 0, said
    assert read_safetensors(tmp_path / "joint_ar.safetensors", "ar")[1]["dim"] == 160
    assert "visual_quantizer.place" in load_file(tmp_path / "tokenizer.safetensors")


def test_its_fsq_is_exact_under_autocast():
    names = dict(vars(tokenizer))
    exec(python_block("VisualQuantizer"), names)
    torch.manual_seed(0)
    quantizer = names["VisualQuantizer"](96, 256, 4)
    h = torch.randn(8, 49, 96)
    codes = quantizer(h)[1]
    assert len(codes.unique()) > 10
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer(h)[1].equal(codes)


def test_its_commands_are_known(tmp_path):
    text = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
    lines = re.findall(r"^(?:export |python \S+\.py|recipes/\S+\.sh|torchrun ).*", text, re.M)
    lines += re.findall(r"`((?:python \S+\.py|recipes/\S+\.sh \S)[^`]*)`", README)
    ran = bash(tmp_path, *lines, RECIPES, REFERENCE="/dev/null")
    assert ran.returncode == 0, ran.stderr
    commands = re.findall(r"^RUN .*?(\S+\.py.*)", ran.stdout, re.M)
    assert len(commands) > 60
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(parser):
        parse(parser)
        sys.exit("parsed")

    for command in commands:
        script, *words = shlex.split(command)
        script = runpy.run_path(ROOT / script.removeprefix(f"{tmp_path}/"))
        with mock.patch.object(sys, "argv", [command, *words]):
            if "parse_args" in script:
                script["parse_args"]()
                continue
            with (mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_end),
                  pytest.raises(SystemExit, match="parsed")):
                script["main"]()


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    here = [link.partition("#")[0] for link in links if "://" not in link]
    assert len(here) > 5
    assert [link for link in here if not (ROOT / link).exists()] == []


def test_a_dry_run_only_prints(tmp_path):
    others = "recipes/evaluate.sh released\nrecipes/watch.sh runs/b_b"
    ran = bash(tmp_path, "recipes/stage1.sh 2d", RECIPES, others, DRY="1")
    assert ran.returncode == 0, ran.stderr
    first, *more = ran.stdout.splitlines()
    assert first.startswith("torchrun --standalone --nproc_per_node 8 /")
    assert "/train_stage1.py --out runs/2d --data" in first
    assert len(more) > 90 and "RUN" not in ran.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "recipes"}


@pytest.mark.parametrize("saved, there", [(6, True), (4, False)])
def test_tokens_are_made_when_stage_1_is_done(tmp_path, saved, there):
    folder = tmp_path / "runs" / "prologue_b"
    folder.mkdir(parents=True)
    torch.save({"step": saved, "steps": 6}, folder / "train_stage1.pt")
    ran = bash(tmp_path, "recipes/ar.sh b_b")
    assert (ran.returncode == 0, "pretokenize.py" in ran.stdout) == (there, there)
    assert there or f"stage 1 has saved step {saved}, which is not its last" in ran.stderr


def test_scores_stand_below_those_of_the_paper(tmp_path):
    pair = tmp_path / "pair"
    for mode, fid in (("cfg", 4.5), ("no_cfg", 12.5)):
        (pair / f"p256-{mode}_50000").mkdir(parents=True)
        (pair / "ar.safetensors").touch()
        score = json.dumps({"fid": fid, "precision": 0.8})
        (pair / f"p256-{mode}_50000" / "score.json").write_text(score)
    os.utime(pair / "ar.safetensors", (0, 0))
    ran = bash(tmp_path, "recipes/evaluate.sh pair p256", REFERENCE="/dev/null")
    assert [line.split() for line in ran.stdout.splitlines()[1:]] == [
        ["p256", "12.10", "4.36"], ["measured", "12.5", "4.5", "-", "0.8", "-"]]


def test_watch_tries_a_pair_again(tmp_path):
    for name in ("tokenizer.safetensors", "ar.safetensors", "nap1", "nap2"):
        (tmp_path / name).touch()
    torch.save({"step": 6}, tmp_path / "train_ar.pt")
    ran = bash(tmp_path, "recipes/watch.sh .", STATUS="1")
    assert ran.stdout.count("RUN") == ran.stderr.count("step 6 could not be scored") == 2
