"""Adversarial Latent Autoencoder (ALAE), arXiv 2004.04467: the official fully connected MNIST model, distilled.

Four maps: F: z → w, G: w → x, E: x → w, D: w → ℝ. G∘F is a generator, D∘E its critic, and E inverts G on the latents w,
so that the reconstruction G(E(x)) never compares pixels. Algorithm 1 of the paper, each step on fresh z ~ N(0, I):

    I.   E, D   minimise  L_adv^{E,D} = softplus(D(E(G(F(z))))) + softplus(−D(E(x))) + γ/2 ‖∇ₓ D(E(x))‖²    (R1)
    II.  F, G   minimise  L_adv^{F,G} = softplus(−D(E(G(F(z)))))
    III. E, G   minimise  L_err^{E,G} = ‖F(z) − E(G(F(z)))‖²

    python step3_official_alae/train_fc_alae.py --eval assets/fc_alae.pt             # the trained model, in under a minute
    python step3_official_alae/train_fc_alae.py                                      # the official setting, 20 epochs
    python step3_official_alae/train_fc_alae.py --recipe fast                        # ours (deviation 8), 50 epochs
    python step3_official_alae/train_fc_alae.py --epochs 600                         # the official length
    python step3_official_alae/train_fc_alae.py --resume runs/train_fc_alae/NAME/checkpoint.pt --epochs 100

Result to expect (averaged weights, test images, one core of an AMD EPYC; README has the tables): official, 20 epochs, 11
minutes, seeds 0 to 2: MSE 0.029 ± 0.002, SVM on short / long features 87.9 ± 0.8 / 97.5 ± 0.2 %, identity 88.4 ± 0.3 %; 100
epochs, seed 0: 0.0202, 90.8 / 98.1 %, 92.1 %. Recipe fast, 37 minutes, seed 0: 0.0204, 93.8 / 98.9 %, 95.3 %, LeNet-FID 3.4;
its model_half.pt is assets/fc_alae.pt.

Deviations from the paper (P) or the official code (O, github.com/podgorskiy/ALAE, mnist_fc.yaml):
 1. P: "Adam"; O and here: LREQAdam, Adam with β1 = 0 whose step is multiplied by each layer's He constant (see below).
 2. P: Step III updates E and G; O and here: its optimizers hold D and F as well. F moves (only the target w is
    detached); D gets zero gradients, which halve its second moment and so make its steps √2 larger.
 3. O: the main branch trains on x ∈ [−1, 1]; here [0, 1] (--input-range), as in O's branch for the paper's MNIST
    section. That branch also has leaky slope 0.01 in G and on E's output (--slope).
 4. O: 400 to 600 epochs; here 20 by default, which fit a CPU.
 5. O: D has 50 outputs, of which the first is used; here it has that one.
 6. O: the averaged weights start at a second random initialization; here at the first. Forgotten within an epoch.
 7. O: features for the classifiers come from the raw weights, pictures from the averaged; here both come from
    --eval-weights, ema by default.
 8. --recipe fast, chosen on val (results/paper_table/ablation.md). Adam with β1 = 0 moves a weight by about lr·c a step
    whatever the loss, so what counts is lr times steps: four times the lr on half the batch, falling to 0 over the second
    half (no gain shown). G ends in a sigmoid: a linear layer has to cancel 1024 hidden units in every black pixel, which is
    the speckle. L_err weighs a tenth: its scale matters because it shares its moments with L_adv.
"""
import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn
from torch.nn.functional import softplus

import shared
from shared import option


@dataclass
class Config(shared.Protocol):
    epochs: int = option(20, "passes over the training images (mnist_fc.yaml: 600)", low=1)
    batch_size: int = option(128, "images per step (mnist_fc.yaml)", low=1)
    lr: float = option(0.002, "learning rate, constant (mnist_fc.yaml)", low=1e-9)
    latent_dim: int = option(50, "dimension of z and of w (paper §6.1)", low=1)
    gamma: float = option(10.0, "weight γ of R1 (paper, algorithm 1)", low=0)
    err_weight: float = option(1.0, "weight of L_err in Step III (algorithm 1: 1)", low=0)
    ema: float = option(10_000.0, "half-life, in images, of the averaged weights (train_alae.py)", low=1)
    input_range: str = option("01", "pixels in [0, 1] (branch mnist_ref) or [−1, 1] (main branch)", choices=("01", "11"))
    slope: float = option(0.2, "leaky slope in G and on E's output (net.py; branch mnist_ref: 0.01)", low=0, high=1)
    recipe: str = option("official", "official: mnist_fc.yaml; fast: ours (deviation 8)", choices=("official", "fast"))
    decay: float = option(0.0, "share of the training, at its end, in which lr falls linearly to 0 (ours)", low=0, high=1)
    mapping: str = option("mlp", "F: six layers after pixel norm, or pixel norm alone", choices=("mlp", "identity"))
    critic: str = option("linear", "D: a product of matrices, as official, or with leaky ReLU between", ("linear", "mlp"))
    output: str = option("linear", "G's output: linear, as official, or bounded by a sigmoid or tanh", ("linear", "bounded"))
    eval_weights: str = option("ema", "evaluate the averaged or the raw weights", choices=("raw", "ema"))
    eval_every: int = option(5, "epochs between cheap evaluations, and pictures", low=1)
    references: bool = option(False, "score raw pixels and the untrained encoder too, for the tables (a minute)")
    resume: str = option("", "checkpoint.pt to go on from")
    eval: str = option("", "model.pt or checkpoint.pt to evaluate and draw, without training")
    benchmark: bool = option(False, "measure the speed of a training step, and stop")
    recipes = {("recipe", "fast"): {"epochs": 50, "batch_size": 64, "lr": 0.008, "decay": 0.5, "err_weight": 0.1, "output": "bounded"}}


# B batch, Z = W = latent_dim, X = pixels (784), H = 1024

class Linear(nn.Linear):
    """Linear layer with the official equalized learning rate (lreq.py): weights start at N(0, gain²/fan_in), and
    LREQAdam multiplies the steps of weight and bias by the coefficients noted here."""

    def __init__(self, fan_in, fan_out, lrmul=1.0, gain=math.sqrt(2)):
        super().__init__(fan_in, fan_out)
        nn.init.normal_(self.weight, std=gain / math.sqrt(fan_in))
        nn.init.zeros_(self.bias)
        self.weight.lr_equalization_coef = gain / math.sqrt(fan_in) * lrmul
        self.bias.lr_equalization_coef = lrmul


class PixelNorm(nn.Module):
    def forward(self, z):
        return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)


def build(config, X):
    """F, G, E, D as nn.Sequential."""
    Z, H, leaky, leaky_out = config.latent_dim, 1024, nn.LeakyReLU(0.2), nn.LeakyReLU(config.slope)
    bound = [nn.Sigmoid() if config.input_range == "01" else nn.Tanh()] * (config.output == "bounded")
    between = [leaky] * (config.critic == "mlp")
    F = nn.Sequential(PixelNorm(), *(layer for _ in range(6 * (config.mapping == "mlp"))
                                     for layer in (Linear(Z, Z, lrmul=0.1), leaky)))
    G = nn.Sequential(Linear(Z, H), leaky_out, Linear(H, H), leaky_out, Linear(H, X), *bound)
    E = nn.Sequential(Linear(X, H), leaky, Linear(H, H), leaky, Linear(H, Z), leaky_out)
    D = nn.Sequential(*(layer for _ in range(2) for layer in (Linear(Z, Z, lrmul=0.1), *between)), Linear(Z, 1, lrmul=0.1))
    return nn.ModuleDict({"F": F, "G": G, "E": E, "D": D})


class LREQAdam(torch.optim.Adam):
    """The official optimizer (custom_adam.py): with g the gradient of w and c its lr_equalization_coef,

        v ← β2 v + (1 − β2) g²,    w ← w − lr c √(1 − β2^t) g / (√v + ε)

    That is torch's Adam with β1 = 0 and a learning rate lr·c for each c, but for ε, which torch adds after the bias
    correction of √v; ε/√(1 − β2^t) undoes that. The fused kernel makes one pass over the weights.
    """

    def __init__(self, params, lr, beta2=0.99, eps=1e-8):
        groups = {}
        for p in params:
            groups.setdefault(p.lr_equalization_coef, []).append(p)
        super().__init__([{"params": ps, "lr": lr * c, "c": c, "t": 0} for c, ps in groups.items()], lr, (0.0, beta2), eps,
                         fused=True)

    def step(self):
        for group in self.param_groups:
            group["t"] += 1
            group["eps"] = self.defaults["eps"] / math.sqrt(1 - group["betas"][1] ** group["t"])
        super().step()


def L_adv_ED(D, E, x, x_fake, gamma):
    """softplus(D(E(x_fake))) + softplus(−D(E(x))) + γ/2 ‖∇ₓ D(E(x))‖², mean over the batch, and its last term."""
    x = x.detach().requires_grad_()
    real, fake = D(E(x)), D(E(x_fake))  # (B, 1)
    gradient, = torch.autograd.grad(real.sum(), x, create_graph=True)  # (B, X)
    r1 = gamma / 2 * gradient.square().sum(1).mean()
    return (softplus(fake) + softplus(-real)).mean() + r1, r1


def L_adv_FG(D, E, x_fake):
    """softplus(−D(E(x_fake))), mean over the batch."""
    return softplus(-D(E(x_fake))).mean()


def L_err_EG(E, G, w):
    """‖w − E(G(w))‖², mean over batch and dimensions; the target w is detached, the input is not (official code)."""
    return (w.detach() - E(G(w))).square().mean()


def train_step(nets, opt_ED, opt_FG, x, config):
    """One iteration of algorithm 1 on x (B, X). Returns detached losses."""
    F, G, E, D = nets["F"], nets["G"], nets["E"], nets["D"]
    ED, FG, EFG = ([p for net in group for p in net.parameters()] for group in ((E, D), (F, G), (E, F, G)))
    z_I, z_II, z_III = torch.randn(3, len(x), config.latent_dim, device=x.device)  # (B, Z) each

    # Step I: the critic D∘E tells data from samples.
    with torch.no_grad():
        x_fake = G(F(z_I))
    opt_ED.zero_grad()
    loss_ED, r1 = L_adv_ED(D, E, x, x_fake, config.gamma)
    loss_ED.backward(inputs=ED)
    opt_ED.step()

    # Step II: the generator G∘F moves against it.
    opt_FG.zero_grad()
    loss_FG = L_adv_FG(D, E, G(F(z_II)))
    loss_FG.backward(inputs=FG)
    opt_FG.step()

    # Step III: E inverts G, on latents.
    opt_ED.zero_grad(), opt_FG.zero_grad()
    loss_err = L_err_EG(E, G, F(z_III))
    (config.err_weight * loss_err).backward(inputs=EFG)
    for p in D.parameters():  # zeros, not None: its second moment decays (deviation 2)
        p.grad = torch.zeros_like(p)
    opt_ED.step(), opt_FG.step()
    return torch.stack([loss_ED, loss_FG, loss_err, r1]).detach()


def set_rate(optimizers, config, done):
    """The learning rate after the share `done` of the training."""
    lr = config.lr * min(1.0, (1 - done) / config.decay) if config.decay else config.lr
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = lr * group["c"]


LOSSES = ("train/L_adv_ED", "train/L_adv_FG", "train/L_err_EG", "train/r1")


@torch.no_grad()
def update_ema(averaged, nets, decay):
    torch._foreach_lerp_(list(averaged.parameters()), list(nets.parameters()), 1 - decay)


def to_x(x, config):
    """Pixels in [0, 1] → the range that the networks see."""
    return x * 2 - 1 if config.input_range == "11" else x


def maps(nets, config, device):
    """What shared.evaluate and shared.draw look at; all of it in pixels in [0, 1]."""
    F, G, E = nets["F"], nets["G"], nets["E"]

    def prior(n):
        z = torch.randn(n, config.latent_dim, generator=torch.Generator().manual_seed(0))
        return shared.in_chunks(F, z.to(device))
    return {"encode": lambda x: E(to_x(x, config)), "decode": lambda w: (G(w) + 1) / 2 if config.input_range == "11" else G(w),
            "prior": prior, "short": lambda x: E(to_x(x, config)), "long": lambda x: E[:4](to_x(x, config))}


def load_model(path, config=None):
    """The networks F, G, E, D of a model.pt, or of a checkpoint.pt by its --eval-weights, and the config."""
    saved = shared.load_checkpoint(path, Config)
    config = config or Config(**saved["config"])
    state = saved.get({"ema": "averaged", "raw": "nets"}[config.eval_weights]) or {
        f"{name}.{key}": value for name in "FGED" for key, value in saved[name].items()}
    nets = build(config, state["E.0.weight"].shape[1])
    nets.load_state_dict(state)  # half precision becomes single
    return nets, config


def start(config, X, device):
    """Networks, their averages and optimizers, by their names in the checkpoint."""
    nets = build(config, X).to(device)
    return {"nets": nets, "averaged": copy.deepcopy(nets).requires_grad_(False),
            "opt_ED": LREQAdam([*nets["E"].parameters(), *nets["D"].parameters()], config.lr),
            "opt_FG": LREQAdam([*nets["F"].parameters(), *nets["G"].parameters()], config.lr)}


def benchmark(config, x_train, steps=300):
    """Prints the speed of train_step at --matmul highest and as configured, next to that of one matrix product."""
    import resource
    device, B, X, Z, H = x_train.device, config.batch_size, x_train.shape[1], config.latent_dim, 1024
    e, f, d = X * H + H * H + H * Z, 6 * Z * Z, 2 * Z * Z + Z  # multiply-accumulates of E (or G), F, D for one image
    macs = (f + e) + 5 * (e + d) + 2 * (2 * e - X * H + 2 * d)  # I: samples; critic and R1; their gradients, not for x
    macs += 3 * (f + e) + 2 * (e + d) + 3 * (f + 2 * e)  # II; III

    def milliseconds(function, n):
        times = [time.perf_counter()]
        for _ in range(n):
            function()
            device.type == "cuda" and torch.cuda.synchronize()
            times.append(time.perf_counter())
        return 1e3 * torch.tensor(times, dtype=torch.float64).diff()[n // 10:].median().item()  # without the first tenth

    torch.set_float32_matmul_precision("highest")
    a, b = torch.randn(128, 1024, device=device), torch.randn(1024, 1024, device=device)
    mm = 2e-6 * 128 * 1024 ** 2 / milliseconds(lambda: torch.mm(a, b), 500)  # GFLOP/s
    print(f"torch.mm, 128×1024 by 1024×1024, highest: {mm:.0f} GFLOP/s")
    for mode in ("highest", config.matmul):
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision(mode)
        parts, losses = start(config, X, device), []
        order = shared.batches(len(x_train), B, torch.Generator(device).manual_seed(config.seed))

        def step():
            losses.append(train_step(parts["nets"], parts["opt_ED"], parts["opt_FG"], x_train[next(order)], config))
            update_ema(parts["averaged"], parts["nets"], 0.5 ** (B / config.ema))
        ms = milliseconds(step, min(steps, len(x_train) // B))
        means = ", ".join(f"{name} {v:.4f}" for name, v in zip(LOSSES, torch.stack(losses).mean(0).tolist()))
        print(f"--matmul {mode}: {ms:.1f} ms per iteration, {1e3 * B / ms:.0f} images/s, {2e-6 * macs * B / ms:.0f} GFLOP/s, "
              f"{2e-6 * macs * B / ms / mm:.2f} times torch.mm's; means over {len(losses)} steps: {means}")
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
    print(f"{macs / 1e6:.1f} M multiply-accumulates per image and iteration; peak memory {peak:.0f} MiB")


PANELS = {"adversarial losses": [LOSSES[i] for i in (0, 1, 3)], "L_err_EG": LOSSES[2:3], "reconstruction MSE":
          ["eval/recon_mse"], "1-NN accuracy on E(x), %": ["eval/knn_acc_short"], "LeNet-FID": ["eval/fid"],
          "identity, %": ["eval/identity"]}


@torch.no_grad()
def draw(run, data, seen, nets, config):
    """shared.draw's pictures, and what is ALAE's own: ways in z, and along the principal directions of w."""
    shared.draw(run, data, seen, PANELS, "FC ALAE")
    device, n = data[0].device, min(8, config.latent_dim)
    z = torch.randn(16, 1, config.latent_dim, generator=torch.Generator().manual_seed(0)).to(device)
    t, w = torch.linspace(0, 1, 11, device=device)[:, None], seen["prior"](10_000)
    values, axes = (t.to(device) for t in torch.linalg.eigh(torch.cov(w.T).reshape(w.shape[1], -1).cpu()))  # ascending
    steps = (5 * t - 2.5) * values.flip(0)[:n, None, None].clamp(min=0).sqrt() * axes.T.flip(0)[:n, None]  # (n, 11, W)
    for name, codes, what, rows in (
            ("interpolations_z", nets["F"](((1 - t) * z[:8] + t * z[8:]).flatten(0, 1)), "G∘F on the way between two z", ()),
            ("traversals", (seen["encode"](data[2][:1]) + steps).flatten(0, 1), "from a test image's w (centre) along the\n"
             "principal directions of w = F(z), ±2.5 standard deviations", [f"direction {i + 1}" for i in range(n)])):
        run.picture(name, shared.grid(seen["decode"](codes).unflatten(1, data[4]), 11,
                                      f"FC ALAE, epoch {run.done}: {what}", rows))


def animate(run, frames, shape):
    """samples.gif: samples of the same z after up to 32 of the epochs of frames {epoch: uint8 (64, X)}, in 16 greys."""
    from PIL import Image, ImageDraw
    (c, h, w), epochs, sheets = shape, list(frames), []
    for epoch in dict.fromkeys(epochs[round(i)] for i in torch.linspace(0, len(epochs) - 1, 32).tolist()):
        sheet = frames[epoch].view(8, 8, *shape).permute(0, 3, 1, 4, 2).reshape(8 * h, 8 * w, c).expand(-1, -1, 3) // 16 * 17
        sheets.append(Image.new("RGB", (16 * w, 16 * h + 24)))
        sheets[-1].paste(Image.fromarray(sheet.numpy()).resize((16 * w, 16 * h), Image.NEAREST))
        ImageDraw.Draw(sheets[-1]).text((8, 16 * h + 6), f"epoch {epoch}", "white")
    run.animation("samples", sheets, [250] * (len(sheets) - 1) + [3000])


def show(config, device, data):
    """--eval: a run's pictures and final metrics, from its file."""
    nets, past = load_model(config.eval, config)[0].to(device), shared.load_checkpoint(config.eval, Config)["run"]
    if (X := nets["E"][0].in_features) != data[0].shape[1]:
        shared.fail(f"{config.eval} is for images of {X} pixels, not {data[0].shape[1]}")
    run, seen = shared.Run(config, device, sum(p.numel() for p in nets.parameters())), maps(nets, config, device)
    run.at |= {key: past[key] for key in ("images", "done", "rows")}
    draw(run, data, seen, nets, config)
    run.at["rows"] = []  # the training's: what follows is of the data at hand
    run.finish(**shared.evaluate(config, data, seen, full=True))


def main(config):
    device = shared.setup(config)
    checkpoint = shared.load_checkpoint(config.resume, Config) if config.resume else None
    data = shared.load_vectors(config, device, toys=False)
    if config.eval:
        return show(config, device, data)
    x_train, X = to_x(data[0], config), data[0].shape[1]
    if config.smoke:
        config.epochs = min(config.epochs, 2)
    if config.latent_dim > X:
        shared.fail(f"--latent-dim {config.latent_dim} is larger than the data, {X} pixels")
    if (steps := len(x_train) // config.batch_size) == 0:
        shared.fail(f"--batch-size {config.batch_size} is larger than the data, {len(x_train)} images")

    if checkpoint and config.decay and config.epochs != checkpoint["config"]["epochs"]:
        shared.fail(f"--epochs {config.epochs}: the learning rate falls towards epoch {checkpoint['config']['epochs']} (--decay)")
    if config.benchmark:
        return benchmark(config, x_train)
    parts = start(config, X, device)
    nets, averaged, opt_ED, opt_FG = parts.values()
    first, losses = 0, torch.zeros(len(LOSSES), device=device)  # steps behind us in this epoch, and their losses
    frames = {}  # of the animation
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        first, losses, frames = checkpoint["step"], checkpoint["losses"].to(device), checkpoint["frames"]
    evaluated = averaged if config.eval_weights == "ema" else nets
    seen = maps(evaluated, config, device)
    run = shared.Run(config, device, sum(p.numel() for p in nets.parameters()), checkpoint)

    def save(step):
        run.save("checkpoint.pt", step=step, losses=losses, frames=frames, **{k: part.state_dict() for k, part in parts.items()})

    def photograph():
        frames[run.done] = shared.in_chunks(seen["decode"], seen["prior"](64)).clamp(0, 1).mul(255).byte().cpu()

    if not checkpoint:
        run.log({"epoch": 0} | shared.untrained(config, data, seen))
        photograph()
    for epoch in range(run.done + 1, config.epochs + 1):
        order = torch.Generator(device).manual_seed(1_000_003 * config.seed + epoch)
        for step, i in enumerate(shared.batches(len(x_train), config.batch_size, order, skip=first), first + 1):
            set_rate((opt_ED, opt_FG), config, (epoch - 1 + (step - 1) / steps) / config.epochs)
            losses += train_step(nets, opt_ED, opt_FG, x_train[i], config)
            update_ema(averaged, nets, 0.5 ** (config.batch_size / config.ema))
            run.tick(config.batch_size, losses[0] / step, config.epochs * steps)
            if run.stop:
                save(step)
                run.leave()
        row = {"epoch": epoch} | {name: run.finite(loss / steps) for name, loss in zip(LOSSES, losses)}
        first, losses = 0, torch.zeros_like(losses)
        if looked := epoch % config.eval_every == 0 or epoch == config.epochs:
            row |= shared.evaluate(config, data, seen, full=False)
        run.log(row)
        if looked or epoch <= 20:
            photograph()
        save(0)
        if looked:
            draw(run, data, seen, evaluated, config)

    animate(run, frames, data[4])
    run.save("model.pt", **{name: net.state_dict() for name, net in evaluated.items()})
    run.save("model_half.pt", **{name: copy.deepcopy(net).half().state_dict() for name, net in evaluated.items()})
    run.finish(**shared.evaluate(config, data, seen, full=True))


if __name__ == "__main__":
    main(shared.parse_config(Config))
