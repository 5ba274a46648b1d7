"""VAE-GAN, "Autoencoding beyond pixels using a learned similarity metric", arXiv 1512.09300.

A VAE whose reconstructions x̃ = Dec(z), z ~ q(z | x) = N(μ, diag s²), (μ, log s²) = Enc(x), are
compared with x not pixel by pixel but in the features Dis_l of a discriminator Dis, which in turn
tells x from x̃ and from samples x_p = Dec(z_p):

    L_prior = KL(q(z | x) ‖ N(0, I))                                                       (eq. 4)
    L_llike = ‖Dis_l(x) − Dis_l(x̃)‖², Gaussian with identity covariance              (eqs. 7, 8)
    L_GAN   = −log Dis(x) − log(1 − Dis(x̃)) − log(1 − Dis(x_p)),  z_p ~ N(0, I)          (eq. 10)
    Algorithm 1: Enc minimises L_prior + L_llike, Dec γ L_llike − L_GAN, Dis L_GAN, all at once.

    python baselines/vae_gan.py                  # small nets on a CPU, the published on a GPU
    python baselines/vae_gan.py --method vae     # a VAE with the same Enc and Dec, to compare
    python baselines/vae_gan.py --width 1 --image-size 64 --epochs 25    # all of rishabhd786's

Expect (CPU, seed 0): MSE 0.0100, identity 97.9 %, LeNet-FID 122; the VAE 0.0111, 97.2 %, 224.

Deviations from the paper (P) and two public codes, R: github.com/rishabhd786/VAE-GAN-PYTORCH, L:
github.com/lucabergamini/VAEGAN-PYTORCH; README.md has more:
 1. P: eq. 5 has L_GAN as a log-likelihood, algorithm 1 descends it for Dis; here its negative.
 2. R steps Dis, runs it anew to step Dec, and all three nets anew to step Enc: ten passes of Dis.
    Here, as in algorithm 1, one pass serves all three, and no weight moves before its last use.
 3. L, since December 2017: Dis in two passes, [x̃, x] up to the features, [x, x_p] to the logits.
    Here one joint pass, as in its first version, which has other settings: they are its README's.
 4. R: weights of Enc's and Dec's convolutions start at N(0, 0.02²), of their batch norm at
    N(1, 0.02²). L: uniform, biases 0. Here all nets start as PyTorch has it, like R's Dis.
 5. R, L: Dis ends in a sigmoid; here softplus(−l) = −log σ(l) of its logit l.
 6. All that is drawn and measured has batch norm's running statistics; R stays in training mode.
 7. --method vae: p(x | z) = N(Dec(z), I) of pixels in [−1, 1]: ½‖x − x̃‖² + KL per image.
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

RATES_L = {"lr": 1e-4, "dis_lr": 1.0, "alpha": 0.9, "lr_decay": 0.75, "margin": 0.35}
WEIGHTS_L = {"gamma_enc": 1.0, "lambda_mse": 1e-6, "gan_reconstruction": False}
PRESETS = {"rishabhd786": {}, "lucabergamini": RATES_L | WEIGHTS_L | {"reduction": "sum"}}
PAIRS = (3, 8), (4, 9), (7, 1), (0, 6)  # of classes, for the latent arithmetic


@dataclass
class Config(shared.Protocol):
    preset: str = option("rishabhd786", "nets and settings of a public code", tuple(PRESETS))
    epochs: int = option(4, "passes over the training images (R: 25 on MNIST)", low=0)
    max_steps: int = option(0, "iterations of an epoch at most; 0: all", low=0)
    eval_every: int = option(1, "epochs between cheap evaluations, and pictures", low=1)
    batch_size: int = option(64, "images per iteration (paper §4, R)", low=2)
    method: str = option("vae_gan", "VAE-GAN, or the VAE to compare", ("vae_gan", "vae"))
    width: float = option(0.0, "factor of all channels; 0: 1 on a GPU, else 0.25", low=0)
    image_size: int = option(0, "pixels of a side; 0: 64 on a GPU, else 32", (0, 32, 64))
    latent_dim: int = option(128, "dimension of z (R, L)", low=1)
    lr: float = option(3e-4, "RMSprop's learning rate (paper §4, R; L: 1e-4)", low=1e-9)
    dis_lr: float = option(0.1, "that of Dis, as a share of --lr (R; L: 1)", low=1e-9)
    alpha: float = option(0.99, "RMSprop's smoothing (PyTorch's, R; L: 0.9)", low=0)
    lr_decay: float = option(1.0, "factor of the rates from epoch to epoch (L: 0.75)", low=0)
    reduction: str = option("mean", "losses are means (R) or sums (L)", ("mean", "sum"))
    gamma: float = option(15.0, "weight γ of L_llike in Dec's loss (R)", low=0)
    gamma_enc: float = option(5.0, "weight of L_llike in Enc's loss (R; paper, L: 1)", low=0)
    lambda_mse: float = option(0.0, "λ > 0: Dec has λ L_llike − (1 − λ) L_GAN (L: 1e-6)", low=0)
    gan_reconstruction: bool = option(True, "x̃ is in L_GAN (paper, R; L: not)")
    bn_momentum: float = option(0.9, "a batch's share in running statistics (R, L)", low=0)
    margin: float = option(0.0, "of the equilibrium rule; 0: none (R; L: 0.35)", low=0)
    precision: str = option("fp32", "of products in training (ours)", ("fp32", "bf16"))


# B batch, Z = latent_dim, the nets' images (B, C, S, S) in [−1, 1], data (B, X) in [0, 1]


class Heads(nn.Module):
    """The two last layers of Enc: h → μ, log s²."""

    def __init__(self, H, Z):
        super().__init__()
        self.mu = nn.Linear(H, Z)
        self.log_var = nn.Linear(H, Z)

    def forward(self, h):
        return shared.fp32(self.mu(h)), shared.fp32(self.log_var(h))


def build(config, C):
    """Enc, Dec and, but for a VAE, Dis = (layers up to Dis_l, the rest up to the logit)."""
    Z, s, R = config.latent_dim, config.image_size // 8, config.preset == "rishabhd786"
    n32, n64, n128, n256, n512, H = (
        max(1, round(config.width * n)) for n in (32, 64, 128, 256, 512, 2048 if R else 1024)
    )
    activation = nn.LeakyReLU(0.2, inplace=True) if R else nn.ReLU(inplace=True)

    def linear(a, b):
        return [nn.Linear(a, b, bias=R), nn.BatchNorm1d(b, momentum=config.bn_momentum), activation]

    def down(a, b):
        layer = nn.Conv2d(a, b, 5, 2, 2, bias=R)
        return [layer, nn.BatchNorm2d(b, momentum=config.bn_momentum), activation]

    def up(a, b):
        layer = nn.ConvTranspose2d(a, b, *((6, 2, 2) if R else (5, 2, 2, 1)), bias=R)
        return [layer, nn.BatchNorm2d(b, momentum=config.bn_momentum), activation]

    Enc = [*down(C, n64), *down(n64, n128), *down(n128, n256), nn.Flatten()]
    Enc += [*linear(n256 * s * s, H), Heads(H, Z)]
    Dec = [*linear(Z, n256 * s * s), nn.Unflatten(1, (n256, s, s))]
    Dec += [*up(n256, n256), *up(n256, n128), *up(n128, n32)]
    Dec += [nn.ConvTranspose2d(n32, C, 5, 1, 2) if R else nn.Conv2d(n32, C, 5, 1, 2), nn.Tanh()]
    nets = {"Enc": nn.Sequential(*Enc), "Dec": nn.Sequential(*Dec)}
    if config.method == "vae":
        return nn.ModuleDict(nets)
    layers = [nn.Conv2d(C, n32, 5, 1, 2), activation]
    layers += [*down(n32, n128), *down(n128, n256), *down(n256, n256)]
    end = len(layers) if R else len(layers) - 2  # L compares features before batch norm
    rest = [*layers[end:], nn.Flatten(), *linear(n256 * s * s, n512), nn.Linear(n512, 1)]
    nets["Dis"] = nn.Sequential(nn.Sequential(*layers[:end]), nn.Sequential(*rest))
    return nn.ModuleDict(nets)


def L_prior(mu, log_var, reduction):
    """KL(N(μ, diag s²) ‖ N(0, I)) = ½ Σ (μ² + s² − 1 − log s²); or its mean over B and Z."""
    kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var)  # (B, Z)
    return kl.mean() if reduction == "mean" else kl.sum()


def L_llike(f, f_rec, reduction):
    """−log N(f; f_rec, I) = ½ Σ (f − f_rec)², up to a constant; or the mean of the squares."""
    error = (shared.fp32(f) - shared.fp32(f_rec)).square()
    return error.mean() if reduction == "mean" else 0.5 * error.sum()


def cross_entropies(logits, config):
    """−log Dis(x), −log(1 − Dis(x̃)), if wanted, −log(1 − Dis(x_p)), means; their sum: L_GAN."""
    real, fake_rec, fake = logits  # (B, 1) each
    terms = torch.stack([softplus(-real), softplus(fake_rec), softplus(fake)]).mean((1, 2))
    return terms if config.gan_reconstruction else terms[::2]


def discriminate(Dis, images, config):
    """Features Dis_l and logits of each of x, x̃, x_p, one by one (R) or joined (L)."""
    if config.preset == "lucabergamini":
        features = Dis[0](torch.cat(images))
        return features.chunk(3), shared.fp32(Dis[1](features)).chunk(3)
    features = [Dis[0](part) for part in images]
    return features, [shared.fp32(Dis[1](part)) for part in features]


def who_trains(terms, config):
    """Whether Dis and Dec: who is far ahead by the cross-entropies rests, but never both (L)."""
    if not config.margin:
        return True, True
    terms = terms.tolist()
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
    """An iteration of algorithm 1 on x (B, C, S, S)."""
    Enc, Dec, Dis = nets["Enc"], nets["Dec"], nets["Dis"]
    with shared.products(config, x.device):
        mu, log_var = Enc(x)  # (B, Z) each
        z = mu + (log_var / 2).exp() * torch.randn_like(mu)
        z_p = torch.randn_like(mu)
        fakes = [Dec(z), Dec(z_p)]  # x̃, x_p
        leaves = [image.detach().requires_grad_() for image in fakes]  # where Dis's graph begins
        features, logits = discriminate(Dis, [x, *leaves], config)
    terms = cross_entropies(logits, config)
    prior = L_prior(mu, log_var, config.reduction)
    llike = L_llike(*features[:2], config.reduction)
    gan = terms.sum() * (len(x) if config.reduction == "sum" else 1)
    train_Dis, train_Dec = who_trains(terms, config)

    # What L_llike and L_GAN ask of x̃ and x_p; and the gradient of Dis, which only L_GAN moves.
    g_llike = grad(llike, leaves, retain_graph=True, materialize_grads=True)
    *g_Dis, g_rec, g_p = grad(gan, [*Dis.parameters(), *leaves], materialize_grads=True)
    if train_Dis:
        descend(opts["Dis"], g_Dis)
    # What L_llike asks of z, through Dec, whose weights get nothing of it.
    (g_z,) = grad(fakes[0], [z], config.gamma_enc * g_llike[0], retain_graph=True)
    if train_Dec:  # γ L_llike − L_GAN
        share = config.lambda_mse
        a, b = (share, 1 - share) if share else (config.gamma, 1)
        wishes = [a * g - b * h for g, h in zip(g_llike, (g_rec, g_p), strict=True)]
        descend(opts["Dec"], grad(fakes, [*Dec.parameters()], wishes))
    # Enc: L_prior + L_llike; the largest net comes last, when memory of the other graphs is free.
    descend(opts["Enc"], grad([prior, z], [*Enc.parameters()], [None, g_z]))
    return {"L_prior": prior.detach(), "L_llike": llike.detach(), "L_GAN": gan.detach()}


def vae_step(nets, opts, x, config):
    """One update of a VAE's Enc and Dec on x (B, C, S, S)."""
    Enc, Dec = nets["Enc"], nets["Dec"]
    with shared.products(config, x.device):
        mu, log_var = Enc(x)
        x_rec = Dec(mu + (log_var / 2).exp() * torch.randn_like(mu))
    prior = L_prior(mu, log_var, "sum") / len(x)
    llike = L_llike(x, x_rec, "sum") / len(x)
    gradients = grad(prior + llike, [*nets.parameters()])
    n = len([*Enc.parameters()])
    descend(opts["Enc"], gradients[:n])
    descend(opts["Dec"], gradients[n:])
    return {"L_prior": prior.detach(), "L_llike": llike.detach()}


def set_rates(opts, config, epoch):
    for name, opt in opts.items():
        share = config.dis_lr if name == "Dis" else 1
        opt.param_groups[0]["lr"] = config.lr * config.lr_decay ** (epoch - 1) * share


def enlarge(images, config):
    """Images (B, C, H, W) in [0, 1] → what the nets see, (B, C, S, S) in [−1, 1]."""
    S = config.image_size
    if images.shape[-1] != S:
        images = interpolate(images, (S, S), mode="bicubic").clamp(0, 1)
    return 2 * images - 1


def reduce(x, shape):
    """The way back, antialiased, to vectors (B, X)."""
    if x.shape[1:] != shape:
        x = interpolate(x, shape[1:], mode="bicubic", antialias=True).clamp(-1, 1)
    return (x.flatten(1) + 1) / 2


def encode(Enc, x, data, config):
    """Activations before Enc's last layers (N, H), and μ (N, Z); R's nets need 10 MB an image."""
    hidden = shared.chunked(lambda part: Enc[:-1](enlarge(data.images(part), config)), x, 250)
    return hidden, shared.chunked(Enc[-1].mu, hidden, 250)


def decode(Dec, z, data):
    """Vectors (N, X) in [0, 1] of codes z (N, Z)."""
    return shared.chunked(lambda part: reduce(Dec(part), data.shape), z, 250)


def evaluate(nets, data, config, full=False):
    """The short features are μ; fid_floor is what enlarging and reducing do to test images."""
    nets.eval()
    Enc, Dec = nets["Enc"], nets["Dec"]
    hidden_train, mu_train = encode(Enc, data.x_train, data, config)
    hidden_test, mu_test = encode(Enc, data.x_test, data, config)
    z = prior(1000 if config.smoke else 10_000, config, mu_test.device)
    metrics = shared.image_metrics(data, decode(Dec, mu_test, data), decode(Dec, z, data))
    metrics |= shared.code_metrics(data, mu_train, mu_test, "short", full)
    if full:
        metrics |= shared.code_metrics(data, hidden_train, hidden_test, "long")
        resized = reduce(enlarge(data.images(data.x_test), config), data.shape)
        floor = shared.image_metrics(data, x_fake=resized)
        metrics |= {f"{name}_floor": value for name, value in floor.items()}
    nets.train()
    return metrics


def prior(n, config, device):
    """Always the same z (n, Z)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, config.latent_dim, generator=generator).to(device)


def arithmetic(nets, data, config):
    """Images (·, X), names of rows: x of class a, Dec(μ), Dec(μ + mean code of b − that of a)."""
    codes, rows, names = encode(nets["Enc"], data.x_train, data, config)[1], [], []
    for a, b in PAIRS:
        x = data.x_test[data.y_test == a][:10]
        mu = encode(nets["Enc"], x, data, config)[1]
        way = codes[data.y_train == b].mean(0) - codes[data.y_train == a].mean(0)
        rows += [x, decode(nets["Dec"], mu, data), decode(nets["Dec"], mu + way, data)]
        names += ["x", "Dec(μ)", f"{a} → {b}"]
    return torch.cat(rows), names


def draw(run, data, config):
    """Samples and reconstructions; at the end latent arithmetic."""
    nets = run.nets.eval()
    title = f"{'VAE' if config.method == 'vae' else 'VAE-GAN'}, epoch {run.epoch}"
    samples = data.images(decode(nets["Dec"], prior(100, config, data.x_test.device), data))
    run.picture("samples", shared.grid(samples, 10, f"{title}: samples"))
    x = data.x_test[:50]
    x_rec = data.images(decode(nets["Dec"], encode(nets["Enc"], x, data, config)[1], data))
    run.picture("reconstructions", shared.pairs(data.images(x), x_rec, f"{title}: x and Dec(μ)"))
    if data.y_train is not None and run.epoch == config.epochs:
        rows, names = arithmetic(nets, data, config)
        title = f"epoch {run.epoch}: a direction added to μ, the difference of the mean codes"
        run.picture("arithmetic", shared.grid(data.images(rows), 10, title, names))
    run.nets.train()


def main(config):
    device = shared.setup(config)
    config.width = config.width or (1.0 if device.type == "cuda" else 0.25)
    config.image_size = config.image_size or (64 if device.type == "cuda" else 32)
    if config.smoke and not config.eval:
        config.width, config.image_size = min(config.width, 1 / 16), 32
    data = shared.load_data(config, device, size=config.image_size)
    nets = build(config, data.shape[0]).to(device)
    if device.type == "cpu":  # where this layout is faster for narrow nets
        nets.to(memory_format=torch.channels_last)
    opts = {name: RMSprop(net.parameters(), config.lr, config.alpha) for name, net in nets.items()}
    parts = {"nets": nets} | {f"opt_{name}": opt for name, opt in opts.items()}
    step = vae_step if config.method == "vae" else train_step
    x_train, steps = data.x_train, len(data.x_train) // config.batch_size
    steps = min(steps, config.max_steps or steps)

    run = shared.Run(config, device, nets, steps)  # its own
    for epoch in run.epochs(parts):
        set_rates(opts, config, epoch)  # its own
        for i in shared.batches(data.x_train, config.batch_size, config.seed, epoch):
            if run.step_in_epoch == steps:  # its own
                break  # its own
            losses = step(nets, opts, enlarge(data.images(x_train[i]), config), config)  # its own
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
