"""Adversarial Latent Autoencoder (ALAE), arXiv 2004.04467: the official fully connected model.

Four maps: F: z → w, G: w → x, E: x → w, D: w → ℝ. G∘F is a generator, D∘E its critic, and E inverts
G on the latents w: no loss compares the pixels of x and G(E(x)). Algorithm 1, each step on fresh
z ~ N(0, I):

    I.   E, D  minimise  softplus(D(E(G(F(z))))) + softplus(−D(E(x))) + γ/2 ‖∇ₓ D(E(x))‖²    (R1)
    II.  F, G  minimise  softplus(−D(E(G(F(z)))))
    III. E, G  minimise  ‖F(z) − E(G(F(z)))‖²

    python step3_official_alae/train_fc_alae.py --epochs 600                # official; default: 20
    python step3_official_alae/train_fc_alae.py --preset clean              # ours, 40 epochs
    python step3_official_alae/train_fc_alae.py --eval assets/fc_alae.pt    # the trained model

Expect (seed 0, test images): official LeNet-FID 148, identity 88.4 %; fast 3.4 and 95.3 %; clean
2.8 and 94.5 %; long 2.1 and 95.0 %.

Deviations from the paper (P) or the official code (O: github.com/podgorskiy/ALAE, mnist_fc.yaml):
 1. P: Adam, β = (0, 0.99), and PGGAN's equalized learning rate. O and here: LREQAdam, the same but
    for ε (equalized_lr.py); its step has a factor c for each tensor, √2 lrmul/√fan_in for weights,
    lrmul for biases.
 2. P: Step III updates E and G; O and here: its optimizers hold D and F as well. F moves (only the
    target w is detached); D gets zero gradients, which shrink its second moment.
    P: L_err is a squared norm; O and here its mean over the dimensions of w.
 3. O: the main branch trains on x ∈ [−1, 1]; here [0, 1] (--input-range), as in O's branch for the
    paper's MNIST section. That branch has leaky slope 0.01 in G and on E's output (--slope) and,
    at its head, F(z) = z and features and pictures of the raw weights: --preset mnist-ref.
 4. O: 400 to 600 epochs; here 20 by default, which fit a CPU.
 5. O: D has 50 outputs, of which the first is used; here it has that one.
 6. O: the averaged weights start at a second random initialization; here at the first.
 7. O: features for the classifiers come from the raw weights, pictures from the averaged; here
    both come from --eval-weights, ema by default.
 8. Presets of ours. fast: four times the learning rate on half the batch, falling to 0 over the
    second half of the training, a sigmoid behind G, and a tenth of L_err. clean: fast for 40 epochs
    in bf16 with γ = 0.6, three tenths of L_err and a rate that ends at a fifth. signed: fast on
    x ∈ [−1, 1], with a tanh, three tenths of L_err and a rate that ends at four tenths; R1 then
    weighs a quarter, for ∇ₓ is half as long. long: signed for 75 epochs in bf16, down to a fifth.
    shallow: signed with two layers in F instead of six; minutes: four, 6 epochs, bf16.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from torch import nn
from torch.nn.functional import softplus

RATE = {"lr": 0.008, "batch_size": 64, "decay": 0.5}
FAST = RATE | {"epochs": 50, "output": "bounded", "err_weight": 0.1}
CLEAN = FAST | {"epochs": 40, "gamma": 0.6, "err_weight": 0.3, "lr_end": 0.2}
SIGNED = FAST | {"input_range": "11", "err_weight": 0.3, "lr_end": 0.4}
PRESETS = {
    "official": {},
    "mnist-ref": {"mapping": "identity", "slope": 0.01, "eval_weights": "raw"},  # deviation 3
    "fast": FAST,
    "clean": CLEAN | {"precision": "bf16"},
    "signed": SIGNED,
    "long": SIGNED | {"epochs": 75, "lr_end": 0.2, "precision": "bf16"},
    "shallow": SIGNED | {"mapping_layers": 2},  # keeps more digits at epoch 10, fewer at 50
    "minutes": SIGNED | {"mapping_layers": 4, "epochs": 6, "precision": "bf16"},
    # The way from official to fast, and what else the paper leaves open: changes to RATE
    "rate": RATE,
    "rate-critic-mlp": RATE | {"critic": "mlp"},
    "rate-bounded": RATE | {"output": "bounded"},
    "rate-slope": RATE | {"slope": 0.01},
    "rate-input-11": RATE | {"input_range": "11"},
    "rate-bounded-pixel-norm": RATE | {"output": "bounded", "mapping": "pixel-norm"},
    "rate-bounded-err": RATE | {"output": "bounded", "err_weight": 0.1},
    "rate-bounded-err-lr": RATE | {"output": "bounded", "err_weight": 0.1, "lr": 0.016},
}


@dataclass
class Config(shared.Protocol):
    preset: str = option(
        "official", "mnist_fc.yaml; mnist-ref; ours (deviation 8); a study: rate-…", tuple(PRESETS)
    )
    epochs: int = option(20, "passes over the training images (mnist_fc.yaml: 600)", low=0)
    batch_size: int = option(128, "images per step (mnist_fc.yaml)", low=1)
    lr: float = option(0.002, "learning rate, constant (mnist_fc.yaml)", low=1e-9)
    decay: float = option(0.0, "share of the training with a falling lr (ours)", low=0, high=1.01)
    lr_end: float = option(0.0, "with --decay, the lr ends at this share (ours)", low=0, high=1.01)
    latent_dim: int = option(50, "dimension of z and of w (paper §6.1)", low=2)
    width: int = option(1024, "units of the hidden layers of E and G (paper §6.1)", low=1)
    gamma: float = option(10.0, "weight γ of R1 (paper, algorithm 1)", low=0)
    err_weight: float = option(1.0, "weight of L_err in Step III (algorithm 1: 1)", low=0)
    ema: float = option(10_000.0, "half-life in images of averaged weights (train_alae.py)", low=1)
    input_range: str = option("01", "pixels in [0, 1] (mnist_ref) or [−1, 1] (main)", ("01", "11"))
    slope: float = option(0.2, "leaky slope in G, on E's output (net.py; mnist_ref: 0.01)", low=0)
    mapping: str = option(
        "mlp",
        "F: pixel norm and layers, pixel norm, or F(z) = z",
        ("mlp", "pixel-norm", "identity"),
    )
    mapping_layers: int = option(6, "layers of F (mnist_fc.yaml)", low=1)
    critic: str = option(
        "linear", "D's layers: linear, as official, or with leaky ReLU", ("linear", "mlp")
    )
    output: str = option(
        "linear", "of G: linear, or bounded by a sigmoid or tanh", ("linear", "bounded")
    )
    eval_weights: str = option("ema", "evaluate the averaged or the raw weights", ("raw", "ema"))
    precision: str = option("fp32", "of matrix products in training", ("fp32", "bf16"))


# B batch, Z = W = latent_dim, X = pixels (784), H = width


class Linear(nn.Linear):
    """Linear layer with the official equalized learning rate (lreq.py): weights start at
    N(0, 2/fan_in), and LREQAdam multiplies the steps of weight and bias by their c."""

    def __init__(self, fan_in, fan_out, lrmul=1.0):
        super().__init__(fan_in, fan_out)
        he = math.sqrt(2) / math.sqrt(fan_in)
        nn.init.normal_(self.weight, std=he)
        nn.init.zeros_(self.bias)
        self.weight.c = he * lrmul
        self.bias.c = lrmul


def build(config, X):
    """F: z (B, Z) → w (B, W), G: w → x (B, X), E: x → w, D: w → (B, 1)."""
    Z, H = config.latent_dim, config.width
    leaky, leaky_out = nn.LeakyReLU(0.2), nn.LeakyReLU(config.slope)
    F = []
    if config.mapping != "identity":
        F.append(nn.RMSNorm(Z, eps=1e-8, elementwise_affine=False))  # pixel norm
    if config.mapping == "mlp":
        for _ in range(config.mapping_layers):
            F += [Linear(Z, Z, lrmul=0.1), leaky]
    G = [Linear(Z, H), leaky_out, Linear(H, H), leaky_out, Linear(H, X)]
    if config.output == "bounded":
        G.append(nn.Sigmoid() if config.input_range == "01" else nn.Tanh())
    E = [Linear(X, H), leaky, Linear(H, H), leaky, Linear(H, Z), leaky_out]
    D = [Linear(Z, Z, lrmul=0.1), Linear(Z, Z, lrmul=0.1), Linear(Z, 1, lrmul=0.1)]
    if config.critic == "mlp":
        D = [D[0], leaky, D[1], leaky, D[2]]
    nets = {"F": shared.Float32(*F), "G": nn.Sequential(*G)}
    nets |= {"E": nn.Sequential(*E), "D": shared.Float32(*D)}
    return nn.ModuleDict(nets)


class LREQAdam(torch.optim.Adam):
    """The official optimizer (custom_adam.py), with g the gradient of w and c its constant:

        v ← β2 v + (1 − β2) g²,    w ← w − lr c √(1 − β2^t) g / (√v + ε)

    This is torch's Adam with β1 = 0 and a learning rate lr·c for each c, except for ε: torch adds
    it after the bias correction of √v. Giving torch ε/√(1 − β2^t) removes this difference.
    """

    def __init__(self, *nets, lr, beta2=0.99, eps=1e-8):
        by_c = {}
        for net in nets:
            for p in net.parameters():
                by_c.setdefault(p.c, []).append(p)
        groups = [{"params": params, "c": c, "t": 0} for c, params in by_c.items()]
        super().__init__(groups, lr, (0.0, beta2), eps, fused=True)
        self.set_lr(lr)

    def set_lr(self, lr):
        for group in self.param_groups:
            group["lr"] = lr * group["c"]

    def step(self):
        for group in self.param_groups:
            group["t"] += 1
            group["eps"] = self.defaults["eps"] / math.sqrt(1 - group["betas"][1] ** group["t"])
        super().step()


def L_adv_ED(D, E, x, x_fake, gamma):
    """softplus(D(E(x_fake))) + softplus(−D(E(x))) + γ/2 ‖∇ₓ D(E(x))‖², and its last term."""
    x = x.detach().requires_grad_()
    real = D(E(x))  # (B, 1)
    fake = D(E(x_fake))
    (gradient,) = torch.autograd.grad(real.sum(), x, create_graph=True)  # (B, X)
    r1 = gamma / 2 * gradient.square().sum(1).mean()
    return (softplus(fake) + softplus(-real)).mean() + r1, r1


def L_adv_FG(D, E, x_fake):
    """softplus(−D(E(x_fake))), mean over the batch."""
    return softplus(-D(E(x_fake))).mean()


def L_err_EG(E, G, w):
    """‖w − E(G(w))‖², mean over batch and dimensions; only w is detached (deviation 2)."""
    return (w.detach() - E(G(w))).square().mean()


def train_step(nets, opt_ED, opt_FG, x, config):
    """One iteration of algorithm 1 on x (B, X)."""
    F, G = nets["F"], nets["G"]
    E, D = nets["E"], nets["D"]
    z = torch.randn(3, len(x), config.latent_dim, device=x.device)  # fresh for each step

    # Step I: the critic D∘E tells data from samples.
    with shared.products(config, x.device):
        with torch.no_grad():
            x_fake = G(F(z[0]))
        loss_ED, r1 = L_adv_ED(D, E, x, x_fake, config.gamma)
    opt_ED.zero_grad()
    loss_ED.backward(inputs=[*E.parameters(), *D.parameters()])
    opt_ED.step()

    # Step II: the generator G∘F moves against it.
    with shared.products(config, x.device):
        loss_FG = L_adv_FG(D, E, G(F(z[1])))
    opt_FG.zero_grad()
    loss_FG.backward(inputs=[*F.parameters(), *G.parameters()])
    opt_FG.step()

    # Step III: E inverts G, on latents.
    with shared.products(config, x.device):
        loss_err = L_err_EG(E, G, F(z[2]))
    E.zero_grad()
    D.zero_grad(set_to_none=False)  # zeros, not None: its second moment decays (deviation 2)
    opt_FG.zero_grad()
    (config.err_weight * loss_err).backward()
    opt_ED.step()
    opt_FG.step()

    losses = {"L_adv_ED": loss_ED, "L_adv_FG": loss_FG, "L_err_EG": loss_err, "r1": r1}
    return {name: loss.detach() for name, loss in losses.items()}


def learning_rate(config, progress):
    """After the share `progress` of the training: constant, or falling at its end (deviation 8)."""
    if config.decay == 0:
        return config.lr
    left = min(1.0, (1 - progress) / config.decay)  # 1 until the fall begins, then down to 0
    return config.lr * (config.lr_end + (1 - config.lr_end) * left)


@torch.no_grad()
def update_ema(averaged, nets, decay):
    torch._foreach_lerp_(list(averaged.parameters()), list(nets.parameters()), 1 - decay)


def to_x(pixels, config):
    """Pixels in [0, 1] → the range that the networks see."""
    return pixels * 2 - 1 if config.input_range == "11" else pixels


def to_pixels(x, config):
    return (x + 1) / 2 if config.input_range == "11" else x


def fixed_z(n, config, device):
    """Always the same z (n, Z)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, config.latent_dim, generator=generator).to(device)


def evaluate(nets, data, config, full=False):
    """Short features: E(x) (N, W); long: the activations (N, H) before E's last layer."""
    F, G, E = nets["F"], nets["G"], nets["E"]
    long = [shared.chunked(E[:4], to_x(x, config)) for x in (data.x_train, data.x_test)]
    short = [shared.chunked(E[4:], hidden) for hidden in long]
    z = fixed_z(len(data.x_test), config, data.x_test.device)
    x_rec = to_pixels(shared.chunked(G, short[1]), config)
    x_fake = to_pixels(shared.chunked(nn.Sequential(F, G), z), config)
    metrics = shared.image_metrics(data, x_rec, x_fake)
    metrics |= shared.code_metrics(data, *short, "short", full)
    if full:
        metrics |= shared.code_metrics(data, *long, "long")
    return metrics


@torch.no_grad()
def draw(run, data, config):
    """Samples, reconstructions, interpolations of w and of z, and traversals of w."""
    F, G, E = run.nets["F"], run.nets["G"], run.nets["E"]
    x, z = data.x_test[:50], fixed_z(10_000, config, data.x_test.device)

    def picture(name, w, columns, what, rows=()):
        images = data.images(to_pixels(G(w), config))
        run.picture(name, shared.grid(images, columns, f"FC ALAE, epoch {run.epoch}: {what}", rows))

    w = E(to_x(x, config))  # (50, W)
    picture("samples", F(z[:100]), 10, "samples")
    x_rec = data.images(to_pixels(G(w), config))
    title = f"FC ALAE, epoch {run.epoch}: test images x and G(E(x))"
    run.picture("reconstructions", shared.pairs(data.images(x), x_rec, title))
    t = torch.linspace(0, 1, 10, device=x.device)[:, None]
    picture("interpolations", w[:8, None].lerp(w[8:16, None], t).flatten(0, 1), 10, "between two w")
    z_between = z[:8, None].lerp(z[8:16, None], t).flatten(0, 1)
    picture("interpolations_z", F(z_between), 10, "between two z")

    variances, axes = torch.linalg.eigh(torch.cov(F(z).T).cpu())  # ascending; axes in columns
    main_axes = (variances.clamp(min=0).sqrt() * axes).T.flip(0)[:8]  # (8, W), each of length σ
    w_moved = w[0] + torch.linspace(-2.5, 2.5, 11).to(w)[:, None] * main_axes.to(w)[:, None]
    names = [f"direction {i + 1}" for i in range(len(w_moved))]
    what = "x₀ moved along main directions of w, −2.5 σ to 2.5 σ"
    picture("traversals", w_moved.flatten(0, 1), 11, what, names)


def main(config):
    device = shared.setup(config)
    data = shared.load_data(config, device)
    x_train = to_x(data.x_train, config)
    nets = build(config, x_train.shape[1]).to(device)
    averaged = copy.deepcopy(nets).requires_grad_(False)
    opt_ED = LREQAdam(nets["E"], nets["D"], lr=config.lr)
    opt_FG = LREQAdam(nets["F"], nets["G"], lr=config.lr)
    parts = {"nets": nets, "averaged": averaged, "opt_ED": opt_ED, "opt_FG": opt_FG}
    evaluated = averaged if config.eval_weights == "ema" else nets

    run = shared.Run(config, device, evaluated, len(x_train) // config.batch_size)  # its own
    for epoch in run.epochs(parts):
        for i in shared.batches(data.x_train, config.batch_size, config.seed, epoch):
            lr = learning_rate(config, run.progress)  # its own
            opt_ED.set_lr(lr)  # its own
            opt_FG.set_lr(lr)  # its own
            losses = train_step(nets, opt_ED, opt_FG, x_train[i], config)  # its own
            update_ema(averaged, nets, 0.5 ** (config.batch_size / config.ema))  # its own
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
