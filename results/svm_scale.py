"""An autoencoder's long features under a linear SVM: does their scale explain its accuracy?

    python step2_gan/autoencoder_mnist.py --split val --run-name val
    python results/svm_scale.py runs/autoencoder_mnist/val/model.pt    # kept: results/svm_scale.md

The SVM's C weighs the slack against ‖w‖²: features a times larger are as good as C a² times larger.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "step2_gan"))
import shared

import autoencoder_mnist

FACTORS = 1, 10, 100, 1000  # of the protocol's C = 0.02


def table(config, data, nets):
    """% right on the test images of config.split, a row for each scaling of the features."""
    train, test = (shared.chunked(nets["E"][:4], x) for x in (data.x_train, data.x_test))
    mean, std = train.mean(0), train.std(0) + 1e-6
    standardised = (train - mean) / std, (test - mean) / std
    lines = [f"| long features, {config.dataset} {config.split} | mean square |"]
    lines[0] += "".join(f" C = {0.02 * factor:g} |" for factor in FACTORS)
    lines.append("|---" * (2 + len(FACTORS)) + "|")
    for name, (a, b) in (("as they are", (train, test)), ("standardised", standardised)):
        line = f"| {name} | {a.square().mean().item():.3g} |"
        for factor in FACTORS:
            right = shared.svm_accuracy(a, data.y_train, b, data.y_test, C=0.02 * factor)
            line += f" {right:.2f} |"
        lines.append(line)
    return "\n".join(lines)


def main(path):
    config = shared.parse_config(autoencoder_mnist.Config, argv=["--eval", path])
    device = shared.setup(config)
    data = shared.load_data(config, device)
    nets = autoencoder_mnist.build(config, data.x_train.shape[1]).to(device)
    checkpoint = shared.load_checkpoint(path, autoencoder_mnist.Config)
    for name, net in nets.items():
        net.load_state_dict(checkpoint[name])
    command = f"python step2_gan/autoencoder_mnist.py --split {config.split} --seed {config.seed}"
    print(f"Of `{command} --epochs {checkpoint['epoch']}`, {shared.hardware(device)}:\n")
    print(table(config, data, nets))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = shared.fail
    parser.add_argument("model", help="a model.pt of autoencoder_mnist.py")
    main(parser.parse_args().model)
