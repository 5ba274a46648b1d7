"""Adversarial autoencoder (AAE), arXiv 1511.05644, as a student project of Freiburg has it.

Encoder Q: x → z, decoder P: z → x̂; discriminator D tells z ~ p(z), N(0, I) cut at 2, from Q(x).
Three phases for each batch (paper §2):

    1. reconstruction  Q, P  minimise  L_rec = ‖x − P(Q(x))‖²
    2. discriminator   D     minimises L_D   = −log D(z) − log(1 − D(Q(x))),  z ~ p(z)
    3. generator       Q     minimises L_Q   = −log D(Q(x))

Scenarios 1 to 4 of github.com/PatrykChrabaszcz/Adversarial_Autoencoder: dense nets (1, 2) or
convolutions (--net conv: 3, 4); with --labels (1, 3) P and D see the class y, z keeps the style.

    python baselines/aae_freiburg.py                           # scenario 2, as published
    python baselines/aae_freiburg.py --preset ours             # our rates
    python baselines/aae_freiburg.py --preset faces --dataset folder:PATH

Expect (--preset ours, seed 0): test MSE 0.0232, identity 90.1 %, prior gap 0.033, floor 0.017.

Presets january (commit 87b475a) and head (2c29b54) are two states of that code. Deviations from it:
 1. There rates are divided by hand. Here (but in head) they are divided by 5 whenever --patience
    epochs bring the training's L_rec down by less than 1 %. There is no last stage of RMSprop here.
 2. Only there: TensorFlow's RMSprop begins with an average of 1, not 0, and has ε under the root.
    Weights begin Xavier-uniform and biases at 0, not as PyTorch's. january's transposed
    convolutions have no bias, head's first one has 3,136. L_D is halved. january's balance rule
    draws a z of its own.
 3. mixed and ours are not states of that code. They have head's nets, losses and balance rule, and
    january's phases and Adam. Rates and bn_momentum of ours: by trials on val that are not kept.
 4. faces: january's nets and rates, but images in [0, 1] and a sigmoid, not [−1, 1] and tanh.
 5. Animations: of one class, not of each; few shades; dimensions.gif has 5 × 5 images, not 5⁴,
    grid.gif images of half the size, and time that goes one way.
 6. Paper: SGD with momentum, D with 1000 units; the label is for D alone (§2.3) or P alone (§4).
"""

import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, one_hot, pad, softplus
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

HEAD = {"norm_last": False, "sums": False, "rule": "before"}
RMSPROP = {"optimizer": "rmsprop", "lr": 5e-5, "lr_D": 5e-5, "lr_Q": 5e-5, "patience": 0}
PRESETS = {
    "january": {},
    "head": HEAD | RMSPROP | {"one_pass": True},
    "mixed": HEAD,  # deviation 3
    "ours": HEAD | {"lr_D": 1e-3, "lr_Q": 1e-4, "bn_momentum": 0.01},  # D outruns Q
    "faces": {"net": "conv", "latent_dim": 50},
}
GUESSING = {"L_D": 2 * math.log(2), "L_Q": math.log(2)}  # the balance rule's start, each epoch


@dataclass
class Config(shared.Protocol):
    preset: str = option("january", "a state of the public code, or ours", tuple(PRESETS))
    epochs: int = option(30, "passes over the training images (theirs: by hand)", low=0)
    batch_size: int = option(128, "images per step", low=2)
    net: str = option("dense", "784-1000-1000-z and back, or convolutions", ("dense", "conv"))
    labels: bool = option(False, "give the one-hot class to P and D (scenarios 1 and 3)")
    latent_dim: int = option(5, "dimension of z (faces: 50)", low=1)
    norm_last: bool = option(True, "batch norm after the leaky ReLU (january), not before (head)")
    bn_momentum: float = option(0.1, "a batch's share of running statistics", low=0, high=1.01)
    sums: bool = option(True, "sum L_rec over batch and pixels (january), or its mean (head)")
    one_pass: bool = option(False, "all gradients from one pass (head), or in phases (january)")
    rule: str = option("current", "balance by this batch, or the previous", ("current", "before"))
    optimizer: str = option("adam", "of january; rmsprop: of head", ("adam", "rmsprop"))
    lr: float = option(2e-4, "learning rate for reconstruction (january; head: 5e-5)", low=1e-9)
    lr_D: float = option(2e-4, "of D (january; head: 5e-5)", low=1e-9)
    lr_Q: float = option(2e-4, "of Q against D; 0: a plain autoencoder", low=0)
    patience: int = option(3, "epochs without progress that cut the rates; 0: never", low=0)
    precision: str = option("fp32", "of matrix products in training", ("fp32", "bf16"))


def build(config, shape, K):
    """Q: x (B, X) → z (B, Z), P: (z, y) (B, Z + K) → logits of pixels, D: (z, y) → (B, 1)."""
    Z, X = config.latent_dim, math.prod(shape)
    C, size, _ = shape
    BatchNorm = nn.BatchNorm1d if config.net == "dense" else nn.BatchNorm2d
    leaky = nn.LeakyReLU(0.2)

    def block(layer):
        """Layer, batch norm, leaky ReLU; or norm last."""
        norm = BatchNorm(len(layer.bias), momentum=config.bn_momentum)
        return [layer, leaky, norm] if config.norm_last else [layer, norm, leaky]

    if config.net == "dense":
        Q = [
            *block(nn.Linear(X, 1000)),
            *block(nn.Linear(1000, 1000)),
            nn.Linear(1000, Z),
        ]
        P = [
            *block(nn.Linear(Z + K, 1000)),
            *block(nn.Linear(1000, 1000)),
            nn.Linear(1000, X),
        ]
    else:
        channels = [16, 32, 64] if size == 28 else [16, 32, 64, 128]
        n, rest = channels[-1], size >> (len(channels) - 1)  # 7×7 or 4×4: one more kernel
        Q = [nn.Unflatten(1, shape), *block(nn.Conv2d(C, 16, 3, padding=1))]
        for a, b in pairwise(channels):
            Q += block(nn.Conv2d(a, b, 4, 2, 1))
        Q += [nn.Conv2d(n, Z, rest), nn.Flatten()]
        P = [nn.Unflatten(1, (Z + K, 1, 1)), *block(nn.ConvTranspose2d(Z + K, n, rest))]
        for a, b in pairwise(reversed(channels)):
            P += block(nn.ConvTranspose2d(a, b, 4, 2, 1))
        P += [nn.Conv2d(16, C, 3, padding=1), nn.Flatten()]
    D = [
        nn.Linear(Z + K, 500),
        leaky,
        nn.Linear(500, 500),
        leaky,
        nn.Linear(500, 1),
    ]
    return nn.ModuleDict({"Q": nn.Sequential(*Q), "P": nn.Sequential(*P), "D": shared.Float32(*D)})


def sample_prior(x, config, seed=None):
    """A draw of p(z) for each row of x: (n, Z); with a seed always the same."""
    generator = None if seed is None else torch.Generator(x.device).manual_seed(seed)
    z = torch.empty(len(x), config.latent_dim, device=x.device)
    return nn.init.trunc_normal_(z, 0, 1, -2, 2, generator=generator)


def L_rec(logits, x):
    """(x − x̂)², mean over batch and pixels; x̂ = σ(logits)."""
    return (x - logits.sigmoid()).square().mean()


def L_D(D, z, z_fake):
    """−log D(z) − log(1 − D(z_fake)), mean over the batch; D gives logits."""
    return (softplus(-D(z)) + softplus(D(z_fake))).mean()


def L_Q(D, z_fake):
    """−log D(z_fake), mean over the batch."""
    return softplus(-D(z_fake)).mean()


def balance(losses):
    """Whether D and Q train, by a batch's losses (--rule); in the public code l_D is L_D / 2."""
    l_D, l_Q = float(losses["L_D"]) / 2, float(losses["L_Q"])
    trains_D = l_Q < 0.95 or l_D > 0.45
    trains_Q = l_D < 0.95 or l_Q > 0.45
    return trains_D, trains_Q


def train_step(nets, opts, x, y, config, before):
    """The three phases on x (B, X) of classes y (B, K); before: the previous batch's losses."""
    Q, P, D = nets["Q"], nets["P"], nets["D"]

    # Reconstruction
    with shared.products(config, x.device):
        z_fake = torch.cat([Q(x), y], 1)  # (B, Z + K)
        logits = shared.fp32(P(z_fake))
    loss_rec = L_rec(logits, x)
    nets.zero_grad()
    loss = x.numel() * loss_rec if config.sums else loss_rec
    loss.backward(retain_graph=config.one_pass)
    if config.one_pass:  # before any net moves
        loss_Q = L_Q(D, z_fake)
        gradients = torch.autograd.grad(loss_Q, list(Q.parameters()))
    opts["P"].step()
    opts["Q_rec"].step()
    if not config.lr_Q:
        return {"L_rec": loss_rec.detach()}

    # Discriminator
    z = torch.cat([sample_prior(y, config), y], 1)
    if not config.one_pass:
        with shared.products(config, x.device):
            z_fake = torch.cat([Q(x), y], 1)
    loss_D = L_D(D, z, z_fake.detach())
    judged = before
    if config.rule == "current":
        judged = {"L_D": loss_D.item(), "L_Q": L_Q(D, z_fake.detach()).item()}
    trains_D, trains_Q = balance(judged)
    if trains_D:
        opts["D"].zero_grad()
        loss_D.backward()
        opts["D"].step()

    # Generator
    if not config.one_pass:
        loss_Q = L_Q(D, z_fake)
        gradients = torch.autograd.grad(loss_Q, list(Q.parameters()))
    if trains_Q:
        for parameter, gradient in zip(Q.parameters(), gradients, strict=True):
            parameter.grad = gradient
        opts["Q_reg"].step()
    losses = {"L_rec": loss_rec.detach(), "L_D": loss_D.detach(), "L_Q": loss_Q.detach()}
    return losses | {"trains_D": trains_D, "trains_Q": trains_Q}


def optimizers(nets, config):
    """One for each role (Q has two), and for each the rule of deviation 1; --patience 0: none."""
    Optimizer, kwargs = torch.optim.Adam, {"betas": (0.5, 0.999), "fused": True}
    if config.optimizer == "rmsprop":
        Optimizer, kwargs = torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-5}
    rates = {"Q_rec": config.lr, "P": config.lr, "D": config.lr_D, "Q_reg": config.lr_Q}
    opts = {role: Optimizer(nets[role[0]].parameters(), lr, **kwargs) for role, lr in rates.items()}
    patience = config.patience - 1 if config.patience else math.inf  # PyTorch cuts one epoch later
    plateau = {"factor": 0.2, "patience": patience, "threshold": 0.01}
    return opts, {f"plateau_{role}": ReduceLROnPlateau(opts[role], **plateau) for role in opts}


def given_labels(data, config):
    """One-hot classes (N, K), (M, K) of training and test images for P and D; without, K = 0."""
    if not config.labels:
        return data.x_train[:, :0], data.x_test[:, :0]
    if data.y_train is None:
        shared.fail(f"--labels: {config.dataset} has none")
    K = int(data.y_train.max()) + 1
    return one_hot(data.y_train, K).float(), one_hot(data.y_test, K).float()


def turns(n, y):
    """One-hot classes (n, K) that take turns, of as many columns as y has."""
    return torch.eye(max(y.shape[1], 1), device=y.device).repeat(n, 1)[:n, : y.shape[1]]


def evaluate(nets, data, config, full=False):
    """Short features: Q(x) (N, Z); long: the activations before Q's last layer."""
    nets.eval()
    Q, P = nets["Q"], nets["P"]
    last = 1 if config.net == "dense" else 2  # of Q's layers: the convolution to z, and a Flatten
    long = [shared.chunked(Q[:-last], x) for x in (data.x_train, data.x_test)]
    z_train, z_test = [shared.chunked(Q[-last:], hidden) for hidden in long]
    y = turns(len(data.x_test), given_labels(data, config)[1])
    x_fake = shared.chunked(P, torch.cat([sample_prior(y, config, 0), y], 1)).sigmoid()
    x_rec = None if config.labels else shared.chunked(P, z_test).sigmoid()  # P is told labels
    metrics = shared.image_metrics(data, x_rec, x_fake)
    metrics |= shared.code_metrics(data, z_train, z_test, "short", full)
    if full:
        metrics |= shared.code_metrics(data, *(hidden.flatten(1) for hidden in long), "long")
    draws = [sample_prior(z_test, config, seed) for seed in range(1, 9)]
    metrics |= shared.prior.gaps(z_train, z_test, draws)
    nets.train()
    return metrics


def decode(run, data, z, y):
    """P's images (n, C, H, W) of z (n, ·), filled up with 0 or cut to Z, and of y (n or 1, K)."""
    z = pad(z, (0, run.config.latent_dim - z.shape[1])).to(y)
    codes = torch.cat([z, y.expand(len(z), -1)], 1)
    return data.images(shared.chunked(run.nets["P"], codes, 1000).sigmoid())


def draw(run, data, config):
    """Samples, reconstructions, and each style in all classes."""
    run.nets.eval()
    x, y = data.x_test[:50], given_labels(data, config)[1][:50]
    z, K = shared.chunked(run.nets["Q"], x), y.shape[1]
    title = f"AAE, {config.net}, {'labels, ' if K else ''}epoch {run.epoch}"
    classes = turns(100, y)
    samples = decode(run, data, sample_prior(classes, config, 0), classes)
    run.picture("samples", shared.grid(samples, 10, f"{title}: samples"))
    x, x_rec = data.images(x), decode(run, data, z, y)
    run.picture("reconstructions", shared.pairs(x, x_rec, f"{title}: test images x and P(Q(x))"))
    if K:
        styled = decode(run, data, z[:10].repeat_interleave(K, 0), turns(10 * K, y))
        rows = torch.cat([x[:10, None], styled.unflatten(0, (10, K))], 1)
        run.picture("style", shared.grid(rows.flatten(0, 1), 1 + K, f"{title}: x, z in each class"))
    run.nets.train()


def movie(run, name, images, frames):
    """The images (frames · n · n, C, H, W), n × n at a time, as <name>.gif of a few shades."""
    sheets = []
    for part in images.cpu().chunk(frames):
        shades = (15 * part).round()  # 16 of them keep the file small
        sheet = make_grid(shades, math.isqrt(len(part)), padding=0)  # (3, n H, n W)
        sheets.append(to_pil_image(sheet.mul(17).byte()).quantize(64))
    first, *others = sheets
    kwargs = {"save_all": True, "append_images": others, "duration": 100, "loop": 0}
    shared.write_file(run.dir / f"{name}.gif", lambda path: first.save(path, "GIF", **kwargs))


def animate(run, data, config):
    """grid.gif, dimensions.gif: five dimensions of z, one as time; style.gif: classes as time."""
    run.nets.eval()
    y = given_labels(data, config)[1]
    time = torch.linspace(-3, 3, 10)
    axis = torch.linspace(-1.8, 1.8, 5)
    zero = torch.zeros(1)
    z = torch.cartesian_prod(time, axis, axis, axis, axis)
    z = z[:, [0, 1, 3, 2, 4]]  # z₂ and z₃ place a block of 25 images, z₄ and z₅ an image in it
    movie(run, "grid", avg_pool2d(decode(run, data, z, y[:1]), 2), 10)
    z = torch.cat([torch.cartesian_prod(time, axis, axis, zero, zero).roll(i, 1) for i in range(5)])
    movie(run, "dimensions", decode(run, data, z, y[:1]), 50)
    if config.labels:
        t = torch.arange(10 * y.shape[1] - 9) / 10  # at 0, 1, 2, … a class is reached
        i, classes = t.long().clamp(max=y.shape[1] - 2), torch.eye(y.shape[1])
        way = torch.lerp(classes[i], classes[i + 1], (math.pi / 2 * (t - i)).sin()[:, None])
        z = 3 * torch.rand(25, config.latent_dim, generator=torch.Generator().manual_seed(0)) - 1.5
        images = decode(run, data, z.repeat(len(t), 1), way.repeat_interleave(25, 0).to(y))
        movie(run, "style", images, len(t))
    run.nets.train()


def main(config):
    device = shared.setup(config)
    data = shared.load_data(config, device, size=32)
    y_train, _ = given_labels(data, config)
    nets = build(config, data.shape, y_train.shape[1]).to(device)
    opts, plateaus = optimizers(nets, config)
    parts = {"nets": nets} | opts | plateaus

    run = shared.Run(config, device, nets, len(data.x_train) // config.batch_size)
    for epoch in run.epochs(parts):
        losses = GUESSING  # its own
        for i in shared.batches(data.x_train, config.batch_size, config.seed, epoch):
            losses = train_step(nets, opts, data.x_train[i], y_train[i], config, losses)  # its own
            run.step(losses, len(i))
        run.log_losses()
        run.log({"train/lr": opts["P"].param_groups[0]["lr"]})  # its own
        for plateau in plateaus.values():  # its own
            plateau.step(run.rows[-1]["train/L_rec"])  # its own
        if run.is_due():
            run.log(evaluate(run.nets, data, config))
            draw(run, data, config)
        run.save(parts)
    metrics = evaluate(run.nets, data, config, full=True)
    draw(run, data, config)
    animate(run, data, config)  # its own
    run.finish(metrics)


if __name__ == "__main__":
    main(shared.parse_config(Config, PRESETS))
