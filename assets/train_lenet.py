"""Trains the LeNet of shared.py on MNIST's 60,000 training images and writes assets/lenet.pt, the classifier behind
eval/identity and eval/fid. The committed file was made by this command, once; every result rests on it, so it is not
made again (a new one makes all FIDs incomparable).

    python assets/train_lenet.py              # 99.44 % on the test images; under 2 minutes on two CPU cores
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

import shared


def train(split="dw", epochs=12, batch_size=128, lr=2e-3):
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(shared.probe_matmul(torch.device("cpu")))
    x, y, x_test, y_test = shared.load_images("mnist", split=split)
    net, generator = shared.lenet(torch.device("cpu"), trained=False), torch.Generator().manual_seed(0)
    steps = epochs * (len(x) // batch_size)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for epoch in range(epochs):
        for i in shared.batches(len(x), batch_size, generator):
            shift = torch.eye(2, 3).repeat(batch_size, 1, 1)  # each digit moved by up to 2 pixels
            shift[:, :, 2] = torch.randint(-2, 3, (batch_size, 2), generator=generator) / 14
            x_moved = grid_sample(x[i], affine_grid(shift, x[i].shape, align_corners=False), "nearest", align_corners=False)
            optimizer.zero_grad()
            cross_entropy(net(x_moved), y[i]).backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: {100 * (shared.in_chunks(net, x_test).argmax(1) == y_test).float().mean():.2f} %", flush=True)
    return net


if __name__ == "__main__":
    net = train(*sys.argv[1:])
    if len(sys.argv) == 1:
        torch.save(net.state_dict(), shared.ROOT / "assets" / "lenet.pt")
