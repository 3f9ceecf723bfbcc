"""README.md: its three changes to the code work, its commands have flags that the scripts know, its
links lead somewhere."""

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
from test_scripts import ROOT, STEPS, copies, folder

from tokenizer import read_safetensors

README = (ROOT / "README.md").read_text()
OPTIONAL = {"matplotlib", "gradio", "huggingface_hub"}
# In the place of python and torchrun: says what it is asked to run, and leaves --out as they do
FAKE = """#!/usr/bin/env bash
[[ $1 = -c ]] && echo 1 && exit
printf "RUN"; printf " %q" "$@"; echo
while [[ $# -gt 1 ]]; do [[ $1 = --out ]] && mkdir -p "$2"; shift; done
exit 0
"""


class Parsed(Exception):
    """Ends a script when it has read its command line; the argument: what it did not know."""


def test_the_changes_that_it_shows(tmp_path):
    """FSQ, the hinge loss and an AR size are put into copies of the files, which are trained."""
    blocks = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", README, re.S)]
    (fsq,) = [block for block in blocks if block.startswith("class VisualQuantizer")]
    (hinge,) = [block for block in blocks if "vanilla = " in block]
    (size,) = re.findall(r'`("mine": dict\(.*?\),)`', README)
    names = ("tokenizer", "ar", "train_stage1", "pretokenize")
    text = {name: (ROOT / f"{name}.py").read_text() for name in names}
    old = re.search(r"^class VisualQuantizer.*?(?=^def )", text["tokenizer"], re.M | re.S).group()
    text["tokenizer"] = text["tokenizer"].replace(old, f"{fsq}\n\n")
    text["ar"] = text["ar"].replace("SIZES = {\n", f"SIZES = {{\n    {size}\n")
    for line in map(str.strip, hinge.strip().splitlines()):
        variable = line.partition(" = ")[0]
        old = re.search(rf"^ *({variable} = F\..*)$", text["train_stage1"], re.M).group(1)
        text["train_stage1"] = text["train_stage1"].replace(old, line)
    for name in names:
        assert name == "pretokenize" or text[name] != (ROOT / f"{name}.py").read_text()
        (tmp_path / f"{name}.py").write_text(text[name])

    def use_the_copies(_):
        for name in names:
            sys.modules.pop(name, None)
        sys.path.insert(0, str(tmp_path))

    data = ["--data", folder() / "train", "--out", tmp_path]
    for words in (["train_stage1", *STEPS, "--steps", 2, "--codebook_size", 256, "--code_dim", 4,
                   "--ar_size", "mine"], ["pretokenize"]):
        ((code, said),) = copies(1, *words, *data, before=use_the_copies)
        assert code == 0, said
    assert read_safetensors(tmp_path / "joint_ar.safetensors", "ar")[1]["dim"] == 160
    assert "visual_quantizer.place" in load_file(tmp_path / "tokenizer.safetensors")
    assert load_file(tmp_path / "codes.safetensors")["codes"][..., 8:].int().max() < 256


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
    said = subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=tmp_path, check=True, text=True,
                          stdout=subprocess.PIPE,
                          env=os.environ | {"PATH": path, "REFERENCE": "/dev/null"}).stdout
    commands = re.findall(r"^RUN .*?(\S+\.py.*)", said, re.M)
    assert len(commands) > len(lines) > 20
    parse = argparse.ArgumentParser.parse_known_args

    def read_and_end(*args):
        raise Parsed(parse(*args)[1])

    for command in commands:
        script, *words = shlex.split(command)
        script = ROOT / script.removeprefix(f"{tmp_path}/")
        with (mock.patch.object(sys, "argv", [script.name, *words]),
              mock.patch.object(argparse.ArgumentParser, "parse_known_args", read_and_end),
              pytest.raises((Parsed, ModuleNotFoundError)) as ended):
            runpy.run_path(script, run_name="__main__")
        if isinstance(ended.value, ModuleNotFoundError):
            assert ended.value.name in OPTIONAL
        else:
            assert ended.value.args == ([],), command


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    here = [link.partition("#")[0] for link in links if "://" not in link]
    assert len(here) > 5
    assert [link for link in here if not (ROOT / link).exists()] == []
