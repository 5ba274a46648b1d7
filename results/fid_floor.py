"""LeNet-FID of real digits, what a perfect generator would have, and how it varies with the draw.

    python results/fid_floor.py    # writes results/fid_floor.md

10,000 of the training images at a time, and of samples of the trained model, against the 10,000
test images.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "step3_official_alae"))
import shared

import torch
import train_fc_alae as alae
from paper_table import mean_std
from torch import nn

MODEL = "assets/fc_alae.pt"


def trained_model():
    """Its config, and its nets without gradients."""
    path = str(shared.ROOT / MODEL)
    config = shared.parse_config(alae.Config, alae.PRESETS, ["--eval", path])
    nets = alae.build(config, 784).requires_grad_(False)
    checkpoint = shared.load_checkpoint(path, alae.Config)
    for name, net in nets.items():
        net.load_state_dict(checkpoint[name])
    return config, nets


def main():
    protocol = shared.Protocol(device="cpu")
    data = shared.load_data(protocol, shared.setup(protocol))
    real = data.images(data.x_test)
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    floors = [shared.lenet.fid(real, data.images(data.x_train[i])) for i in order.split(10_000)]
    config, nets = trained_model()
    generator = nn.Sequential(nets["F"], nets["G"])
    fids = []
    for seed in range(10):
        z = torch.randn(10_000, config.latent_dim, generator=torch.Generator().manual_seed(seed))
        x_fake = alae.to_pixels(shared.chunked(generator, z), config)
        fids.append(shared.lenet.fid(real, data.images(x_fake)))
    text = "# LeNet-FID of real digits, and of ten draws of z\n\n"
    text += "Real digits (six disjoint sets of 10,000 training images, each against the test "
    text += f"images): {mean_std(floors, '.2f')}.\n\n"
    text += f"Samples of `{MODEL}` (ten draws of z): {mean_std(fids, '.2f')}, from "
    text += f"{min(fids):.2f} to {max(fids):.2f}. The model's evaluation uses the first draw, "
    text += f"{fids[0]:.2f}.\n\n"
    text += "By `python results/fid_floor.py`.\n"
    (shared.ROOT / "results/fid_floor.md").write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = shared.fail
    parser.parse_args()
    main()
