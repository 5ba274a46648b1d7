"""VAE-GAN with an equilibrium rule, github.com/lucabergamini/VAEGAN-PYTORCH; paper: 1512.09300.

The losses are those of vae_gan.py with three changes. They are sums over features, codes and batch;
the reconstruction x̃ = Dec(z), z ~ N(μ, diag s²), is left out of L_GAN; and Dec or Dis skips its
update (rests) while it is far ahead of the other:

    L_prior = ½ Σ (μ² + s² − 1 − log s²)                                                   (eq. 4)
    L_llike = ½ ‖Dis_l(x) − Dis_l(x̃)‖²                                               (eqs. 7, 8)
    L_GAN   = −log Dis(x) − log(1 − Dis(x_p)),  x_p = Dec(z_p), z_p ~ N(0, I)              (eq. 5)
    Enc minimises L_prior + γ_E L_llike, Dec λ L_llike − (1 − λ) L_GAN, Dis L_GAN, all at once.
    Dis rests if a mean term of L_GAN is below 0.68 − 0.35, Dec if one is above 0.68 + 0.35, but
    never both.

    python baselines/vae_gan_equilibrium.py --precision bf16                    # deviation 3
    python baselines/vae_gan_equilibrium.py --precision bf16 --preset clean     # MNIST, small nets
    python baselines/vae_gan_equilibrium.py --dataset folder:PATH --epochs 13   # faces, on a GPU

Expect (MNIST, a quarter of the width, bf16): default, identity 9 ± 2 %, as by chance; clean, in
8 epochs, 97.5 ± 0.4 %, LeNet-FID 55 ± 3 (two seeds).

Deviations from the public code as of its last commits of main.py and network.py:
 1. It adds 0.001 inside the logarithms of L_GAN; here softplus(−l) = −log σ(l) of Dis's logit l.
 2. It smooths faces, cut to 148×148 as here, and resizes them by cubic interpolation; here by
    Lanczos. Of pictures of another size the largest central square is taken.
 3. The last main.py has the learning rate 3e-4 (--preset rate). The default here is 1e-4, the
    README's, which belongs to an early main.py (29102a9) with mean losses and another decay and
    rule. Everything else is as in the last main.py.
 4. --joint is the single pass of main_1.py alone. That file also has x̃ in L_GAN, compares x_p with
    x, and trains Dec on swapped labels of x̃ and x_p.
 5. With --gan-reconstruction x̃ joins the second pass; the rule still looks at x and x_p.
 6. Reconstructions in pictures and metrics are Dec(μ); there Dec(z) of a z ~ N(μ, diag s²).
 7. What is drawn and measured has batch norm's mean statistics over 64 batches of its own kind: of
    training images, of their μ, of z_p; there running ones with momentum 0.9.
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

CELEBA = {(178, 218): (15, 40, 163, 188)}  # its pictures' size, and what is cut from them
LEARNS = {"lr": 3e-4, "lr_decay": 1.0, "gamma_enc": 10.0, "lambda_mse": 1e-2}
PRESETS = {
    "published": {},
    "learns": LEARNS,  # ours, as clean
    "clean": LEARNS | {"epochs": 8, "lr_decay": 0.75, "gan_reconstruction": True},
    # a study: published with one thing changed (rate-no-decay: two), or learns (learns-rate)
    "rate": {"lr": 3e-4},  # main.py's (deviation 3)
    "no-decay": {"lr_decay": 1.0},  # an epoch of CelebA is as long as three of MNIST
    "rate-no-decay": {"lr": 3e-4, "lr_decay": 1.0},
    "gamma": {"gamma_enc": 10.0},  # few features weigh little against L_prior
    "lambda": {"lambda_mse": 1e-2},  # at 1e-6 Dec sees L_GAN alone
    "no-rule": {"margin": 0.0},  # with the rule Dis rests in most steps
    "init": {"init": "pytorch"},
    "joint": {"joint": True},
    "learns-rate": LEARNS | {"lr": 1e-4},
}


@dataclass
class Config(shared.Protocol):
    preset: str = option(
        "published", "the public code's settings (deviation 3), or others", tuple(PRESETS)
    )
    epochs: int = option(4, "passes over the training images (its README: 13 of CelebA)", low=0)
    eval_every: int = option(1, "epochs between cheap evaluations, and pictures", low=1)
    batch_size: int = option(64, "images per iteration", low=2)
    width: float = option(0.0, "factor of all channels; 0: 1 on a GPU, else 0.25", low=0)
    image_size: int = option(0, "pixels of a side; 0: 64 on a GPU, else 32", (0, 32, 64))
    latent_dim: int = option(128, "dimension of z", low=1)
    init: str = option("uniform", "initial weights: its own, or PyTorch's", ("uniform", "pytorch"))
    lr: float = option(1e-4, "learning rate of RMSprop (its README; main.py: 3e-4)", low=1e-9)
    lr_decay: float = option(0.75, "factor of the rate from epoch to epoch", low=0)
    alpha: float = option(0.9, "RMSprop's α (its README's alpha is our λ)", low=0, high=1)
    gamma_enc: float = option(1.0, "γ_E: weight of L_llike in Enc's loss", low=0)
    lambda_mse: float = option(1e-6, "λ: weight of L_llike in Dec's loss", low=0)
    margin: float = option(0.35, "of the equilibrium rule; 0: both always train", low=0)
    joint: bool = option(False, "one pass of Dis over x, x̃, x_p, as in its main_1.py")
    gan_reconstruction: bool = option(False, "x̃ is in L_GAN (the paper's; its README: worse)")
    swapped_labels: bool = option(False, "Dec minimises L_GAN of swapped labels, not −L_GAN")
    precision: str = option("fp32", "of matrix products in training", ("fp32", "bf16"))


# B batch, Z = latent_dim, the nets' images (B, C, S, S) in [−1, 1], data (B, X) in [0, 1]


class Heads(nn.ModuleDict):
    """The two last layers of Enc: h → μ, log s²."""

    def forward(self, h):
        return shared.fp32(self.mu(h)), shared.fp32(self.log_var(h))


def build(config, C):
    """Enc, Dec and Dis = (layers up to Dis_l, the rest up to the logit)."""
    Z, s = config.latent_dim, config.image_size // 8
    sizes = [max(1, round(config.width * n)) for n in (32, 64, 128, 256, 512, 1024)]
    n32, n64, n128, n256, n512, n1024 = sizes
    relu = nn.ReLU(inplace=True)

    def dense(a, b):
        return [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), relu]

    def down(a, b):  # half the side
        return [nn.Conv2d(a, b, 5, 2, 2, bias=False), nn.BatchNorm2d(b), relu]

    def up(a, b):  # twice the side
        return [nn.ConvTranspose2d(a, b, 5, 2, 2, 1, bias=False), nn.BatchNorm2d(b), relu]

    Enc = nn.Sequential(
        *down(C, n64),
        *down(n64, n128),
        *down(n128, n256),
        nn.Flatten(),
        *dense(n256 * s * s, n1024),
        Heads({"mu": nn.Linear(n1024, Z), "log_var": nn.Linear(n1024, Z)}),
    )
    Dec = nn.Sequential(
        *dense(Z, n256 * s * s),
        nn.Unflatten(1, (n256, s, s)),
        *up(n256, n256),
        *up(n256, n128),
        *up(n128, n32),
        nn.Conv2d(n32, C, 5, 1, 2),
        nn.Tanh(),
    )
    fourth, norm, _ = down(n256, n256)  # Dis_l is before batch norm
    features = nn.Sequential(
        nn.Conv2d(C, n32, 5, 1, 2),
        relu,
        *down(n32, n128),
        *down(n128, n256),
        fourth,
    )
    rest = nn.Sequential(norm, relu, nn.Flatten(), *dense(n256 * s * s, n512), nn.Linear(n512, 1))
    nets = nn.ModuleDict({"Enc": Enc, "Dec": Dec, "Dis": nn.Sequential(features, rest)})
    if config.init == "uniform":
        nets.apply(start_uniform)
    return nets


def start_uniform(layer):
    """Weights U(−a, a), a = 1 / √(3 n), of n = a weight's size without its first axis; biases 0."""
    if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        a = (3 * layer.weight[0].numel()) ** -0.5
        nn.init.uniform_(layer.weight, -a, a)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def L_prior(mu, log_var):
    """KL(N(μ, diag s²) ‖ N(0, I)) = ½ Σ (μ² + s² − 1 − log s²)."""
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum()


def L_llike(f, f_rec):
    """−log N(f; f_rec, I) = ½ Σ (f − f_rec)², up to a constant."""
    return 0.5 * (shared.fp32(f) - shared.fp32(f_rec)).square().sum()


def cross_entropies(logits):
    """Σ −log Dis(x), Σ −log(1 − Dis(x_p)) and, with its logits, Σ −log(1 − Dis(x̃))."""
    real, *fakes = logits  # (B, 1) each
    return torch.stack([softplus(-real), *map(softplus, fakes)]).sum((1, 2))


def discriminate(Dis, x, x_rec, x_p, config):
    """Dis_l(x), Dis_l(x̃), and logits of x, x_p and, if it is in L_GAN, x̃.

    Two passes, each with its batch statistics: [x̃, x] up to Dis_l, [x, x_p] up to the logit.
    """
    if config.joint:
        features = Dis[0](torch.cat([x, x_p, x_rec]))  # (3 B, n256, s, s)
        f, _, f_rec = features.chunk(3)
        logits = shared.fp32(Dis[1](features)).chunk(3)
        return f, f_rec, logits if config.gan_reconstruction else logits[:2]
    f_rec, f = Dis[0](torch.cat([x_rec, x])).chunk(2)
    judged = [x, x_p, x_rec] if config.gan_reconstruction else [x, x_p]
    return f, f_rec, shared.fp32(Dis(torch.cat(judged))).chunk(len(judged))


def who_trains(terms, config):
    """Whether Dis and Dec train, by the mean cross-entropies of x and of x_p."""
    if not config.margin:
        return True, True
    terms = terms[:2].tolist()
    dis = min(terms) >= 0.68 - config.margin
    dec = max(terms) <= 0.68 + config.margin
    return (dis, dec) if dis or dec else (True, True)


def descend(optimizer, gradients):
    """A step of the optimizer with these gradients."""
    for p, g in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        p.grad = g
    optimizer.step()
    optimizer.zero_grad()  # frees them


def train_step(nets, opts, x, config):
    """An iteration on x (B, C, S, S)."""
    Enc, Dec, Dis = nets["Enc"], nets["Dec"], nets["Dis"]
    with shared.products(config, x.device):
        mu, log_var = Enc(x)  # (B, Z) each
        z = mu + (log_var / 2).exp() * torch.randn_like(mu)
        fakes = [Dec(z), Dec(torch.randn_like(mu))]  # x̃, x_p
        leaves = [image.detach().requires_grad_() for image in fakes]  # where Dis's graph begins
        f, f_rec, logits = discriminate(Dis, x, *leaves, config)
    prior, llike = L_prior(mu, log_var), L_llike(f, f_rec)
    terms = cross_entropies(logits)
    gan = terms.sum()
    trains_Dis, trains_Dec = who_trains(terms / len(x), config)

    # Gradients of L_llike and of Dec's GAN loss at x̃ and x_p. Dis learns from L_GAN alone.
    g_llike = grad(llike, leaves, retain_graph=True, materialize_grads=True)
    if config.swapped_labels:  # −log(1 − Dis(x)) − log Dis(x_p): the logits change their signs
        swapped = cross_entropies([-part for part in logits]).sum()
        g_swapped = grad(swapped, leaves, retain_graph=True, materialize_grads=True)
    learning = [*Dis.parameters()] if trains_Dis else []
    *g_Dis, g_rec, g_p = grad(gan, [*learning, *leaves], materialize_grads=True)
    g_gan = g_swapped if config.swapped_labels else (-g_rec, -g_p)
    if trains_Dis:
        descend(opts["Dis"], g_Dis)
    # Gradient of γ_E L_llike at z, through Dec: it is for Enc alone, not for Dec's weights.
    (g_z,) = grad(fakes[0], [z], config.gamma_enc * g_llike[0], retain_graph=True)
    if trains_Dec:  # λ L_llike − (1 − λ) L_GAN
        share = config.lambda_mse
        g_Dec = [share * g + (1 - share) * h for g, h in zip(g_llike, g_gan, strict=True)]
        descend(opts["Dec"], grad(fakes, [*Dec.parameters()], g_Dec))
    # Enc: L_prior + γ_E L_llike; the largest net comes last, when the other graphs are freed.
    descend(opts["Enc"], grad([prior, z], [*Enc.parameters()], [None, g_z]))
    sums = {"L_prior": prior, "L_llike": llike, "L_GAN": gan}
    losses = {name: loss.detach() / len(x) for name, loss in sums.items()}  # of one image
    return losses | {"trains_Dis": trains_Dis, "trains_Dec": trains_Dec}


def to_x(pixels, data, config):
    """Vectors (B, X) in [0, 1] → the nets' images (B, C, S, S) in [−1, 1]."""
    images = interpolate(data.images(pixels), config.image_size, mode="bicubic")
    return 2 * images.clamp(0, 1) - 1


def encode(Enc, x, data, config):
    """Activations before Enc's last layers (N, H), and μ (N, Z)."""
    hidden = shared.chunked(lambda part: Enc[:-1](to_x(part, data, config)), x, 250)
    return hidden, shared.chunked(Enc[-1].mu, hidden, 250)


def decode(Dec, z, data):
    """Dec(z) (N, C, S, S) of codes z (N, Z), antialiased, as vectors (N, X) in [0, 1]."""

    def to_pixels(part):
        x = interpolate(Dec(part), data.shape[1:], mode="bicubic", antialias=True)
        return (x.flatten(1).clamp(-1, 1) + 1) / 2

    return shared.chunked(to_pixels, z, 250)


def fixed_z(n, config, device):
    """Always the same z (n, Z)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, config.latent_dim, generator=generator).to(device)


def settled(nets, data, config):
    """Copies of Enc, and of Dec for μ and for z_p, as they are evaluated (deviation 7)."""
    B = config.batch_size
    x = data.x_train[: 64 * B]
    Enc = shared.batch_norm.settled(nets["Enc"], to_x(x, data, config), B)
    Dec = shared.batch_norm.settled(nets["Dec"], encode(Enc, x, data, config)[1], B)
    Dec_p = shared.batch_norm.settled(nets["Dec"], fixed_z(len(x), config, x.device), B)
    return Enc, Dec, Dec_p


def evaluate(nets, data, config, full=False):
    """The short features are μ."""
    Enc, Dec, Dec_p = settled(nets, data, config)
    hidden_train, mu_train = encode(Enc, data.x_train, data, config)
    hidden_test, mu_test = encode(Enc, data.x_test, data, config)
    z = fixed_z(len(data.x_test), config, mu_test.device)
    metrics = shared.image_metrics(data, decode(Dec, mu_test, data), decode(Dec_p, z, data))
    metrics |= shared.code_metrics(data, mu_train, mu_test, "short", full)
    if full:
        metrics |= shared.code_metrics(data, hidden_train, hidden_test, "long")
    return metrics


def draw(run, data, config):
    """Samples and reconstructions."""
    Enc, Dec, Dec_p = settled(run.nets, data, config)
    title = f"VAE-GAN with equilibrium, {config.preset}, epoch {run.epoch}"
    z, x = fixed_z(100, config, data.x_test.device), data.x_test[:50]
    samples = data.images(decode(Dec_p, z, data))
    run.picture("samples", shared.grid(samples, 10, f"{title}: samples"))
    x_rec = data.images(decode(Dec, encode(Enc, x, data, config)[1], data))
    run.picture("reconstructions", shared.pairs(data.images(x), x_rec, f"{title}: x and Dec(μ)"))


def main(config):
    device = shared.setup(config)
    config.width = config.width or (0.25 if device.type == "cpu" else 1.0)
    config.image_size = config.image_size or (32 if device.type == "cpu" else 64)
    if config.smoke and not config.eval:
        config.width, config.image_size = min(config.width, 1 / 16), 32
    data = shared.load_data(config, device, size=config.image_size, boxes=CELEBA)
    nets = build(config, data.shape[0]).to(device)
    if device.type == "cpu":  # where this layout is faster for narrow nets
        nets.to(memory_format=torch.channels_last)
    opts = {name: RMSprop(net.parameters(), config.lr, config.alpha) for name, net in nets.items()}
    parts = {"nets": nets} | {f"opt_{name}": opt for name, opt in opts.items()}

    run = shared.Run(config, device, nets, len(data.x_train) // config.batch_size)
    for epoch in run.epochs(parts):
        for opt in opts.values():  # its own
            opt.param_groups[0]["lr"] = config.lr * config.lr_decay ** (epoch - 1)  # its own
        for i in shared.batches(data.x_train, config.batch_size, config.seed, epoch):
            x = to_x(data.x_train[i], data, config)  # its own
            losses = train_step(nets, opts, x, config)  # its own
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
    main(shared.parse_config(Config, PRESETS))
