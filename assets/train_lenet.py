"""Trains the LeNet of shared.py on MNIST's 60,000 training images: the judge behind LeNet-FID.

    python assets/train_lenet.py              # writes assets/lenet.pt, in under 2 minutes

The committed file was made once. Every result rests on it, so it is not made again: a new one would
make all LeNet-FIDs incomparable. Right on 99.44 % of the test images.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

import torch
from torch.nn.functional import affine_grid, cross_entropy, grid_sample


def moved(images, generator):
    """Each image (B, 1, 28, 28) moved by up to 2 pixels in both directions."""
    shift = torch.eye(2, 3).repeat(len(images), 1, 1)
    shift[:, :, 2] = torch.randint(-2, 3, (len(images), 2), generator=generator) / 14
    grid = affine_grid(shift, images.shape, align_corners=False)
    return grid_sample(images, grid, "nearest", align_corners=False)


def train(config, epochs=12, batch_size=128, lr=2e-3):
    device = shared.setup(config)
    data = shared.load_data(config, device)
    x = data.images(data.x_train)
    net = shared.lenet(device, trained=False)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=1e-5)
    steps = epochs * (len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for i in order[: len(x) - len(x) % batch_size].view(-1, batch_size):
            optimizer.zero_grad()
            cross_entropy(net(moved(x[i], generator)), data.y_train[i]).backward()
            optimizer.step()
            schedule.step()
        predicted = shared.judge(net, data.images(data.x_test)).argmax(1)
        right = shared.percent_right(predicted, data.y_test)
        print(f"epoch {epoch + 1}: {right:.2f} % right on the test images", flush=True)
    return net


if __name__ == "__main__":
    net = train(shared.Protocol(device="cpu"))
    torch.save(net.state_dict(), shared.ROOT / "assets" / "lenet.pt")
