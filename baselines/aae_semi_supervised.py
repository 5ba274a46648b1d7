"""Semi-supervised classification and clustering by an adversarial autoencoder, arXiv 1511.05644.

The encoder Q: x → (y, z) gives class probabilities y (a softmax) and a style z; P decodes both:
x̂ = P(y, z). Two discriminators make y look like one-hot vectors, all classes alike, and z like
N(0, I). For each batch:

    1. reconstruction   Q, P      minimise  L_rec = ‖x − P(Q(x))‖²  (mean over pixels)
    2. regularization   D_y, D_z  minimise  L_D = Σ −log D(c) − log(1 − D(c_fake)),
                                            c ~ p(y) or p(z),  c_fake = y or z of (y, z) = Q(x)
                        Q         minimises L_Q = Σ −log D(c_fake)    (sums over D_y and D_z)
    3. supervision      Q         minimises L_sup = −log y_k, on labelled images of class k

Without labels (--cluster N) phase 3 is left out and y has N entries. A cluster's class is that of
the training image which is surest to belong to it.

    python baselines/aae_semi_supervised.py --labels 100    # of 60,000
    python baselines/aae_semi_supervised.py --labels 0      # all
    python baselines/aae_semi_supervised.py --cluster 30    # none; try --noise-y 0.3

Expect (fp32, three seeds): error 3.4 ± 0.2 % with 100 labels (val: 4.4 ± 0.8), 2.3 ± 0.2 with 1000.

Deviations from the paper (details of its appendix are from memory):
 1. Adam with β₁ = 0.5 instead of SGD with momentum, and learning rates that fall linearly to 0 over
    the second half (--decay): the paper trains for thousands of epochs. Rates were compared on
    val in short trials that are not kept, after test errors of slower ones had been seen.
 2. Regularization learns at 0.3 of the rate of the rest: Adam's steps do not get smaller with the
    loss, so that this ratio decides who leads y.
 3. Q has batch norm (--batch-norm); the noise on its input (--noise) is the paper's, from memory.
 4. The discriminators have 500 units in each layer, as in github.com/PatrykChrabaszcz/
    Adversarial_Autoencoder, not 1000, to save time (--hidden-D).
 5. The labelled images of a batch are drawn with replacement.
 6. A cluster gets its class from a training image, where the paper takes a validation image.
 7. L_rec is the mean over pixels.
 8. --noise-y 0.3 (ours, off by default) adds noise to what D_y sees, so that fewer clusters stay
    empty: README.md says why.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot, pad, softplus


@dataclass
class Config(shared.Protocol):
    epochs: int = option(20, "passes over the training images (paper: thousands)", low=0)
    batch_size: int = option(100, "images per step, and labelled ones", low=2)
    labels: int = option(1000, "labelled images, as many of each class; 0: all", low=0)
    cluster: int = option(0, "clusters, without labels (paper: 16, 30); 0: no clustering", low=0)
    latent_dim: int = option(10, "dimension of z (paper §5)", low=1)
    noise: float = option(0.3, "standard deviation of noise on Q's input (deviation 3)", low=0)
    batch_norm: bool = option(True, "in Q (ours)")
    noise_y: float = option(0.0, "standard deviation of noise on D_y's input (deviation 8)", low=0)
    hidden_D: int = option(500, "units of the discriminators' two layers (paper: 1000)", low=1)
    lr: float = option(0.004, "Adam's rate for reconstruction (deviation 1)", low=1e-9)
    lr_reg: float = option(0.0012, "for regularization (deviation 2)", low=1e-9)
    lr_sup: float = option(0.004, "for supervision (deviation 1)", low=1e-9)
    beta1: float = option(0.5, "β₁ of Adam (deviation 1)", low=0, high=1)
    decay: float = option(0.5, "last share of the training, with falling rates", low=0, high=1.01)
    precision: str = option("fp32", "of matrix products in training", ("fp32", "bf16"))


# B batch, K classes or clusters, Z = latent_dim, X = pixels (784), N = 1000


class Noise(nn.Module):
    """x + σ ε with ε ~ N(0, I) in training, else x."""

    def __init__(self, sigma):
        super().__init__()
        self.sigma = sigma

    def forward(self, x):
        if self.training and self.sigma:
            return x + self.sigma * torch.randn_like(x)
        return x


def layers(n, m, batch_norm=False):
    """A linear layer, batch norm if wanted, ReLU."""
    norm = [nn.BatchNorm1d(m)] if batch_norm else []
    return [nn.Linear(n, m), *norm, nn.ReLU()]


def build(config, X, K):
    """Q: x (B, X) → logits of y, and z (B, K + Z); P: (y, z) → pixels' logits; D_y, D_z → one."""
    Z, N, norm = config.latent_dim, 1000, config.batch_norm

    def D(n, noise=0.0):
        M = config.hidden_D
        return shared.Float32(Noise(noise), *layers(n, M), *layers(M, M), nn.Linear(M, 1))

    Q = nn.Sequential(
        Noise(config.noise),
        *layers(X, N, norm),
        *layers(N, N, norm),
        nn.Linear(N, K + Z),
    )
    P = nn.Sequential(*layers(K + Z, N), *layers(N, N), nn.Linear(N, X))
    return nn.ModuleDict({"Q": Q, "P": P, "D_y": D(K, config.noise_y), "D_z": D(Z)})


def code(Q, x, config):
    """y (B, K), z (B, Z): class probabilities and style."""
    y, z = shared.fp32(Q(x)).tensor_split([-config.latent_dim], 1)
    return y.softmax(1), z


def L_rec(logits, x):
    """Mean over batch and pixels of (x − σ(logits))²."""
    return (x - logits.sigmoid()).square().mean()


def L_D(D, c, c_fake):
    """−log D(c) − log(1 − D(c_fake)), mean over the batch; D gives logits."""
    return (softplus(-D(c)) + softplus(D(c_fake))).mean()


def L_Q(D, c_fake):
    """−log D(c_fake), mean over the batch."""
    return softplus(-D(c_fake)).mean()


def L_sup(Q, x, k, config):
    """−log y_k, mean over the batch x (B, X) of classes k (B,)."""
    return cross_entropy(shared.fp32(Q(x))[:, : -config.latent_dim], k)


def train_step(nets, opts, x, labelled, config):
    """The three phases on x (B, X) and on labelled = (images (B', X), classes (B',)), or None."""
    Q, P = nets["Q"], nets["P"]
    D_y, D_z = nets["D_y"], nets["D_z"]

    # Reconstruction
    with shared.products(config, x.device):
        logits = shared.fp32(P(torch.cat(code(Q, x, config), 1)))
    loss_rec = L_rec(logits, x)
    nets.zero_grad()
    loss_rec.backward()
    opts["P"].step()
    opts["Q_rec"].step()

    # Regularization: the discriminators, then Q against them
    with shared.products(config, x.device):
        y_fake, z_fake = code(Q, x, config)
    k = torch.randint(y_fake.shape[1], (len(x),), device=x.device)
    y, z = one_hot(k, y_fake.shape[1]).to(x), torch.randn_like(z_fake)
    loss_D = L_D(D_y, y, y_fake.detach()) + L_D(D_z, z, z_fake.detach())
    opts["D"].zero_grad()
    loss_D.backward()
    opts["D"].step()
    loss_Q = L_Q(D_y, y_fake) + L_Q(D_z, z_fake)
    opts["Q_reg"].zero_grad()
    loss_Q.backward(inputs=list(Q.parameters()))
    opts["Q_reg"].step()

    # Supervision
    losses = {"L_rec": loss_rec, "L_D": loss_D, "L_Q": loss_Q}
    if labelled:
        with shared.products(config, x.device):
            losses["L_sup"] = L_sup(Q, *labelled, config)
        opts["Q_sup"].zero_grad()
        losses["L_sup"].backward()
        opts["Q_sup"].step()
    return {name: loss.detach() for name, loss in losses.items()}


def optimizers(nets, config):
    """Adam for each role; Q has three."""

    def adam(lr, *names):
        parameters = nn.ModuleList(nets[name] for name in names).parameters()
        return torch.optim.Adam(parameters, lr, (config.beta1, 0.999), fused=True)

    return {
        "Q_rec": adam(config.lr, "Q"),
        "P": adam(config.lr, "P"),
        "Q_sup": adam(config.lr_sup, "Q"),
        "D": adam(config.lr_reg, "D_y", "D_z"),
        "Q_reg": adam(config.lr_reg, "Q"),
    }


def set_learning_rates(opts, config, progress):
    """The learning rates after the share `progress` of the training."""
    share = min(1.0, (1 - progress) / config.decay) if config.decay else 1.0
    for opt in opts.values():
        opt.param_groups[0]["lr"] = share * opt.defaults["lr"]


def balanced(y, n, seed):
    """Indices of n of the labels y (N,), as many of each class, drawn by seed; all for n = 0."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    if n == 0:
        return order
    k = int(y.max()) + 1
    most = k * int(y.bincount().min())
    if n % k or n > most:
        shared.fail(f"--labels {n}: must be a multiple of {k}, the classes, and at most {most}")
    return torch.cat([order[y[order] == c][: n // k] for c in range(k)])


def labelled_batch(data, chosen, config):
    """Images and classes of a batch drawn from the indices chosen; None where there are none."""
    if chosen is None:
        return None
    n = min(config.batch_size, len(chosen))
    i = chosen[torch.randint(len(chosen), (n,), device=chosen.device)]
    return data.x_train[i], data.y_train[i]


def class_of_each(y, data, config):
    """The class (K,) that each column of y (N, K), of the training images, stands for."""
    if config.cluster:
        return data.y_train[y.argmax(0)]  # of the surest image
    return torch.arange(y.shape[1], device=y.device)


@torch.no_grad()
def cluster_metrics(D_y, entries, K):
    """How many of K clusters have none of the entries (M,); and D_y's mean logit of one-hot y of
    filled and of empty clusters, and halfway between."""
    y = torch.eye(K, device=entries.device)
    empty = entries.bincount(minlength=K) == 0
    metrics = {"eval/empty_clusters": empty.sum().item()}
    metrics["eval/D_y_filled"] = D_y(y[~empty]).mean().item()
    if empty.any():
        halfway = (y[~empty, None] + y[empty]) / 2  # (filled, empty, K)
        metrics["eval/D_y_between"] = D_y(halfway).mean().item()
        metrics["eval/D_y_empty"] = D_y(y[empty]).mean().item()
    return metrics


def evaluate(nets, data, config, full=False):
    """A code, and so the short features, is (y, z)."""
    nets.eval()
    Q, P = nets["Q"], nets["P"]

    def encode(part):
        return torch.cat(code(Q[-1:], part, config), 1)

    long = [shared.chunked(Q[:-1], x) for x in (data.x_train, data.x_test)]
    train, test = [shared.chunked(encode, part) for part in long]
    x_rec = shared.chunked(P, test).sigmoid()
    x_fake = shared.chunked(P, fixed_codes(len(data.x_test), test, config)).sigmoid()
    metrics = shared.image_metrics(data, x_rec, x_fake)
    metrics |= shared.code_metrics(data, train, test, "short", full)
    if full:
        metrics |= shared.code_metrics(data, *long, "long")
    if data.y_train is not None:
        y_train, y_test = train[:, : -config.latent_dim], test[:, : -config.latent_dim]
        entries = y_test.argmax(1)
        predicted = class_of_each(y_train, data, config)[entries]
        metrics["eval/error"] = 100 - shared.classifiers.percent_right(predicted, data.y_test)
        if config.cluster:
            metrics |= cluster_metrics(nets["D_y"], entries, config.cluster)
    nets.train()
    return metrics


def fixed_codes(n, codes, config):
    """Always the same n codes (y, z) for P, of the width of `codes`; classes take turns."""
    K = codes.shape[1] - config.latent_dim
    z = torch.randn(n, config.latent_dim, generator=torch.Generator().manual_seed(0))
    return torch.cat([one_hot(torch.arange(n) % K, K), z], 1).to(codes)


@torch.no_grad()
def draw(run, data, config):
    """Samples, reconstructions, each style in all classes, and what is in the clusters."""
    run.nets.eval()
    Q, P = run.nets["Q"], run.nets["P"]
    known = f"{config.cluster} clusters" if config.cluster else f"{config.labels or 'all'} labels"
    title = f"AAE, {known}, epoch {run.epoch}"
    y, z = code(Q, data.x_test, config)
    codes = torch.cat([y, z], 1)
    classes = torch.eye(y.shape[1], device=z.device)

    def picture(name, x, columns, what):
        run.picture(name, shared.grid(data.images(x), columns, f"{title}: {what}"))

    picture("samples", P(fixed_codes(100, codes, config)).sigmoid(), 10, "samples")
    x, x_rec = data.images(data.x_test[:50]), data.images(P(codes[:50]).sigmoid())
    run.picture("reconstructions", shared.pairs(x, x_rec, f"{title}: test images x and P(Q(x))"))
    rows = []
    for x, style in zip(data.x_test[:10], z[:10], strict=True):
        rows += [x[None], P(torch.cat([classes, style.expand(len(classes), -1)], 1)).sigmoid()]
    picture("style", torch.cat(rows), 1 + len(classes), "test images, then their z with each y")
    if config.cluster:
        heads = P(pad(classes, (0, config.latent_dim))).sigmoid()  # z = 0
        rows = []
        for k, head in enumerate(heads):
            members = data.x_test[y.argmax(1) == k][:15]
            rows += [head[None], pad(members, (0, 0, 0, 15 - len(members)), value=1.0)]
        picture("clusters", torch.cat(rows), 16, "P(y, 0), and test images of each cluster")
    run.nets.train()


def main(config):
    device = shared.setup(config)
    data = shared.load_data(config, device)
    if config.cluster == 1 or (config.cluster and config.labels != Config.labels):
        shared.fail(f"--cluster {config.cluster}: must be two or more, and without --labels")
    if config.cluster:
        K, chosen = config.cluster, None
    elif data.y_train is None:
        shared.fail(f"{config.dataset} has no labels: choose --cluster")
    else:
        K = int(data.y_train.max()) + 1
        chosen = balanced(data.y_train, config.labels, config.seed)
    nets = build(config, data.x_train.shape[1], K).to(device)
    opts = optimizers(nets, config)
    parts = {"nets": nets} | opts

    run = shared.Run(config, device, nets, len(data.x_train) // config.batch_size)
    for epoch in run.epochs(parts):
        for i in shared.batches(data.x_train, config.batch_size, config.seed, epoch):
            set_learning_rates(opts, config, run.progress)  # its own
            labelled = labelled_batch(data, chosen, config)  # its own
            losses = train_step(nets, opts, data.x_train[i], labelled, config)  # its own
            run.step(losses, len(i))
        run.log_losses()
        if run.is_due():
            run.log(evaluate(run.nets, data, config))
            draw(run, data, config)
        run.save(parts)
    metrics = evaluate(run.nets, data, config, full=True)
    draw(run, data, config)
    run.finish(metrics)


if __name__ == "__main__":
    main(shared.parse_config(Config))
