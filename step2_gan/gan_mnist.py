"""A GAN on MNIST (arXiv 1406.2661), and what makes it train: four losses, spectral normalization, and an Adam without momentum.

G: z → x generates from z ~ N(0, I); D's logits tell data from samples. D minimises its loss, then G minimises its own:

    minimax          D: softplus(−D(x)) + softplus(D(G(z)))     G: −softplus(D(G(z))), hence D's loss with the other sign
    non_saturating   the same D                                 G: softplus(−D(G(z)))          (1406.2661 §3)
    r1               D: … + γ/2 ‖∇ₓ D(x)‖²                      the same G                     (1801.04406 eq. 9; ALAE's)
    wgan_gp          D: D(G(z)) − D(x) + λ (‖∇ D(x̂)‖ − 1)²      G: −D(G(z)),  x̂ = ε x + (1 − ε) G(z), ε ~ U[0, 1]
                     and D takes five steps for each of G's                                    (1704.00028, algorithm 1)

    python step2_gan/gan_mnist.py                          # non-saturating, D with spectral normalization, 20 epochs
    python step2_gan/gan_mnist.py --loss r1
    python step2_gan/gan_mnist.py --net dcgan              # convolutions
    python step2_gan/gan_mnist.py --compare                # every loss, two seeds each, 5 epochs, lr 0.001
    python step2_gan/gan_mnist.py --resume runs/gan_mnist/NAME/checkpoint.pt --epochs 100

Result to expect (AMD EPYC, one core, 7 to 10 minutes; README has the tables): seeds 0 and 1: LeNet-FID 7.1 and 22.2, every
digit at least 7.9 % of 10,000 samples; a VAE (autoencoder_mnist.py --loss vae) after as many images: 145.2 ± 0.3.

Deviations from the papers:
 1. Adam 0.002, with R1 0.001, β = (0, 0.999): chosen on val, where DCGAN's (1511.06434) 2e-4, (0.5, 0.999) lost digits.
    R1's paper has RMSprop 1e-4; 0.002 diverged with R1 after six epochs (neither run is kept). WGAN-GP has its paper's 1e-4,
    but β₂ 0.999, not 0.9; so it has not been run.
 2. Without a penalty D gets spectral normalization (1802.05957), which came after these losses and with which 0.002 is
    stable. --norm none leaves it out: after the five epochs of --compare, at 0.001, it is even ahead; longer was not tried.
 3. z ~ N(0, I) with 50 dimensions, as in the other files; G has batch norm, D has none, which both penalties need.
 4. Samples come from an average of G's weights, as in PGGAN and ALAE (--eval-weights raw).
 5. --net dcgan is DCGAN's idea for 28×28: two strided convolutions each. Layers start as PyTorch has it, not at N(0, 0.02²).
 6. 1406.2661 itself has maxout and dropout in D, and SGD with momentum.
"""
import copy
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.nn.utils.parametrizations import spectral_norm

import shared
from shared import option

LOSS = ("minimax", "non_saturating", "r1", "wgan_gp")
VARIANTS = {"minimax": {"loss": "minimax", "norm": "none"}, "non-saturating": {"loss": "non_saturating", "norm": "none"},
            "non-saturating, spectral norm": {"loss": "non_saturating", "norm": "spectral"},
            "R1": {"loss": "r1", "norm": "none"}, "WGAN-GP": {"loss": "wgan_gp", "norm": "none"}}


@dataclass
class Config(shared.Protocol):
    epochs: int = option(20, "passes over the training images", low=1)
    batch_size: int = option(128, "images per step of D (1511.06434)", low=2)
    loss: str = option("non_saturating", "what D and G minimise", choices=LOSS)
    net: str = option("mlp", "G 50-1024-1024-784 and D 784-1024-1024-1, or convolutions", choices=("mlp", "dcgan"))
    norm: str = option("spectral", "of D's weights: to spectral norm 1 (1802.05957), or none", choices=("none", "spectral"))
    lr: float = option(0.002, "learning rate of Adam (chosen on val; r1: 0.001; wgan_gp: 0.0001, its paper's)", low=1e-9)
    beta1: float = option(0.0, "β₁ of Adam (ALAE's, chosen on val; β₂ = 0.999)", low=0, high=0.999)
    gamma: float = option(10.0, "weight γ of R1 (1801.04406)", low=0)
    gp_weight: float = option(10.0, "weight λ of WGAN-GP's penalty (1704.00028)", low=0)
    critic_steps: int = option(0, "steps of D for one of G; 0: 5 for wgan_gp (1704.00028), 1 for the others", low=0)
    latent_dim: int = option(50, "dimension of z", low=1)
    ema: float = option(10_000.0, "half-life, in images, of G's averaged weights (ALAE's: train_alae.py)", low=1)
    eval_weights: str = option("ema", "evaluate the averaged or the raw weights", choices=("raw", "ema"))
    eval_every: int = option(2, "epochs between evaluations, and pictures", low=1)
    compare: bool = option(False, "train with every loss, from --seed and the next, and compare them")
    resume: str = option("", "checkpoint.pt to go on from")
    benchmark: bool = option(False, "measure the speed of a training step, and stop")
    recipes = {("loss", "r1"): {"norm": "none", "lr": 0.001}, ("loss", "wgan_gp"): {"norm": "none", "lr": 0.0001},
               ("compare", True): {"epochs": 5, "lr": 0.001, "eval_every": 1}}


# B batch, Z = latent_dim, X = pixels (784), H = 1024

def build(config, shape):
    """G and D for images of a shape (C, S, S)."""
    Z, H, (C, S, _) = config.latent_dim, 1024, shape
    leaky, X, s = nn.LeakyReLU(0.2), C * S * S, S // 4
    if config.net == "mlp":
        G = nn.Sequential(nn.Linear(Z, H, bias=False), nn.BatchNorm1d(H), nn.ReLU(),
                          nn.Linear(H, H, bias=False), nn.BatchNorm1d(H), nn.ReLU(), nn.Linear(H, X), nn.Sigmoid())
        D = nn.Sequential(nn.Linear(X, H), leaky, nn.Linear(H, H), leaky, nn.Linear(H, 1))
    else:
        G = nn.Sequential(nn.Linear(Z, 128 * s * s, bias=False), nn.Unflatten(1, (128, s, s)), nn.BatchNorm2d(128), nn.ReLU(),
                          nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
                          nn.ConvTranspose2d(64, C, 4, 2, 1), nn.Sigmoid(), nn.Flatten())
        D = nn.Sequential(nn.Unflatten(1, shape), nn.Conv2d(C, 64, 4, 2, 1), leaky, nn.Conv2d(64, 128, 4, 2, 1), leaky,
                          nn.Flatten(), nn.Linear(128 * s * s, 1))
    for layer in D if config.norm == "spectral" else ():
        isinstance(layer, (nn.Linear, nn.Conv2d)) and spectral_norm(layer)
    return nn.ModuleDict({"G": G, "D": D})


def r1_penalty(real, x):
    """‖∇ₓ D(x)‖², mean over the batch, from D's logits `real` of x (arXiv 1801.04406)."""
    gradient, = torch.autograd.grad(real.sum(), x, create_graph=True)
    return gradient.square().sum(1).mean()


def gradient_penalty(D, x, x_fake, epsilon):
    """(‖∇ D(x̂)‖ − 1)² at x̂ = ε x + (1 − ε) x_fake, mean over the batch; ε (B, 1) (arXiv 1704.00028 eq. 3)."""
    x_hat = (epsilon * x + (1 - epsilon) * x_fake).detach().requires_grad_()
    gradient, = torch.autograd.grad(D(x_hat).sum(), x_hat, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()


def L_D(D, x, x_fake, config):
    """D's loss and its penalty, mean over the batch; x, x_fake (B, X)."""
    x = x.detach().requires_grad_(config.loss == "r1")
    real, fake, penalty = D(x), D(x_fake), torch.zeros((), device=x.device)
    if config.loss == "wgan_gp":
        epsilon = torch.rand(len(x), 1, device=x.device)
        return (fake - real).mean(), config.gp_weight * gradient_penalty(D, x, x_fake, epsilon)
    if config.loss == "r1":
        penalty = config.gamma / 2 * r1_penalty(real, x)
    return (softplus(-real) + softplus(fake)).mean(), penalty


def L_G(fake, loss):
    """G's loss from D's logits of samples, mean over the batch."""
    if loss == "wgan_gp":
        return -fake.mean()
    return -softplus(fake).mean() if loss == "minimax" else softplus(-fake).mean()


def train_step(nets, averaged, opt_D, opt_G, x, config):
    """A step of D on each batch in x (B or 5B, X), then one of G, and of its average. Returns the LOSSES."""
    G, D = nets["G"], nets["D"]
    for part in x.split(config.batch_size):
        with torch.no_grad():
            x_fake = G(torch.randn(len(part), config.latent_dim, device=x.device))
        loss_D, penalty = L_D(D, part, x_fake, config)
        opt_D.zero_grad()
        (loss_D + penalty).backward()
        opt_D.step()

    loss_G = L_G(D(G(torch.randn(config.batch_size, config.latent_dim, device=x.device))), config.loss)
    opt_G.zero_grad()
    loss_G.backward(inputs=list(G.parameters()))
    opt_G.step()
    update_ema(averaged, G, 0.5 ** (len(x) / config.ema))
    grad_G = torch.stack(torch._foreach_norm([p.grad for p in G.parameters()])).norm()
    return torch.stack([loss_D, loss_G, penalty, grad_G]).detach()


@torch.no_grad()
def update_ema(averaged, G, decay):
    """Parameters and batch statistics of G."""
    for a, b in ((averaged.parameters(), G.parameters()), (averaged.buffers(), G.buffers())):
        pairs = [pair for pair in zip(a, b) if pair[0].is_floating_point()]
        pairs and torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - decay)


LOSSES = ("train/L_D", "train/L_G", "train/penalty", "train/grad_norm_G")


def maps(parts, config, device):
    """What shared.evaluate and shared.draw look at."""
    G = parts["averaged"] if config.eval_weights == "ema" else parts["nets"]["G"]
    return {"decode": G, "prior": lambda n: torch.randn(n, config.latent_dim,
                                                        generator=torch.Generator().manual_seed(0)).to(device)}


def evaluate(parts, data, config):
    """LeNet-FID, and the digits that LeNet sees in 10,000 samples: share of each, KL(shares ‖ those of the test images)."""
    if config.dataset != "mnist":
        return {}
    seen, lenet = maps(parts, config, data[2].device), shared.lenet(data[2].device)
    parts["nets"].eval()
    samples = shared.in_chunks(seen["decode"], seen["prior"](1000 if config.smoke else 10_000)).unflatten(1, data[4])
    parts["nets"].train()
    x = data[2].unflatten(1, data[4])
    shares, target = (shared.judge(images, lenet).argmax(1).bincount(minlength=10).cpu().double() / len(images)
                      for images in (samples, x))
    row = {"eval/fid": shared.fid(x, samples)}
    row |= {"eval/digit_kl": torch.special.xlogy(shares, shares / target).sum().item(),
            "eval/digit_min": 100 * shares.min().item()}
    return row | {f"eval/digit_{i}": 100 * share for i, share in enumerate(shares.tolist())}


def start(config, shape, device):
    """Networks and optimizers, by their names in the checkpoint."""
    nets = build(config, shape).to(device)
    return {"nets": nets, "averaged": copy.deepcopy(nets["G"]).requires_grad_(False).eval()} | {
        f"opt_{name}": torch.optim.Adam(nets[name].parameters(), config.lr, (config.beta1, 0.999), fused=True) for name in "DG"}


def per_step(config):
    """Images that an iteration sees."""
    return config.batch_size * (config.critic_steps or (5 if config.loss == "wgan_gp" else 1))


def train(config, data, parts, run, done=0, first=0, losses=0, save=None):
    """Trains the parts from epoch `done` on, with `first` steps of the next behind us, and their losses; yields a row an
    epoch. save(step, losses) is called when the user interrupts. With --compare, a loss that turns NaN just ends it."""
    x_train, size = data[0], per_step(config)
    steps = len(x_train) // size
    total = config.epochs * steps * (2 * len(VARIANTS) if config.compare else 1)
    for epoch in range(done + 1, config.epochs + 1):
        order = torch.Generator(x_train.device).manual_seed(1_000_003 * config.seed + epoch)
        for step, i in enumerate(shared.batches(len(x_train), size, order, skip=first), first + 1):
            losses = losses + train_step(*parts.values(), x_train[i], config)
            run.tick(size, 0 if config.compare else losses[0] / step, total)
            if run.stop:
                save(step, losses)
        if config.compare and not losses.isfinite().all():
            return
        row = {"epoch": epoch} | {name: run.finite(loss / steps) for name, loss in zip(LOSSES, losses)}
        config.loss in ("r1", "wgan_gp") or row.pop("train/penalty")
        first, losses = 0, 0
        yield row | (evaluate(parts, data, config) if epoch % config.eval_every == 0 or epoch == config.epochs else {})


def verdict(row):
    """Whether samples have collapsed, in words: digits that are less than 1 % of them."""
    if "eval/digit_0" not in row:
        return "diverged"
    lost = [str(i) for i in range(10) if row[f"eval/digit_{i}"] < 1]
    return f"collapsed, hardly any sample is a {', '.join(lost)}" if lost else "not collapsed, every digit is there"


def comparison(rows, config, about):
    """A figure of each variant's rows: LeNet-FID, G's gradient, the digits' KL along the way, and the digits at the end."""
    panels = (figure := shared.Figure(figsize=(14, 3.6), layout="constrained")).subplots(1, 4)
    keys = {"eval/fid": "LeNet-FID", "train/grad_norm_G": "norm of G's gradient",
            "eval/digit_kl": "KL of the digits to the data's"}
    for of, run_rows in ((of, run_rows) for of, run_rows in rows.items() if run_rows):
        name, first = of.rsplit(", seed", 1)[0], of.endswith(f"seed {config.seed}")
        style = {"color": f"C{list(VARIANTS).index(name)}", "ls": "-" if first else "--", "label": name if first else None}
        for axes, key in zip(panels, keys):
            axes.plot(*zip(*((row["images"] / 1000, row[key]) for row in run_rows if key in row)), **style)
        if "eval/digit_0" in run_rows[-1]:
            panels[3].plot(range(10), [run_rows[-1][f"eval/digit_{i}"] for i in range(10)], marker="o", ms=3, **style)
    for axes, label in zip(panels, keys.values()):
        axes.set(yscale="log", xlabel="thousand images seen", ylabel=label), axes.grid(alpha=0.3)
    panels[3].set(xlabel="digit, by LeNet", ylabel="% of the samples", xticks=range(10)), panels[3].grid(alpha=0.3)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(VARIANTS), fontsize=9)
    figure.suptitle(f"A GAN with different losses: {about}; seed {config.seed}, and {config.seed + 1} dashed")
    return figure


def compare(config, data, device, run):
    """Trains the VARIANTS from two seeds; a line each, two pictures, and a row of all of them for each epoch."""
    rows, samples, verdicts = {}, [], {}
    for name, change in VARIANTS.items():
        for seed in (config.seed, config.seed + 1):
            torch.manual_seed(seed)
            variant, of = dataclasses.replace(config, **change, seed=seed), f"{name}, seed {seed}"
            parts = start(variant, data[4], device)
            size = per_step(variant)
            rows[of] = [row | {"images": row["epoch"] * (len(data[0]) // size * size)} for row in train(
                variant, data, parts, run, save=lambda *_: run.leave("start it again"))]
            verdicts[of] = verdict(rows[of][-1] if len(rows[of]) == config.epochs else {})
            print(f"{of}: {verdicts[of]}", flush=True)
        seen = maps(parts, variant, device)
        samples.append(shared.in_chunks(seen["decode"], seen["prior"](10)))
    for epoch in range(1, config.epochs + 1):
        run.log({"epoch": epoch} | {
            f"{of}/{key.split('/')[1]}": value for of in rows for row in rows[of] if row["epoch"] == epoch
            for key, value in row.items() if key.startswith("eval/") or key == "train/grad_norm_G"})

    about = f"{config.net}, {config.dataset} ({config.split}), {config.epochs} epochs, learning rate {config.lr}"
    run.picture("samples", shared.grid(torch.cat(samples).unflatten(1, data[4]), 10, f"{about}, seed {config.seed + 1}",
                                       [name.replace(", ", ",\n") for name in VARIANTS]))
    run.picture("compare", comparison(rows, config, about))
    run.finish(verdict="; ".join(f"{of}: {text}" for of, text in verdicts.items()))


def main(config):
    device = shared.setup(config)
    checkpoint = shared.load_checkpoint(config.resume, Config) if config.resume else None
    data = shared.load_vectors(config, device, toys=False)
    x_train, shape = data[0], data[4]
    if config.smoke:
        config.epochs, config.batch_size = min(config.epochs, 2), min(config.batch_size, 64)
    if config.compare and config.dataset != "mnist":
        shared.fail(f"--compare counts digits: it needs --dataset mnist, not {config.dataset}")
    if per_step(config) > len(x_train):
        shared.fail(f"--batch-size {config.batch_size}: a step needs {per_step(config)} images of {len(x_train)}")

    parts = start(config, shape, device)
    nets = parts["nets"]
    if config.benchmark:
        return shared.benchmark(lambda: train_step(*parts.values(), x_train[:per_step(config)], config),
                                per_step(config), config)
    first, losses = 0, torch.zeros(len(LOSSES), device=device)
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        first, losses = checkpoint["step"], checkpoint["losses"].to(device)
    run = shared.Run(config, device, sum(p.numel() for p in nets.parameters()), checkpoint)
    if config.compare:
        return compare(config, data, device, run)

    def save(step, losses):
        run.save("checkpoint.pt", step=step, losses=losses, **{name: part.state_dict() for name, part in parts.items()})
        run.stop and run.leave()

    if not checkpoint:
        run.log({"epoch": 0} | evaluate(parts, data, config))
    for row in train(config, data, parts, run, run.done, first, losses, save):
        run.log(row)
        save(0, torch.zeros_like(losses))
        if row["epoch"] % config.eval_every == 0 or row["epoch"] == config.epochs:
            nets.eval()
            shared.draw(run, data, maps(parts, config, device), {
                "loss": LOSSES[:3], "norm of G's gradient": LOSSES[3:], "LeNet-FID": ["eval/fid"],
                "smallest share of a digit, %": ["eval/digit_min"]}, f"GAN ({config.loss}, {config.net})")
            nets.train()
    run.save("model.pt", D=nets["D"].state_dict(), G=maps(parts, config, device)["decode"].state_dict())
    text = verdict(run.summary) if config.dataset == "mnist" else ""
    run.finish(**({"verdict": text} if text else {}))
    print(text)


if __name__ == "__main__":
    main(shared.parse_config(Config))
