"""Adversarial autoencoder (AAE), arXiv 1511.05644: an autoencoder whose codes a discriminator makes look like a prior.

Three nets: the encoder Q: x → z, the decoder P: z → x̂ and the discriminator D, which tells z ~ p(z) from z = Q(x). For each
batch three phases, one after the other (paper §2; seeds 002 and 004 of this project are its two public implementations):

    1. reconstruction   Q, P  minimise  L_rec = ‖x − P(Q(x))‖²   (mean over pixels; seed 002: their cross-entropy)
    2. discriminator    D     minimises L_D   = −log D(z) − log(1 − D(Q(x))),  z ~ p(z)
    3. generator        Q     minimises L_Q   = −log D(Q(x))

With --labels the one-hot class y goes to P and to D beside z, so that z is left with the style (seed 004). P is then told the
class of test images too: their reconstructions have it, and identity says nothing.

    python baselines/aae.py --recipe ours --labels                     # scenario 1 of seed 004: dense, with labels
    python baselines/aae.py --recipe ours                              # scenario 2: without
    python baselines/aae.py                                            # the same as seed 004 has it
    python baselines/aae.py --net conv --labels                        # 3, and 4 without --labels: convolutions
    python baselines/aae.py --recipe seed002                           # dropout, cross-entropy, a 2-d Gaussian
    python baselines/aae.py --prior gmm10 --labels                     # ten Gaussians, one for each class (paper, figure 4)
    python baselines/aae.py --lr-Q 0                                   # the plain autoencoder of the same size
    python baselines/aae.py --dataset celeba                           # or folder:PATH: 32×32 faces, 50-d code

Result to expect (recipe ours, 30 epochs, one core of an AMD EPYC, 9 to 14 minutes; README has the table): the last epoch's
mean L_rec is 0.0238, the test MSE 0.0232, the prior gap 0.033 (floor 0.017; seed 0); with labels 0.0206 ± 0.0002, 0.0209 ±
0.0002 and 0.044 ± 0.010 (seeds 0 and 1). Seed 004's notes have 0.0254 and 0.0223 for L_rec, after a stage more.

Deviations from the seeds (002: its README, and its repository's basic script; 004: its repository, TensorFlow):
 1. 002 has a sigmoid, and a logarithm of x + 10⁻¹⁵; here, as in 004, the same losses of logits, which cannot overflow.
 2. 002: P lacks the ReLU after its second layer, a bug; here it is there. Dropout comes before the ReLU, which is the same.
 3. 004 takes all three gradients from one forward pass; here, as in 002 and the paper, each phase sees what the one before
    has made of Q. 004 sums over pixels and batch, which Adam does not notice; here the mean.
 4. 004 divided its learning rate by hand; here by 5 whenever --patience epochs bring the training's L_rec down by less than
    1 %. 004 ended with a stage of RMSprop, which is left out.
 5. 002's basic script: z_dim 2, prior of standard deviation 5 (--prior-std), learning rates 1e-4 and 5e-5, 500 epochs.
    Its README, whose figures the recipe takes, says neither z_dim (here 2) nor epochs.
 6. 004 starts all layers Xavier-uniform with biases at 0; here as PyTorch has it, like 002.
 7. 004's faces lie in [−1, 1] with a tanh; here in [0, 1] with a sigmoid, like all data. Its labels of faces (CelebA's 40
    attributes) are not taken.
 8. Paper: SGD with momentum, D with 1000 units, a label for D alone; here as the seeds: Adam, and the label for P too.
 9. --recipe ours, from trials on val that are not kept: at 004's equal rates D lags behind Q, and after ten epochs the codes
    are 0.21 off the prior while D's loss is that of guessing (seed004-seed0). Here D learns ten times as fast as Q does
    against it, and batch norm's running statistics forget more slowly, for their noise moves the codes too. 004's balance
    rule came into force in the convolutional nets' first epochs alone (conv-labels-seed0: D took 28 % of the first's batches).
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize, one_hot, softplus

import shared
from shared import option

FACES = {"net": "conv", "latent_dim": 50}


@dataclass
class Config(shared.Protocol):
    epochs: int = option(30, "passes over the training images (002's script: 500; 004: by hand)", low=1)
    batch_size: int = option(128, "images per step (004; 002: 100)", low=2)
    recipe: str = option("seed004", "defaults of the other fields: a seed's, or ours (deviation 9)",
                         choices=("seed002", "seed004", "ours"))
    net: str = option("dense", "784-1000-1000-z and back, or 004's convolutions", choices=("dense", "conv"))
    labels: bool = option(False, "give the one-hot class to P and D (004's scenarios 1 and 3)")
    prior: str = option("truncated", "p(z): N(0, I), cut at 2 standard deviations (004), ten Gaussians or a Swiss roll in 2-d",
                        choices=("gaussian", "truncated", "gmm10", "swiss_roll"))
    prior_std: float = option(1.0, "p(z) is stretched by this (002's script: 5)", low=1e-9)
    latent_dim: int = option(5, "dimension of z (004; its faces: 50)", low=1)
    loss: str = option("mse", "L_rec: squared error (004) or cross-entropy of pixels (002)", choices=("mse", "bce"))
    lr: float = option(2e-4, "learning rate of Adam for reconstruction (004; 002: 6e-4)", low=1e-9)
    lr_D: float = option(2e-4, "of D (004; 002: 8e-4)", low=1e-9)
    lr_Q: float = option(2e-4, "of Q against D (004; 002: 8e-4); 0: a plain autoencoder", low=0)
    beta1: float = option(0.5, "β₁ of Adam (004; 002: 0.9)", low=0, high=0.999)
    hidden_D: int = option(500, "units of D's two layers (004; 002: 1000)", low=1)
    slope: float = option(0.2, "slope of the leaky ReLU (004; 002: 0)", low=0, high=1)
    batch_norm: bool = option(True, "in Q and P (004)")
    bn_momentum: float = option(0.1, "weight of a batch in its running statistics (004)", low=0, high=1)
    dropout: float = option(0.0, "in dense Q and P (002: 0.25)", low=0, high=0.9)
    dropout_D: float = option(0.0, "in D (002: 0.2)", low=0, high=0.9)
    q_eval: bool = option(False, "Q in evaluation mode while D learns (002)")
    balance: bool = option(True, "D and Q each sit out while far ahead (004)")
    patience: int = option(3, "epochs after which a stagnant L_rec divides the learning rates by 5 (004; 0: never)", low=0)
    eval_every: int = option(5, "epochs between cheap evaluations, and pictures", low=1)
    references: bool = option(False, "score raw pixels and the untrained encoder too, for the tables (a minute)")
    resume: str = option("", "checkpoint.pt to go on from")
    benchmark: bool = option(False, "measure the speed of a training step, and stop")
    recipes = {
        ("recipe", "ours"): {"lr_D": 1e-3, "lr_Q": 1e-4, "bn_momentum": 0.01},
        ("recipe", "seed002"): {"batch_size": 100, "prior": "gaussian", "latent_dim": 2, "loss": "bce", "lr": 6e-4, "lr_D": 8e-4,
                                "lr_Q": 8e-4, "beta1": 0.9, "hidden_D": 1000, "slope": 0.0, "batch_norm": False, "dropout": 0.25,
                                "dropout_D": 0.2, "q_eval": True, "balance": False, "patience": 0},
        ("dataset", "celeba"): FACES, ("dataset", "folder"): FACES,
        ("prior", "gmm10"): {"latent_dim": 2}, ("prior", "swiss_roll"): {"latent_dim": 2}}


# B batch, Z = latent_dim, K = classes (0 without labels), C H W: an image, X = C·H·W pixels

def build(config, shape, K):
    """Q: x (B, X) → z (B, Z), P: (z, y) (B, Z + K) → logits of pixels (B, X), D: (z, y) → a logit (B, 1)."""
    Z, (C, size, _), leaky = config.latent_dim, shape, nn.LeakyReLU(config.slope)

    def dense(n, m):  # layer, norm, ReLU
        return [nn.Linear(n, m)] + [nn.BatchNorm1d(m, momentum=config.bn_momentum)] * config.batch_norm + [
            leaky, nn.Dropout(config.dropout)]

    def conv(layer, n, *args, **kwargs):  # norm, ReLU, layer
        return [nn.BatchNorm2d(n, momentum=config.bn_momentum)] * config.batch_norm + [leaky, layer(n, *args, **kwargs)]

    if config.net == "dense":
        X, N = math.prod(shape), 1000
        Q = [*dense(X, N), *dense(N, N), nn.Linear(N, Z)]
        P = [*dense(Z + K, N), *dense(N, N), nn.Linear(N, X)]
    else:  # each halving has a 4×4 kernel; the rest (7×7 of 28×28, 4×4 of 32×32) is one more kernel
        channels = [16, 32, 64] if size == 28 else [16, 32, 64, 128]
        rest, ways = size >> len(channels) - 1, list(zip(channels, channels[1:]))
        Q = [nn.Unflatten(1, shape), nn.Conv2d(C, 16, 3, padding=1),
             *(layer for n, m in ways for layer in conv(nn.Conv2d, n, m, 4, 2, 1)),
             *conv(nn.Conv2d, channels[-1], Z, rest), nn.Flatten()]
        P = [nn.Unflatten(1, (Z + K, 1, 1)), nn.ConvTranspose2d(Z + K, channels[-1], rest),
             *(layer for n, m in reversed(ways) for layer in conv(nn.ConvTranspose2d, m, n, 4, 2, 1)),
             *conv(nn.Conv2d, 16, C, 3, padding=1), nn.Flatten()]
    M, drop = config.hidden_D, nn.Dropout(config.dropout_D)
    D = [nn.Linear(Z + K, M), leaky, drop, nn.Linear(M, M), leaky, drop, nn.Linear(M, 1)]
    return nn.ModuleDict({"Q": nn.Sequential(*Q), "P": nn.Sequential(*P), "D": nn.Sequential(*D)})


def p(n, config, device, y=None, generator=None):
    """n draws of the prior, (n, Z). Ten Gaussians on a circle and a Swiss roll take the class y (n, K), if there is one, for
    the component, or the tenth of the roll (paper, figure 4)."""
    def normal(*size):
        return torch.randn(*size, device=device, generator=generator)
    if config.prior == "gaussian":
        return config.prior_std * normal(n, config.latent_dim)
    if config.prior == "truncated":
        z = torch.empty(n, config.latent_dim, device=device)
        return config.prior_std * nn.init.trunc_normal_(z, 0, 1, -2, 2, generator=generator)
    k = torch.randint(10, (n,), device=device, generator=generator) if y is None or not y.shape[1] else y.argmax(1)
    if config.prior == "gmm10":  # centres at radius 2, long towards the middle
        along, across, angle = 2 + 0.6 * normal(n), 0.15 * normal(n), math.tau / 10 * k
        z = torch.stack([along * angle.cos() - across * angle.sin(), along * angle.sin() + across * angle.cos()], 1)
    else:
        t = ((k + torch.rand(n, device=device, generator=generator)) / 10).sqrt()  # even along the roll
        z = 3 * t[:, None] * torch.stack([(2 * math.tau * t).cos(), (2 * math.tau * t).sin()], 1) + 0.05 * normal(n, 2)
    return config.prior_std * z


def L_rec(logits, x, loss):
    """Mean over batch and pixels of (x − x̂)² or of the cross-entropy; x̂ = σ(logits)."""
    return binary_cross_entropy_with_logits(logits, x) if loss == "bce" else (x - logits.sigmoid()).square().mean()


def L_D(D, z, z_fake):
    """−log D(z) − log(1 − D(z_fake)), mean over the batch; D gives logits."""
    return (softplus(-D(z)) + softplus(D(z_fake))).mean()


def L_Q(D, z_fake):
    """−log D(z_fake), mean over the batch."""
    return softplus(-D(z_fake)).mean()


def balance(l_D, l_Q):
    """Seed 004's rule, on the last batch's losses: who trains, D and Q. Its l_D is half of L_D; log 2 = 0.69 is guessing."""
    return l_Q < 0.95 or l_D / 2 > 0.45, l_D / 2 < 0.95 or l_Q > 0.45


def train_step(nets, opts, x, y, config, before):
    """The three phases on x (B, X), y (B, K); before: the LOSSES of the last batch. Returns this one's."""
    Q, P, D = nets["Q"], nets["P"], nets["D"]
    nets.train()

    # Reconstruction
    loss_rec = L_rec(P(torch.cat([Q(x), y], 1)), x, config.loss)
    opts["P"].zero_grad(), opts["Q_rec"].zero_grad()
    loss_rec.backward()
    opts["P"].step(), opts["Q_rec"].step()
    if not config.lr_Q:
        return torch.stack([loss_rec.detach()] + [torch.zeros_like(loss_rec)] * 4)
    trains_D, trains_Q = balance(*before[1:3].tolist()) if config.balance else (True, True)

    # Discriminator
    z, z_fake = torch.cat([p(len(x), config, x.device, y), y], 1), torch.cat([Q(x), y], 1)  # (B, Z + K)
    with torch.no_grad():
        z_shown = torch.cat([Q.eval()(x), y], 1) if config.q_eval else z_fake.detach()
    Q.train()
    with torch.set_grad_enabled(trains_D):
        loss_D = L_D(D, z, z_shown)
    if trains_D:
        opts["D"].zero_grad()
        loss_D.backward()
        opts["D"].step()

    # Generator
    with torch.set_grad_enabled(trains_Q):
        loss_Q = L_Q(D, z_fake)
    if trains_Q:
        opts["Q_reg"].zero_grad()
        loss_Q.backward(inputs=list(Q.parameters()))
        opts["Q_reg"].step()
    return torch.stack([loss_rec.detach(), loss_D.detach(), loss_Q.detach(), *loss_rec.new_tensor([trains_D, trains_Q])])


LOSSES = ("train/L_rec", "train/L_D", "train/L_Q", "train/trains_D", "train/trains_Q")  # the last two: share of batches


def start(config, shape, K, device):
    """The nets and their optimizers; Q has two, one for each of its roles."""
    nets = build(config, shape, K).to(device)

    def adam(net, lr):
        return torch.optim.Adam(net.parameters(), lr, (config.beta1, 0.999), fused=True)
    return nets, {"Q_rec": adam(nets["Q"], config.lr), "P": adam(nets["P"], config.lr),
                  "D": adam(nets["D"], config.lr_D), "Q_reg": adam(nets["Q"], config.lr_Q)}


def maps(nets, config, shape, K, device):
    """What shared.evaluate and shared.draw look at. The classes stand behind the pixels and codes, in K columns."""
    X = math.prod(shape)

    def net(name, x, end=None):
        return nets.eval()[name][:end](x)

    def prior(n, seed=0, y=None):
        generator = torch.Generator().manual_seed(seed)
        if y is None:
            y = one_hot(torch.arange(n) % K, K).float() if K else torch.empty(n, 0)  # row by row through the classes
        return torch.cat([p(n, config, "cpu", y, generator), y], 1).to(device)
    return {"encode": lambda x: torch.cat([net("Q", x[:, :X]), x[:, X:]], 1), "decode": lambda z: net("P", z).sigmoid(),
            "prior": prior, "short": lambda x: net("Q", x[:, :X]),
            "long": lambda x: net("Q", x[:, :X], -1 if config.net == "dense" else -2).flatten(1)}


def sliced_wasserstein(a, b, directions=200):
    """Mean over random directions of the 1-Wasserstein distance between the projections of a and b (N, Z); in units of z."""
    theta = normalize(torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(0)), dim=0).to(a)
    return ((a @ theta).sort(0).values - (b @ theta).sort(0).values).abs().mean().item()


def prior_gap(seen, codes, Z, draws=4):
    """Sliced Wasserstein distance of the codes (N, Z + K) to N draws of the prior for their classes, if K > 0, and of draws
    to each other: the floor."""
    z = [seen["prior"](len(codes), 1 + i, codes[:, Z:].cpu())[:, :Z] for i in range(2 * draws)]
    gap, floor = (sum(sliced_wasserstein(a, b) for a, b in zip(ways, z[1::2])) / draws for ways in ([codes[:, :Z]] * draws, z[::2]))
    return {"eval/prior_gap": gap, "eval/prior_gap_floor": floor}


def look(config, data, seen, full):
    """The contract's metrics, and the prior gap of the test images' codes and of as many training images'."""
    train, test = (prior_gap(seen, shared.in_chunks(seen["encode"], x[:len(data[2])]), config.latent_dim)
                   for x in (data[0], data[2]))
    return shared.evaluate(config, data, seen, full) | test | {"eval/prior_gap_train": train["eval/prior_gap"]}


def sheet(seen, Z, K, n, third=None):
    """P on an n×n grid of z₁ (to the right) and z₂ (up), evenly over the quantiles of p(z), else 0, z₃ at the quantile
    `third`; for each of K classes beside the next, five in a row. Images (·, X), and how many in a row."""
    z = seen["prior"](10_000)[:, :Z]
    levels = torch.linspace(0.02, 0.98, n, device=z.device)
    codes = torch.zeros(max(K, 1), n, n, Z + K, device=z.device)
    codes[..., 0], codes[..., 1] = z[:, 0].quantile(levels), z[:, 1].quantile(levels.flip(0))[:, None]
    if third is not None:
        codes[..., 2] = z[:, 2].quantile(third)
    codes[..., Z:] = torch.eye(K, device=z.device)[:, None, None] if K else 0
    columns = min(5, max(K, 1))
    codes = codes.unflatten(0, (-1, columns)).transpose(1, 2)  # (rows, n, columns, n, Z + K)
    return shared.in_chunks(seen["decode"], codes.flatten(0, 3)), columns * n


@torch.no_grad()
def draw(run, data, seen, config, K):
    """shared.draw's pictures, and what is the AAE's own: codes beside the prior, their quantiles, grids over z, styles."""
    (_, _, u, v, shape), Z = data, config.latent_dim
    title = f"{'AAE' if config.lr_Q else 'autoencoder'}, {config.net}{', labels' * (K > 0)}, {config.prior} prior"
    shared.draw(run, data, seen, {"L_rec": LOSSES[:1], "adversarial losses": LOSSES[1:3], "prior gap": [
        "eval/prior_gap", "eval/prior_gap_floor"], "LeNet-FID": ["eval/fid"]}, title)
    title, codes = f"{title}, epoch {run.done}", shared.in_chunks(seen["short"], u).cpu()
    z, y = seen["prior"](len(u)).cpu().split([Z, K], 1)

    levels = torch.linspace(0.01, 0.99, 99)
    axes = (figure := Figure(figsize=(4.5, 4.5), layout="constrained")).add_subplot(
        xlabel="quantile of p(z)", ylabel="quantile of the test codes", title=f"{title}:\nquantiles of each code dimension")
    for d in range(min(Z, 10)):
        axes.plot(z[:, d].quantile(levels), codes[:, d].quantile(levels), lw=1, label=f"$z_{{{d + 1}}}$")
    axes.axline((0, 0), slope=1, color="black", lw=0.8, ls=":"), axes.legend(fontsize=8), axes.grid(alpha=0.3)
    run.picture("quantiles", figure)

    if Z > 1:
        figure = Figure(figsize=(8, 4), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, what, points, classes in zip(panels, ("test codes", "p(z)"), (codes, z), (v, y.argmax(1) if K else None)):
            how = {"c": "grey"} if classes is None else {"c": classes.cpu(), "cmap": "tab10", "vmin": -0.5, "vmax": 9.5}
            dots = axes.scatter(*points[:, :2].T, s=2, **how)
            axes.set(xlabel="$z_1$", ylabel="$z_2$", title=what, aspect="equal")
            if axes is panels[0] and classes is not None:
                figure.colorbar(dots, ax=panels, ticks=range(10), label="class")
        figure.suptitle(title)
        run.picture("latent", figure)
        images, columns = sheet(seen, Z, K, 7 if K else 15)
        run.picture("manifold", shared.grid(images.unflatten(1, shape), columns, f"{title}: P on a grid over $z_1$ and $z_2$"))
    if K:
        style = torch.cat([codes[:10, None].expand(-1, K, -1), torch.eye(K).expand(len(codes[:10]), -1, -1)], 2).to(u)
        styled = seen["decode"](style.flatten(0, 1)).unflatten(0, (-1, K))
        pairs = torch.cat([u[:10, None, :math.prod(shape)], styled], 1)  # (10, 1 + K, X)
        run.picture("style", shared.grid(pairs.flatten(0, 1).unflatten(1, shape), 1 + K,
                                         f"{title}: test images, then their z with each class"))


def animate(run, seen, shape, Z, K, frames=24):
    """traversal.gif: the grid over z₁ and z₂, with z₃ as time, there and back."""
    from PIL import Image
    n, (c, _, w), sheets = 6 if K else 10, shape, []
    for level in torch.linspace(0.02, 0.98, frames // 2).tolist():
        images, columns = sheet(seen, Z, K, n, level)
        pixels = images.clamp(0, 1).mul(255).byte().cpu().view(-1, columns, *shape).permute(0, 3, 1, 4, 2) // 16 * 17
        pixels = pixels.reshape(-1, columns * w, c).numpy()
        sheets.append(Image.fromarray(pixels if c == 3 else pixels[..., 0]))
    sheets += sheets[-2:0:-1]
    run.animation("traversal", sheets, 120)


def load(config, device):
    """shared.load_vectors with the K classes in K columns behind the pixels; and K. Faces are 32×32."""
    (x, y, u, v, shape), K = shared.load_vectors(config, device, toys=False, size=32), 0
    if config.labels:
        if y is None:
            shared.fail(f"--labels: {config.dataset} has none")
        K = int(y.max()) + 1
        x, u = (torch.cat([images, one_hot(labels, K)], 1) for images, labels in ((x, y), (u, v)))
    return (x, y, u, v, shape), K


def main(config):
    device = shared.setup(config)
    checkpoint = shared.load_checkpoint(config.resume, Config) if config.resume else None
    if config.prior in ("gmm10", "swiss_roll") and config.latent_dim != 2:
        shared.fail(f"--latent-dim {config.latent_dim}: the prior {config.prior} has 2")
    data, K = load(config, device)
    x_train, shape = data[0], data[4]
    X, Z = math.prod(shape), config.latent_dim
    if config.smoke:
        config.epochs = min(config.epochs, 2)
    if Z > X:
        shared.fail(f"--latent-dim {Z} is larger than the data, {X} pixels")
    if (steps := len(x_train) // config.batch_size) == 0:
        shared.fail(f"--batch-size {config.batch_size} is larger than the data, {len(x_train)} images")

    nets, opts = start(config, shape, K, device)
    guessing = torch.tensor([0, 2 * math.log(2), math.log(2), 0, 0], device=device)  # seed 004: 0.69, anew in each epoch
    if config.benchmark:
        batch = x_train[:config.batch_size].split([X, K], 1)
        return shared.benchmark(lambda: train_step(nets, opts, *batch, config, guessing), config.batch_size, config)
    plateaus = [torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.2, patience=config.patience - 1, threshold=0.01)
                for opt in opts.values()]
    parts = {"nets": nets, **opts, **{f"plateau_{name}": plateau for name, plateau in zip(opts, plateaus)}}
    first, losses, last = 0, torch.zeros(len(LOSSES), device=device), guessing  # steps behind us in this epoch, their losses
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        first, losses, last = checkpoint["step"], checkpoint["losses"].to(device), checkpoint["last"].to(device)
    run = shared.Run(config, device, sum(p.numel() for p in nets.parameters()), checkpoint)
    seen = maps(nets, config, shape, K, device)

    def save(step):
        run.save("checkpoint.pt", step=step, losses=losses, last=last, **{k: part.state_dict() for k, part in parts.items()})

    if not checkpoint:
        gap = prior_gap(seen, shared.in_chunks(seen["encode"], data[2]), Z)
        run.log({"epoch": 0} | shared.untrained(config, data, seen) | gap | {"untrained/prior_gap": gap["eval/prior_gap"]})
    for epoch in range(run.done + 1, config.epochs + 1):
        order = torch.Generator(device).manual_seed(1_000_003 * config.seed + epoch)
        for step, i in enumerate(shared.batches(len(x_train), config.batch_size, order, skip=first), first + 1):
            last = train_step(nets, opts, *x_train[i].split([X, K], 1), config, last)
            losses += last
            run.tick(config.batch_size, losses[0] / step, config.epochs * steps)
            if run.stop:
                save(step)
                run.leave()
        row = {"epoch": epoch} | {name: run.finite(loss / steps) for name, loss in zip(LOSSES, losses)}
        if not config.lr_Q:
            row = {key: row[key] for key in ("epoch", "train/L_rec")}
        row["train/lr"] = opts["P"].param_groups[0]["lr"]
        for plateau in plateaus * (config.patience > 0):
            plateau.step(row["train/L_rec"])
        first, losses, last = 0, torch.zeros_like(losses), guessing
        if looked := epoch % config.eval_every == 0 or epoch == config.epochs:
            row |= look(config, data, seen, full=False)
        run.log(row)
        save(0)
        if looked:
            draw(run, data, seen, config, K)

    if Z > 2:
        animate(run, seen, shape, Z, K)
    run.save("model.pt", **{name: net.state_dict() for name, net in nets.items()})
    run.finish(**look(config, data, seen, full=True))


if __name__ == "__main__":
    main(shared.parse_config(Config))
