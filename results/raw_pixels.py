"""What raw pixels are worth to the classifiers of table 1, on MNIST.

    python results/raw_pixels.py    # writes results/raw_pixels.md

On the official test images (dw) and on held-out training images (sw).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "step3_official_alae"))
import shared

from paper_table import markdown


def main():
    lines = [["data", "1-NN", "SVM", "MLP"]]
    for split in ("dw", "sw"):
        protocol = shared.Protocol(device="cpu", split=split)
        data = shared.load_data(protocol, shared.setup(protocol))
        metrics = shared.code_metrics(data, data.x_train, data.x_test, "short")
        lines.append([split, *(f"{value:.2f}" for value in metrics.values())])
    text = "# Classifiers of table 1 on raw pixels of MNIST, % right\n\n"
    text += f"{markdown(lines)}\nBy `python results/raw_pixels.py`.\n"
    (shared.ROOT / "results/raw_pixels.md").write_text(text)


if __name__ == "__main__":
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    argparse.ArgumentParser(description=__doc__, **how).parse_args()
    main()
