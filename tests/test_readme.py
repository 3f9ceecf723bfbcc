"""README.md: its changes, links and commands, those of all recipes, and what these decide."""

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


def test_the_changes_that_it_shows(tmp_path):
    """FSQ, the hinge loss and an AR size are put into copies of this process, which train."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    example, fsq, hinge = [textwrap.dedent(block) for block in blocks]
    exec(example.replace("checkpoints/", f"{ROOT}/checkpoints/"), {})  # its last line asserts
    size = re.search(r'"mine": (dict\(.*?\)),', README)[1]
    source = (ROOT / "train_stage1.py").read_text()
    for line in hinge.splitlines():
        variable, _, _ = line.partition(" = ")
        source, count = re.subn(rf"\b{variable} = F\..*", line, source)
        assert count == 1

    def change(_):
        exec(fsq, vars(tokenizer))
        exec(source, vars(train_stage1))
        ar.SIZES["mine"] = eval(size)
        quantizer = tokenizer.VisualQuantizer(96, 256, 4)
        h = torch.randn(8, 49, 96)
        codes = quantizer(h)[1]
        assert len(codes.unique()) > 10
        with torch.autocast("cpu", torch.bfloat16):  # it is exact also here
            assert quantizer(h)[1].equal(codes)

    ((code, said),) = copies(1, *trainer("train_stage1", tmp_path), "--codebook_size", 256,
                             "--code_dim", 4, "--ar_size", "mine", before=change)
    assert code == 0, said
    assert tokenizer.read_safetensors(tmp_path / "joint_ar.safetensors", "ar")[1]["dim"] == 160
    assert "visual_quantizer.place" in load_file(tmp_path / "tokenizer.safetensors")


def test_its_min_p():
    (line,) = re.findall(r"`(p = p\.masked_fill.*?)`", README)
    source = (ROOT / "ar.py").read_text()
    source = source.replace("top_p=1.0):", "top_p=1.0, min_p=0.0):")
    source = source.replace("    cdf = ", f"    {line}\n    cdf = ")
    names = {"__name__": "changed"}
    exec(source, names)
    for min_p, code in ((0, 2), (0.2, 1), (2, 0)):  # the likeliest always stays
        logits = torch.tensor([[3.0, 2.0, 1.0]])
        assert names["sample_codes"](logits, torch.tensor([0.99]), min_p=min_p) == code


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
    links = re.findall(r"\]\(([^)#:]+)[)#]", README)  # addresses have a colon
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_a_dry_run_only_prints(tmp_path):
    others = "recipes/evaluate.sh released\nrecipes/watch.sh runs/b_b"
    ran = bash(tmp_path, "recipes/stage1.sh 2d", RECIPES, others, DRY="1")
    assert ran.returncode == 0, ran.stderr
    first = r"torchrun --standalone --nproc_per_node 8 /\S+/train_stage1.py --out runs/2d --data "
    assert re.match(first, ran.stdout)
    assert ran.stdout.count("\n") > 90 and "RUN" not in ran.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "recipes"}


def test_tokens_are_made_when_stage_1_is_done(tmp_path):
    for row, step in (("prologue_b", 6), ("prologue_l", 4)):
        (tmp_path / "runs" / row).mkdir(parents=True)
        torch.save({"step": step, "steps": 6}, tmp_path / "runs" / row / "train_stage1.pt")
    ran = bash(tmp_path, "recipes/ar.sh b_b", "recipes/ar.sh l_b")
    assert ran.stdout.count("RUN") == 2  # pretokenize.py and train_ar.py of b_b
    assert "prologue_l: stage 1 has saved step 4, which is not its last" in ran.stderr


def test_scores_stand_below_those_of_the_paper(tmp_path):
    (tmp_path / "ar.safetensors").touch()
    os.utime(tmp_path / "ar.safetensors", (0, 0))
    for mode, fid in (("cfg", 4.5), ("no_cfg", 12.5)):
        folder = tmp_path / f"p256-{mode}_50000"
        folder.mkdir()
        (folder / "score.json").write_text(json.dumps({"fid": fid, "precision": 0.8}))
    ran = bash(tmp_path, "recipes/evaluate.sh . p256", REFERENCE="/dev/null")
    assert [line.split() for line in ran.stdout.splitlines()[1:]] == [
        ["p256", "12.10", "4.36"], ["measured", "12.5", "4.5", "-", "0.8", "-"]]


def test_watch_tries_a_pair_again(tmp_path):
    for name in ("tokenizer.safetensors", "ar.safetensors", "nap1", "nap2"):
        (tmp_path / name).touch()
    torch.save({"step": 6}, tmp_path / "train_ar.pt")
    ran = bash(tmp_path, "recipes/watch.sh .", STATUS="1")
    assert ran.stdout.count("RUN") == ran.stderr.count("step 6 could not be scored") == 2
