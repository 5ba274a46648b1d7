"""VAE-GAN, "Autoencoding beyond pixels using a learned similarity metric", arXiv 1512.09300.

A VAE whose reconstructions x̃ = Dec(z), z ~ q(z | x) = N(μ, diag s²), (μ, log s²) = Enc(x), are
compared with x not pixel by pixel but in the features Dis_l of a discriminator Dis, which in turn
tells x from x̃ and from samples x_p = Dec(z_p):

    L_prior = KL(q(z | x) ‖ N(0, I))                                                       (eq. 4)
    L_llike = ‖Dis_l(x) − Dis_l(x̃)‖², Gaussian with identity covariance              (eqs. 7, 8)
    L_GAN   = −log Dis(x) − log(1 − Dis(x̃)) − log(1 − Dis(x_p)),  z_p ~ N(0, I)          (eq. 10)
    Algorithm 1: Enc minimises L_prior + γ_E L_llike, Dec γ L_llike − L_GAN, Dis L_GAN, at once.

    python baselines/vae_gan.py                  # small nets on a CPU, the published on a GPU
    python baselines/vae_gan.py --pad --epochs 30 --precision bf16 --seed 1    # in the pictures
    python baselines/vae_gan.py --method vae     # a VAE with the same Enc and Dec, to compare
    python baselines/vae_gan.py --width 1 --image-size 64 --epochs 25    # all of rishabhd786's

Expect (CPU, 30 epochs, bf16): LeNet-FID 33 (seed 1), with --pad 16.1 ± 0.3 (seeds 0 and 1).

Deviations from the paper (P) and the public code, R: github.com/rishabhd786/VAE-GAN-PYTORCH:
 1. P: eq. 5 has L_GAN as a log-likelihood, algorithm 1 descends it for Dis; here its negative.
    P sums L_prior and ½ L_llike over features and codes, and γ_E = 1; R and here: means, γ_E = 5.
 2. R steps Dis, runs it anew to step Dec, and all three nets anew to step Enc: ten passes of Dis.
    Here, as in algorithm 1, one pass serves all three, and no weight moves before its last use.
 3. R: Dis ends in a sigmoid; here softplus(−l) = −log σ(l) of its logit l.
 4. R enlarges images bilinearly, here bicubically.
 5. R draws in training mode, where an image depends on its batch; here with batch norm's mean
    statistics over 64 batches of the same kind: of training images, of their μ, or of z_p.
 6. --method vae: p(x | z) = N(Dec(z), I) of pixels in [−1, 1]: ½‖x − x̃‖² + KL per image.
 7. --pad (ours, off by default): smaller images get a border instead of being enlarged.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from torch import nn
from torch.autograd import grad
from torch.nn.functional import interpolate, softplus
from torch.optim import RMSprop
from torchvision.transforms.functional import center_crop


@dataclass
class Config(shared.Protocol):
    epochs: int = option(4, "passes over the training images (R: 25 on MNIST)", low=0)
    max_steps: int = option(0, "iterations of an epoch at most; 0: all", low=0)
    eval_every: int = option(1, "epochs between cheap evaluations, and pictures", low=1)
    batch_size: int = option(64, "images per iteration (paper §4, R)", low=2)
    method: str = option("vae_gan", "VAE-GAN, or a VAE (no Dis, no γ)", ("vae_gan", "vae"))
    width: float = option(0.0, "factor of all channels; 0: 1 on a GPU, else 0.25", low=0)
    image_size: int = option(0, "pixels of a side; 0: 64 on a GPU, else 32", (0, 32, 64))
    pad: bool = option(False, "give smaller images a border, do not enlarge them (ours)")
    latent_dim: int = option(128, "dimension of z (R)", low=1)
    lr: float = option(3e-4, "RMSprop's learning rate (paper §4, R)", low=1e-9)
    lr_Dis: float = option(3e-5, "that of Dis (R: the others' times its alpha, 0.1)", low=1e-9)
    alpha: float = option(0.99, "RMSprop's α (PyTorch's, R; not R's alpha)", low=0, high=1)
    gamma: float = option(15.0, "weight γ of L_llike in Dec's loss (R)", low=0)
    gamma_enc: float = option(5.0, "weight of L_llike in Enc's loss (R; paper: 1)", low=0)
    precision: str = option("fp32", "of matrix products in training", ("fp32", "bf16"))


# B batch, Z = latent_dim, the nets' images (B, C, S, S) in [−1, 1], data (B, X) in [0, 1]


class Heads(nn.ModuleDict):
    """The two last layers of Enc: h → μ, log s²."""

    def forward(self, h):
        return shared.fp32(self.mu(h)), shared.fp32(self.log_var(h))


def build(config, C):
    """Enc, Dec and, but for a VAE, Dis = (layers up to Dis_l, the rest up to the logit)."""
    Z, s = config.latent_dim, config.image_size // 8
    sizes = [max(1, round(config.width * n)) for n in (32, 64, 128, 256, 512, 2048)]
    n32, n64, n128, n256, n512, n2048 = sizes
    leaky = nn.LeakyReLU(0.2, inplace=True)

    def dense(a, b):
        return [nn.Linear(a, b), nn.BatchNorm1d(b), leaky]

    def down(a, b):  # half the side
        return [nn.Conv2d(a, b, 5, 2, 2), nn.BatchNorm2d(b), leaky]

    def up(a, b):  # twice the side
        return [nn.ConvTranspose2d(a, b, 6, 2, 2), nn.BatchNorm2d(b), leaky]

    Enc = nn.Sequential(
        *down(C, n64),
        *down(n64, n128),
        *down(n128, n256),
        nn.Flatten(),
        *dense(n256 * s * s, n2048),
        Heads({"mu": nn.Linear(n2048, Z), "log_var": nn.Linear(n2048, Z)}),
    )
    Dec = nn.Sequential(
        *dense(Z, n256 * s * s),
        nn.Unflatten(1, (n256, s, s)),
        *up(n256, n256),
        *up(n256, n128),
        *up(n128, n32),
        nn.ConvTranspose2d(n32, C, 5, 1, 2),
        nn.Tanh(),
    )
    nets = nn.ModuleDict({"Enc": Enc, "Dec": Dec}).apply(start_normal)
    if config.method == "vae":
        return nets
    features = nn.Sequential(
        nn.Conv2d(C, n32, 5, 1, 2),
        leaky,
        *down(n32, n128),
        *down(n128, n256),
        *down(n256, n256),
    )
    rest = nn.Sequential(nn.Flatten(), *dense(n256 * s * s, n512), nn.Linear(n512, 1))
    nets["Dis"] = nn.Sequential(features, rest)
    return nets


def start_normal(layer):
    """Weights of convolutions from N(0, 0.02²), those of batch norm from N(1, 0.02²)."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0, 0.02)
    elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(layer.weight, 1, 0.02)


def kl(mu, log_var):
    """KL(N(μ, s²) ‖ N(0, 1)) = ½ (μ² + s² − 1 − log s²), of each number (B, Z)."""
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var)


def L_llike(f, f_rec):
    """Mean over batch and features of (f − f_rec)²."""
    return (shared.fp32(f) - shared.fp32(f_rec)).square().mean()


def L_GAN(logits):
    """−log Dis(x) − log(1 − Dis(x̃)) − log(1 − Dis(x_p)), means over the batch."""
    real, rec, fake = logits  # (B, 1) each
    return (softplus(-real) + softplus(rec) + softplus(fake)).mean()


def descend(optimizer, gradients):
    """A step of the optimizer with these gradients."""
    for p, g in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        p.grad = g
    optimizer.step()
    optimizer.zero_grad()  # frees them


def train_step(nets, opts, x, config):
    """An iteration of algorithm 1 on x (B, C, S, S)."""
    Enc, Dec, Dis = nets["Enc"], nets["Dec"], nets["Dis"]
    with shared.products(config, x.device):
        mu, log_var = Enc(x)  # (B, Z) each
        z = mu + (log_var / 2).exp() * torch.randn_like(mu)
        z_p = torch.randn_like(mu)
        fakes = [Dec(z), Dec(z_p)]  # x̃, x_p
        leaves = [image.detach().requires_grad_() for image in fakes]  # where Dis's graph begins
        features = [Dis[0](part) for part in (x, *leaves)]  # one after the other, as R does
        logits = [shared.fp32(Dis[1](part)) for part in features]
    prior = kl(mu, log_var).mean()
    llike = L_llike(features[0], features[1])  # of x and x̃
    gan = L_GAN(logits)

    # Gradients of L_llike at x̃, and of L_GAN at x̃ and x_p. Dis learns from L_GAN alone.
    (g_llike,) = grad(llike, leaves[:1], retain_graph=True)
    *g_Dis, g_rec, g_p = grad(gan, [*Dis.parameters(), *leaves])
    descend(opts["Dis"], g_Dis)
    # Gradient of γ_E L_llike at z, through Dec: it is for Enc alone, not for Dec's weights.
    (g_z,) = grad(fakes[0], [z], config.gamma_enc * g_llike, retain_graph=True)
    # Dec: γ L_llike − L_GAN
    descend(opts["Dec"], grad(fakes, [*Dec.parameters()], [config.gamma * g_llike - g_rec, -g_p]))
    # Enc: L_prior + γ_E L_llike; the largest net comes last, when the other graphs are freed.
    descend(opts["Enc"], grad([prior, z], [*Enc.parameters()], [None, g_z]))
    return {"L_prior": prior.detach(), "L_llike": llike.detach(), "L_GAN": gan.detach()}


def vae_step(nets, opts, x, config):
    """One update of a VAE's Enc and Dec on x (B, C, S, S)."""
    with shared.products(config, x.device):
        mu, log_var = nets["Enc"](x)
        x_rec = shared.fp32(nets["Dec"](mu + (log_var / 2).exp() * torch.randn_like(mu)))
    prior = kl(mu, log_var).sum() / len(x)
    llike = 0.5 * (x - x_rec).square().sum() / len(x)
    nets.zero_grad()
    (prior + llike).backward()
    opts["Enc"].step()
    opts["Dec"].step()
    return {"L_prior": prior.detach(), "L_llike": llike.detach()}


def to_x(pixels, data, config):
    """Vectors (B, X) in [0, 1] → the nets' images (B, C, S, S) in [−1, 1]."""
    images, S = data.images(pixels), config.image_size
    images = center_crop(images, S) if config.pad else interpolate(images, S, mode="bicubic")
    return 2 * images.clamp(0, 1) - 1


def encode(Enc, x, data, config):
    """Activations before Enc's last layers (N, H), and μ (N, Z), 250 images at a time."""
    hidden = shared.chunked(lambda part: Enc[:-1](to_x(part, data, config)), x, 250)
    return hidden, shared.chunked(Enc[-1].mu, hidden, 250)


def decode(Dec, z, data, config):
    """Dec(z) (N, C, S, S) of codes z (N, Z), reduced or cut, as vectors (N, X) in [0, 1]."""

    def to_pixels(part):
        x = Dec(part)
        if config.pad:
            x = center_crop(x, data.shape[1:])
        x = interpolate(x, data.shape[1:], mode="bicubic", antialias=True)
        return (x.flatten(1).clamp(-1, 1) + 1) / 2

    return shared.chunked(to_pixels, z, 250)


def fixed_z(n, config, device):
    """Always the same z (n, Z)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, config.latent_dim, generator=generator).to(device)


def settled(nets, data, config):
    """Copies of Enc, and of Dec for μ and for z_p, as they are evaluated (deviation 5)."""
    B = config.batch_size
    x = data.x_train[: 64 * B]
    Enc = shared.batch_norm.settled(nets["Enc"], to_x(x, data, config), B)
    Dec = shared.batch_norm.settled(nets["Dec"], encode(Enc, x, data, config)[1], B)
    Dec_p = shared.batch_norm.settled(nets["Dec"], fixed_z(len(x), config, x.device), B)
    return Enc, Dec, Dec_p


def evaluate(nets, data, config, full=False):
    """The short features are μ; fid_floor is what enlarging and reducing do to test images."""
    Enc, Dec, Dec_p = settled(nets, data, config)
    hidden_train, mu_train = encode(Enc, data.x_train, data, config)
    hidden_test, mu_test = encode(Enc, data.x_test, data, config)
    z = fixed_z(len(data.x_test), config, mu_test.device)
    x_rec, x_fake = decode(Dec, mu_test, data, config), decode(Dec_p, z, data, config)
    metrics = shared.image_metrics(data, x_rec, x_fake)
    metrics |= shared.code_metrics(data, mu_train, mu_test, "short", full)
    if full:
        metrics |= shared.code_metrics(data, hidden_train, hidden_test, "long")
        resized = decode(nn.Identity(), to_x(data.x_test, data, config), data, config)
        floor = shared.image_metrics(data, x_fake=resized)
        metrics |= {f"{name}_floor": value for name, value in floor.items()}
    return metrics


def arithmetic(Enc, Dec, data, config):
    """Images (·, X), names of rows: x of class a, Dec(μ), Dec(μ + mean code of b − that of a)."""
    codes = encode(Enc, data.x_train, data, config)[1]
    rows, names = [], []
    for a, b in ((3, 8), (4, 9), (7, 1), (0, 6)):
        x = data.x_test[data.y_test == a][:10]
        mu = encode(Enc, x, data, config)[1]
        way = codes[data.y_train == b].mean(0) - codes[data.y_train == a].mean(0)
        rows += [x, decode(Dec, mu, data, config), decode(Dec, mu + way, data, config)]
        names += ["x", "Dec(μ)", f"{a} → {b}"]
    return torch.cat(rows), names


def means_of_20(losses, before):
    """Losses [{name: tensor ()}] of an epoch → rows for shared.curves, after so many iterations."""
    rows = []
    for end in range(20, len(losses) + 1, 20):
        row = {"iteration": before + end}
        for name in losses[0]:
            row[name] = torch.stack([step[name] for step in losses[end - 20 : end]]).mean().item()
        rows.append(row)
    return rows


def draw(run, data, config):
    """Samples and reconstructions; at the end latent arithmetic, and losses by iteration."""
    Enc, Dec, Dec_p = settled(run.nets, data, config)
    title = f"{'VAE' if config.method == 'vae' else 'VAE-GAN'}, epoch {run.epoch}"
    z, x = fixed_z(100, config, data.x_test.device), data.x_test[:50]
    samples = data.images(decode(Dec_p, z, data, config))
    run.picture("samples", shared.grid(samples, 10, f"{title}: samples"))
    x_rec = data.images(decode(Dec, encode(Enc, x, data, config)[1], data, config))
    run.picture("reconstructions", shared.pairs(data.images(x), x_rec, f"{title}: x and Dec(μ)"))
    if data.y_train is not None and run.epoch == config.epochs:
        rows, names = arithmetic(Enc, Dec, data, config)
        what = f"{title}: μ moved by the difference of two classes' mean codes"
        run.picture("arithmetic", shared.grid(data.images(rows), 10, what, names))
    if len(run.history.get("losses", [])) > 1 and run.epoch == config.epochs:
        what = f"{title}: means of 20 iterations"
        run.picture("losses", shared.curves(run.history["losses"], "iteration", what))


def main(config):
    device = shared.setup(config)
    config.width = config.width or (0.25 if device.type == "cpu" else 1.0)
    config.image_size = config.image_size or (32 if device.type == "cpu" else 64)
    if config.smoke and not config.eval:
        config.width, config.image_size = min(config.width, 1 / 16), 32
    data = shared.load_data(config, device, size=config.image_size)
    nets = build(config, data.shape[0]).to(device)
    if device.type == "cpu":  # where this layout is faster for narrow nets
        nets.to(memory_format=torch.channels_last)
    rates = {"Enc": config.lr, "Dec": config.lr, "Dis": config.lr_Dis}
    opts = {key: RMSprop(net.parameters(), rates[key], config.alpha) for key, net in nets.items()}
    parts = {"nets": nets} | {f"opt_{name}": opt for name, opt in opts.items()}
    step = vae_step if config.method == "vae" else train_step
    steps = len(data.x_train) // config.batch_size
    steps = min(steps, config.max_steps or steps)

    run = shared.Run(config, device, nets, steps)  # its own
    run.history.setdefault("losses", [])  # its own
    for epoch in run.epochs(parts):
        epoch_losses = []  # its own
        for i in shared.batches(data.x_train, config.batch_size, config.seed, epoch):
            if run.step_in_epoch == steps:  # its own
                break  # its own
            x = to_x(data.x_train[i], data, config)  # its own
            losses = step(nets, opts, x, config)  # its own
            epoch_losses.append(losses)  # its own
            run.step(losses, len(i))
        run.history["losses"] += means_of_20(epoch_losses, (epoch - 1) * steps)  # its own
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
