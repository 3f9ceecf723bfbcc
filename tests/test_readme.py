"""README.md: its three changes to the code work, its links lead somewhere, and its commands, as
those of all recipes, have flags that the scripts know."""

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from unittest import mock

import pytest
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
FAKE = """#!/usr/bin/env bash
[[ $1 = -c ]] && echo 1 && exit
printf "RUN"; printf " %q" "$@"; echo
while [[ $# -gt 1 ]]; do [[ $1 = --out ]] && mkdir -p "$2"; shift; done
exit 0
"""


def test_the_changes_that_it_shows(tmp_path):
    """FSQ, the hinge loss and an AR size are put into copies of this process, which train."""
    fsq, hinge = re.findall(r"```python\n(.*?)```", README, re.S)
    (size,) = re.findall(r'`"mine": (dict\(.*?\)),`', README)
    source = (ROOT / "train_stage1.py").read_text()
    for line in map(str.strip, hinge.strip().splitlines()):
        variable = line.partition(" = ")[0]
        source, count = re.subn(rf"\b{variable} = F\..*", line, source)
        assert count == 1

    def change(_):
        exec(textwrap.dedent(fsq), vars(tokenizer))
        ar.SIZES["mine"] = eval(size)
        exec(source, vars(train_stage1))

    ((code, said),) = copies(1, *trainer("train_stage1", tmp_path), "--codebook_size", 256,
                             "--code_dim", 4, "--ar_size", "mine", before=change)
    assert code == 0, said
    assert read_safetensors(tmp_path / "joint_ar.safetensors", "ar")[1]["dim"] == 160
    assert "visual_quantizer.place" in load_file(tmp_path / "tokenizer.safetensors")


def test_its_commands_are_known(tmp_path):
    """Bash runs its lines with scripts and recipes in a folder where python is FAKE."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).write_text(FAKE)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "sleep").symlink_to(shutil.which("false"))  # so watch.sh ends
    text = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
    lines = re.findall(r"^(?:export |python \S+\.py|recipes/\S+\.sh|torchrun ).*", text, re.M)
    lines += re.findall(r"`((?:python \S+\.py|recipes/\S+\.sh \S)[^`]*)`", README)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    said = subprocess.run(["bash", "-ec", "\n".join([*lines, RECIPES])], cwd=tmp_path, check=True,
                          text=True, stdout=subprocess.PIPE,
                          env=os.environ | {"PATH": path, "REFERENCE": "/dev/null"}).stdout
    commands = re.findall(r"^RUN .*?(\S+\.py.*)", said, re.M)
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
