"""Names the classes of an AR model for ImageNet: "tench" where it has n01440764.

    python tools/name_classes.py runs/b_b --data imagenet.zip/ILSVRC/Data/CLS-LOC

The names are those of Kaggle's LOC_synset_mapping.txt in a folder above --data, or in its zip: of
each class the first word, and where two share it (crane, maillot) the n-number, too. `sample.py
--classes` takes them. Training on goes back to the n-numbers of the folders, and so does --init,
for which a subset of ImageNet should start from ar_best.safetensors, whose names stay.
"""

import argparse
import os
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ar import AR
from pretokenize import texts_above

TABLE = "LOC_synset_mapping.txt"


def main():
    parser = argparse.ArgumentParser(description="Name the classes of an AR model for ImageNet.")
    parser.add_argument("pair", help="folder of ar.safetensors")
    parser.add_argument("--data", required=True, help=f"a path below the folder of {TABLE}")
    args = parser.parse_args()
    path = Path(args.pair) / "ar.safetensors"
    ar = AR.load(path)
    text = next(texts_above(args.data, TABLE), "")
    words = dict(re.findall(r"^(n\d+) ([^,\r\n]+)", text, re.M))  # {n-number: first word}
    uses = Counter(words.values())
    names = {n: word if uses[word] == 1 else f"{word} ({n})" for n, word in words.items()}
    count = sum(name in names for name in ar.config.classes)
    if count > 0:
        ar.config.classes = [names.get(name, name) for name in ar.config.classes]
        times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        ar.save(path)
        os.utime(path, ns=times)  # recipes see by the time which scores are of older weights
    print(f"{path}: {count} of {ar.config.num_classes} classes get a name")


if __name__ == "__main__":
    main()
