"""tools/walkthrough.ipynb: its code cells run, here without Jupyter, and its pictures are kept."""

import json

from test_scripts import ROOT


def test_walkthrough(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "tools" / "walkthrough.ipynb").read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    kept = [output.get("data", {}) for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in data for data in kept) == 10
    assert len(text) < 400_000

    # What its last two pictures say
    ce = names["norms"]["ce"]
    assert [name for name, norm in ce.items() if norm > 0] == [
        "encoder", "prologue projection", "prologue codebook", "AR model"]
    into = names["into"]  # (K, L): from the CE of a position into a prologue token
    assert (into.tril() == 0).all()
    assert (into[:, 8:] > 0).all()
