"""Long features under a linear SVM: does their scale explain its accuracy?

    python step2_gan/autoencoder_mnist.py --split val --run-name val
    python results/svm_scale.py autoencoder_mnist runs/autoencoder_mnist/val/model.pt
    python results/svm_scale.py train_fc_alae runs/train_fc_alae/NAME/model.pt

Kept: results/svm_scale.md. The SVM's C weighs the slack against ‖w‖²: features a times larger are
as good as C a² times larger.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "step2_gan"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "step3_official_alae"))
import shared

import autoencoder_mnist
import train_fc_alae
from paper_table import markdown

EXPERIMENTS = {"autoencoder_mnist": autoencoder_mnist, "train_fc_alae": train_fc_alae}
CS = 0.0002, 0.002, 0.02, 0.2, 2.0  # the protocol's is 0.02


def long_features(nets, data, config):
    """The activations (N, 1024) before E's last layer, of training and of test images."""
    x_train, x_test = data.x_train, data.x_test
    if isinstance(config, train_fc_alae.Config):
        x_train, x_test = (train_fc_alae.to_x(x, config) for x in (x_train, x_test))
    return [shared.chunked(nets["E"][:4], x) for x in (x_train, x_test)]


def table(config, data, nets):
    """% right on the test images of config.split, a row for each scaling of the features."""
    train, test = long_features(nets, data, config)
    mean, std = train.mean(0), train.std(0) + 1e-6
    scaled = {"as they are": (train, test)}
    scaled["standardised"] = (train - mean) / std, (test - mean) / std
    lines = [[f"long features, {config.dataset} {config.split}", "mean square"]]
    lines[0] += [f"C = {C:g}" for C in CS]
    for name, (a, b) in scaled.items():
        right = [shared.classifiers.svm_accuracy(a, data.y_train, b, data.y_test, C=C) for C in CS]
        square = f"{a.square().mean().item():.3g}"
        lines.append([name, square, *(f"{percent:.2f}" for percent in right)])
    return markdown(lines)


def main(experiment, path):
    module = EXPERIMENTS[experiment]
    config = shared.parse_config(module.Config, argv=["--eval", path])
    device = shared.setup(config)
    data = shared.load_data(config, device)
    if data.y_train is None:
        shared.fail(f"{path}: {config.dataset} has no labels")
    nets = module.build(config, data.x_train.shape[1]).to(device)
    checkpoint = shared.load_checkpoint(path, module.Config)
    if "random" in checkpoint:
        shared.fail(f"{path} is a checkpoint: give the run's model.pt")
    for name, net in nets.items():
        net.load_state_dict(checkpoint[name])
    command = checkpoint["history"]["commands"][0]
    print(f"Features of `{command}`, {shared.hardware(device)}:\n\n{table(config, data, nets)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = shared.fail
    parser.add_argument("experiment", choices=tuple(EXPERIMENTS))
    parser.add_argument("model", help="a model.pt of it")
    options = parser.parse_args()
    main(options.experiment, options.model)
