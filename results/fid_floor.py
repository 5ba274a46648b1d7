"""LeNet-FID of real digits: what a perfect generator would have.

    python results/fid_floor.py    # writes results/fid_floor.md

10,000 of the training images at a time, against the 10,000 test images.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "step3_official_alae"))
import shared

import torch
from paper_table import mean_std

if __name__ == "__main__":
    config = shared.Protocol(device="cpu")
    data = shared.load_data(config, shared.setup(config))
    real = data.images(data.x_test)
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    values = [shared.lenet.fid(real, data.images(data.x_train[i])) for i in order.split(10_000)]
    text = "# LeNet-FID of real digits\n\n"
    text += f"{mean_std(values, '.2f')}: six disjoint sets of 10,000 training images, each against "
    text += "the test images. By `python results/fid_floor.py`.\n"
    (shared.ROOT / "results/fid_floor.md").write_text(text)
