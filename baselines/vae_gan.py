"""VAE-GAN, "Autoencoding beyond pixels using a learned similarity metric" (arXiv 1512.09300), in the two forms of the seeds.

A VAE whose reconstructions x̃ = Dec(z), z ~ q(z | x) = N(μ, diag s²), (μ, log s²) = Enc(x), are compared with x not pixel by
pixel but in the features Dis_l of a discriminator Dis, which in turn tells x from x̃ and from samples x_p = Dec(z_p):

    L_prior = KL(q(z | x) ‖ N(0, I))                                                          (eq. 4)
    L_llike = ‖Dis_l(x) − Dis_l(x̃)‖², Gaussian with identity covariance                       (eqs. 7, 8)
    L_GAN   = −log Dis(x) − log(1 − Dis(x̃)) − log(1 − Dis(x_p)),  z_p ~ N(0, I)               (eq. 10, and deviation 1)
    Algorithm 1: Enc minimises L_prior + L_llike, Dec γ L_llike − L_GAN, Dis L_GAN, all at the same parameters.

    python baselines/vae_gan.py                                   # on a CPU small nets and images, on a GPU the seed's
    python baselines/vae_gan.py --method vae                      # a VAE with the same Enc and Dec, to compare
    python baselines/vae_gan.py --width 1 --image-size 64 --epochs 25                 # seed 001 (30 for --dataset cifar10)
    python baselines/vae_gan.py --recipe seed003 --dataset celeba --width 1 --image-size 64 --epochs 13
    python baselines/vae_gan.py --width 1 --image-size 64 --epochs 1 --max-steps 300  # LeNet-FID after 300 iterations
    python baselines/vae_gan.py --width 1 --image-size 64 --benchmark                 # beside seed 001's order of computation

Result to expect (test images, seed 0, one core of an AMD EPYC; README has the table): the default on a CPU, 11 minutes: MSE
0.0100, identity 97.9 %, LeNet-FID 122; the VAE of its size 0.0111, 97.2 %, 224. Full size, 300 iterations, 47 minutes with
two evaluations: LeNet-FID from 1141 to 262, identity 96.4 %. Speed: `results/benchmark_vae_gan.txt`.

Deviations from the paper (P) or the public code of seeds 001 (S1) and 003 (S3):
 1. P: eq. 5 has L_GAN as a log-likelihood, but algorithm 1 descends it for Dis: right for its negative, which we take.
 2. S1 first steps Dis, then runs it anew for the step of Dec, and then all three nets anew for that of Enc: ten forward
    passes of Dis, each net seeing the others' new weights. Here, as in algorithm 1 and S3, one pass serves all three.
 3. S1, S3: Dis ends in a sigmoid; here softplus(−l) = −log σ(l) of its logit l (S3 adds 1e-3 under the log).
 4. Samples, reconstructions and all that is measured come from BatchNorm's running statistics (eval mode); S1 leaves its
    nets in train mode. S3 steps Enc before Dec's backward through the same graph; here no weight moves before its last use.
 5. The data keep their size: images are enlarged for Enc and Dis batch by batch, and reduced again to be measured. Both
    bicubic (the way back antialiased), which changes the images least; S1 enlarges bilinearly. What the two ways make of the
    test images has a LeNet-FID of its own, the floor, `eval/fid_floor`.
 6. S3: weights start uniform in ±1/√(3 fan_in), biases at 0; here in both recipes as PyTorch has it, like S1.
 7. S3's code later added a second L_llike, of x_p; here are the formulas of its README, with its code's ½ before the sum.
 8. --method vae: p(x | z) = N(Dec(z), I), of pixels in [−1, 1] at --image-size: it minimises ½‖x − x̃‖² + KL per image.
 9. Without a GPU a quarter of the channels and 32×32 pixels by default; few epochs by default everywhere.
"""
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn
from torch.autograd import grad
from torch.nn.functional import interpolate, softplus

import shared
from shared import option


@dataclass
class Config(shared.Protocol):
    epochs: int = option(4, "passes over the training images (seed 001: 25 on MNIST, 30 on CIFAR-10)", low=1)
    max_steps: int = option(0, "iterations of an epoch at most (0: as many as there are batches)", low=0)
    batch_size: int = option(64, "images per iteration (paper §4, seed 001)", low=2)
    method: str = option("vae_gan", "VAE-GAN, or the VAE it is compared with", choices=("vae_gan", "vae"))
    recipe: str = option("seed001", "nets of seed 001 or 003; 003 changes the defaults below", choices=("seed001", "seed003"))
    width: float = option(0.0, "factor of all channels (0: 1, the seeds', on a GPU, else 0.25)", low=0, high=2)
    image_size: str = option("auto", "pixels of a side (auto: 64, the seeds', on a GPU, else 32)", choices=("auto", "32", "64"))
    latent_dim: int = option(128, "dimension of z (seeds 001 and 003)", low=1)
    lr: float = option(3e-4, "learning rate of RMSprop (paper §4, seed 001; seed 003: 1e-4, its code 3e-4)", low=1e-9)
    dis_lr: float = option(0.1, "that of Dis, as a share of --lr (seed 001; seed 003: 1)", low=1e-9)
    alpha: float = option(0.99, "RMSprop's smoothing (PyTorch's, seed 001; seed 003: 0.9)", low=0, high=1)
    decay: float = option(1.0, "factor of the learning rates from epoch to epoch (seed 003: 0.75)", low=0, high=1)
    clip: float = option(0.0, "clip each entry of the gradients to ± this (0: not; seed 003 names 1, unused)", low=0)
    reduction: str = option("mean", "losses are means, over batch and dimensions (seed 001), or sums (seed 003)", ("mean", "sum"))
    gamma: float = option(15.0, "weight γ of L_llike in Dec's loss (seed 001)", low=0)
    gamma_enc: float = option(5.0, "weight of L_llike in Enc's loss (seed 001; algorithm 1, seed 003: 1)", low=0)
    lambda_mse: float = option(0.0, "λ > 0: Dec has λ L_llike − (1 − λ) L_GAN instead (seed 003: 1e-6)", low=0, high=1)
    gan_reconstruction: bool = option(True, "x̃ is in L_GAN (paper, seed 001; seed 003: not)")
    dis_batches: str = option("separate", "Dis sees x, x̃, x_p one by one (seed 001) or joined (003)", ("separate", "joined"))
    bn_momentum: float = option(0.9, "the last batch's share in BatchNorm's running statistics (both seeds)", low=0, high=1)
    equilibrium: float = option(0.68, "of Dis' cross-entropies (seed 003); see --margin", low=0)
    margin: float = option(0.0, "Dis rests if one is lower by more than this, Dec if higher (seed 003: 0.35; 0: never)", low=0)
    eval_every: int = option(1, "epochs between cheap evaluations, and pictures", low=1)
    references: bool = option(False, "score raw pixels and the untrained encoder too, for the tables (a minute)")
    resume: str = option("", "checkpoint.pt to go on from")
    benchmark: bool = option(False, "measure time and memory of a training step beside seed 001's order, and stop")
    recipes = {("recipe", "seed003"): {
        "lr": 1e-4, "dis_lr": 1.0, "alpha": 0.9, "decay": 0.75, "reduction": "sum", "gamma_enc": 1.0, "lambda_mse": 1e-6,
        "gan_reconstruction": False, "dis_batches": "joined", "margin": 0.35}}


# B batch, Z = latent_dim, images (B, C, S, S) in [−1, 1], data (B, X) in [0, 1]

class Heads(nn.Module):
    """The two last layers of Enc: h → μ, log s²."""

    def __init__(self, H, Z):
        super().__init__()
        self.mu, self.log_var = nn.Linear(H, Z), nn.Linear(H, Z)

    def forward(self, h):
        return self.mu(h), self.log_var(h)


def build(config, C):
    """Enc, Dec and, but for a VAE, Dis = (layers up to Dis_l, the rest up to the logit), for images of C channels."""
    Z, s, seed001 = config.latent_dim, int(config.image_size) // 8, config.recipe == "seed001"
    activation = nn.LeakyReLU(0.2, inplace=True) if seed001 else nn.ReLU(inplace=True)
    c32, c64, c128, c256, c512, H = (max(1, round(config.width * n)) for n in (
        32, 64, 128, 256, 512, 2048 if seed001 else 1024))

    def linear(a, b):
        return nn.Linear(a, b, bias=seed001), nn.BatchNorm1d(b, momentum=config.bn_momentum), activation

    def down(a, b):
        return nn.Conv2d(a, b, 5, 2, 2, bias=seed001), nn.BatchNorm2d(b, momentum=config.bn_momentum), activation

    def up(a, b):
        layer = nn.ConvTranspose2d(a, b, 6, 2, 2) if seed001 else nn.ConvTranspose2d(a, b, 5, 2, 2, 1, bias=False)
        return layer, nn.BatchNorm2d(b, momentum=config.bn_momentum), activation
    Enc = nn.Sequential(*down(C, c64), *down(c64, c128), *down(c128, c256), nn.Flatten(), *linear(c256 * s * s, H), Heads(H, Z))
    Dec = nn.Sequential(*linear(Z, c256 * s * s), nn.Unflatten(1, (c256, s, s)), *up(c256, c256), *up(c256, c128),
                        *up(c128, c32), (nn.ConvTranspose2d if seed001 else nn.Conv2d)(c32, C, 5, 1, 2), nn.Tanh())
    if config.method == "vae":
        return nn.ModuleDict({"Enc": Enc, "Dec": Dec})
    layers = [nn.Conv2d(C, c32, 5, 1, 2), activation, *down(c32, c128), *down(c128, c256), *down(c256, c256)]
    at_l = len(layers) if seed001 else len(layers) - 2  # seed 003 compares features before batch norm
    Dis = nn.Sequential(nn.Sequential(*layers[:at_l]), nn.Sequential(
        *layers[at_l:], nn.Flatten(), *linear(c256 * s * s, c512), nn.Linear(c512, 1)))
    return nn.ModuleDict({"Enc": Enc, "Dec": Dec, "Dis": Dis})


def L_prior(mu, log_var, reduction):
    """KL(N(μ, diag s²) ‖ N(0, I)) = ½ Σ (μ² + s² − 1 − log s²), μ, log s² (B, Z); or its mean over B and Z."""
    kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var)
    return kl.mean() if reduction == "mean" else kl.sum()


def L_llike(f, f_rec, reduction):
    """−log N(f; f_rec, I) = ½ Σ (f − f_rec)², up to a constant; or the mean of the squares (seed 001)."""
    error = (f - f_rec).square()
    return error.mean() if reduction == "mean" else 0.5 * error.sum()


def cross_entropies(logits, config):
    """−log Dis(x), −log(1 − Dis(x̃)), if wanted, and −log(1 − Dis(x_p)), means over the batch; their sum is L_GAN."""
    real, fake_rec, fake = logits  # (B, 1) each
    terms = torch.stack([softplus(-real), softplus(fake_rec), softplus(fake)]).mean((1, 2))
    return terms if config.gan_reconstruction else terms[::2]


def discriminate(Dis, images, config):
    """Features Dis_l and logits of each of the images x, x̃, x_p."""
    if config.dis_batches == "joined":
        features = Dis[0](torch.cat(images))
        return features.chunk(3), Dis[1](features).chunk(3)
    features = [Dis[0](part) for part in images]
    return features, [Dis[1](part) for part in features]


def who_trains(bces, config):
    """Whether Dis and Dec are, given the cross-entropies: the one that is too far ahead rests, but never both."""
    dis = not config.margin or min(bces) >= config.equilibrium - config.margin
    dec = not config.margin or max(bces) <= config.equilibrium + config.margin
    return (dis, dec) if dis or dec else (True, True)


def descend(optimizer, gradients, clip):
    """A step of the optimizer with these gradients."""
    for p, g in zip(optimizer.param_groups[0]["params"], gradients):
        p.grad = g.clamp_(-clip, clip) if clip else g
    optimizer.step()
    optimizer.zero_grad()  # frees them


def train_step(nets, opts, x, config):
    """An iteration of algorithm 1 on x (B, C, S, S). Returns the LOSSES."""
    (Enc, Dec, Dis), weight = nets.train().values(), len(x) if config.reduction == "sum" else 1
    mu, log_var = Enc(x)  # (B, Z) each
    z, z_p = mu + (log_var / 2).exp() * torch.randn_like(mu), torch.randn_like(mu)
    fakes = [Dec(z), Dec(z_p)]  # x̃, x_p
    leaves = [image.detach().requires_grad_() for image in fakes]  # where the graph of Dis begins
    features, logits = discriminate(Dis, [x, *leaves], config)
    bces = cross_entropies(logits, config)
    prior, llike, gan = L_prior(mu, log_var, config.reduction), L_llike(*features[:2], config.reduction), bces.sum() * weight
    train_Dis, train_Dec = who_trains(bces.tolist() if config.margin else [], config)

    # What L_llike and L_GAN ask of x̃ and x_p; in the same pass the gradient of Dis, which only L_GAN moves.
    g_llike = grad(llike, leaves, retain_graph=True, materialize_grads=True)
    g_gan = grad(gan, [*Dis.parameters()] * train_Dis + leaves * train_Dec, materialize_grads=True)
    if train_Dis:
        descend(opts["Dis"], g_gan, config.clip)
    # What L_llike asks of z, through Dec, whose weights get nothing of it.
    g_z, = grad(fakes[0], [z], config.gamma_enc * g_llike[0], retain_graph=train_Dec)
    if train_Dec:  # γ L_llike − L_GAN
        a, b = (config.lambda_mse, 1 - config.lambda_mse) if config.lambda_mse else (config.gamma, 1)
        wishes = [a * g - b * h for g, h in zip(g_llike, g_gan[-2:])]
        descend(opts["Dec"], grad(fakes, [*Dec.parameters()], wishes), config.clip)
    # Enc: L_prior + L_llike; the largest net comes last, when the memory of the other graphs is free.
    descend(opts["Enc"], grad([prior, z], [*Enc.parameters()], [None, g_z]), config.clip)
    return torch.stack([prior, llike, gan]).detach()


def vae_step(nets, opts, x, config):
    """One update of a VAE's Enc and Dec on x (B, C, S, S). Returns its LOSSES."""
    mu, log_var = nets.train()["Enc"](x)
    x_rec = nets["Dec"](mu + (log_var / 2).exp() * torch.randn_like(mu))
    prior, llike = L_prior(mu, log_var, "sum") / len(x), L_llike(x, x_rec, "sum") / len(x)
    gradients = grad(prior + llike, [*nets.parameters()])
    n = len([*nets["Enc"].parameters()])
    descend(opts["Enc"], gradients[:n], config.clip), descend(opts["Dec"], gradients[n:], config.clip)
    return torch.stack([prior, llike]).detach()


LOSSES = ("train/L_prior", "train/L_llike", "train/L_GAN")  # a VAE has the first two


def seed_order_step(nets, opts, x, config):
    """For --benchmark: an iteration in seed 001's order, ten forward passes of Dis and gradients that nobody wants."""
    Enc, Dec, Dis = nets.train().values()

    def autoencode():
        mu, log_var = Enc(x)
        return mu, log_var, Dec(mu + (log_var / 2).exp() * torch.randn_like(mu))

    def look(*images):  # features, logits
        return zip(*((f := Dis[0](part), Dis[1](f)) for part in images))

    def update(name, loss):
        opts[name].zero_grad()
        loss.backward(retain_graph=True)
        opts[name].step()
    mu, log_var, x_rec = autoencode()
    x_p = Dec(torch.randn_like(mu))
    update("Dis", cross_entropies([*look(x, x_rec, x_p)][1], config).sum())
    gan = cross_entropies([*look(x, x_rec, x_p)][1], config).sum()
    update("Dec", config.gamma * L_llike(*[*look(x, x_rec)][0], "mean") - gan)
    mu, log_var, x_rec = autoencode()
    update("Enc", L_prior(mu, log_var, "mean") + config.gamma_enc * L_llike(*[*look(x, x_rec)][0], "mean"))


def enlarge(x, shape, config):
    """Data (B, X) in [0, 1] of an image's shape → what the nets see, (B, C, S, S) in [−1, 1]."""
    x, S = x.unflatten(1, shape), int(config.image_size)
    return 2 * (x if x.shape[-1] == S else interpolate(x, (S, S), mode="bicubic").clamp(0, 1)) - 1


def reduce(x, shape):
    """The way back: antialiased, as for all images that are measured."""
    x = x if x.shape[1:] == shape else interpolate(x, shape[1:], mode="bicubic", antialias=True).clamp(-1, 1)
    return (x.flatten(1) + 1) / 2


def maps(nets, config, shape, device):
    """What shared.evaluate and shared.draw look at, in eval mode; in chunks, because the full nets need 10 MB an image."""
    Enc, Dec = nets["Enc"], nets["Dec"]

    def chunked(function):
        return lambda x: shared.in_chunks(function, x, 250)

    def prior(n):
        return torch.randn(n, config.latent_dim, generator=torch.Generator().manual_seed(0)).to(device)
    encode = chunked(lambda x: Enc.eval()(enlarge(x, shape, config))[0])  # μ
    return {"encode": encode, "decode": chunked(lambda z: reduce(Dec.eval()(z), shape)), "prior": prior, "short": encode,
            "long": chunked(lambda x: Enc.eval()[:-1](enlarge(x, shape, config)))}


def directions(config, data):
    """(name, training images that have it, those that do not, test images that do not) of each direction to be drawn:
    from digit to digit, or from class to class, and on CelebA of attributes."""
    x, y, u, v, _ = data
    if y is not None:
        return [(f"{a} → {b}", y == b, y == a, v == a) for a, b in ((3, 8), (4, 9), (7, 1), (0, 6))]
    if config.dataset != "celeba" or config.split != "dw":
        return []
    from torchvision.datasets import CelebA
    train, test = (CelebA(config.data_dir or shared.ROOT / "data", part) for part in ("train", "test"))
    a, b = train.attr[:len(x)].bool().to(x.device), test.attr[:len(u)].bool().to(x.device)
    return [(name, a[:, i], ~a[:, i], ~b[:, i]) for name in ("Smiling", "Eyeglasses", "Male", "Blond_Hair")
            for i in [train.attr_names.index(name)]]


def arithmetic(data, seen, wanted):
    """Rows of images (N, X): test images, reconstructions, and the decoded μ + mean code with − mean code without."""
    codes, rows = seen["short"](data[0]), []
    for _, has, has_not, test in wanted:
        x = data[2][test][:10]
        mu = seen["encode"](x)
        rows += [x, seen["decode"](mu), seen["decode"](mu + codes[has].mean(0) - codes[has_not].mean(0))]
    return rows


def draw(run, config, data, seen, trace):
    """shared.draw's pictures, and the losses of each iteration so far, trace (iterations, losses)."""
    name = {"vae_gan": "VAE-GAN", "vae": "VAE"}[config.method]
    shared.draw(run, data, seen, {
        "reconstruction MSE": ["eval/recon_mse"], "1-NN accuracy on μ, %": ["eval/knn_acc_short"],
        "identity, %": ["eval/identity"], "LeNet-FID": ["eval/fid"]}, name)
    lines = zip(LOSSES, torch.stack(trace).T.tolist())
    run.picture("losses", shared.curves({name: {name: (range(1, len(ys) + 1), ys)} for name, ys in (
        (key.split("/")[1], ys) for key, ys in lines)}, "iteration", f"{name}, epoch {run.done}", yscale="log"))


def benchmark(config, nets, opts, x):
    """Prints time and memory of an iteration of ours, and its time beside that of seed 001's order, in turns."""
    def seconds(step):
        start = time.perf_counter()
        step(nets, opts, x, config)
        x.is_cuda and torch.cuda.synchronize()
        return time.perf_counter() - start
    first = min(seconds(train_step) for _ in range(2))
    peak = torch.cuda.max_memory_allocated() / 2**20 if x.is_cuda else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
    seconds(seed_order_step)
    n = 3 if config.smoke else max(3, min(100, int(10 / first)))
    times = [[seconds(step) for step in (train_step, seed_order_step)] for _ in range(n)]
    ours, seeds = torch.tensor(times, dtype=torch.float64).median(0).values.tolist()
    print(f"--width {config.width} --image-size {config.image_size}, batch {len(x)}, medians of {n}: {1e3 * ours:.1f} ms per "
          f"iteration or {len(x) / ours:.1f} images/s with a peak memory of {peak:.0f} MiB; in seed 001's order {1e3 * seeds:.1f} ms "
          f"or {len(x) / seeds:.1f} images/s: a ratio of {ours / seeds:.3f}")


def main(config):
    device = shared.setup(config)
    full = device.type == "cuda"
    config.width = config.width or (1.0 if full else 0.25)
    config.image_size = config.image_size if config.image_size != "auto" else "64" if full else "32"
    checkpoint = shared.load_checkpoint(config.resume, Config) if config.resume else None
    data = shared.load_vectors(config, device, toys=False, size=int(config.image_size))
    x_train, shape = data[0], data[4]
    if config.smoke:
        config.epochs, config.max_steps = min(config.epochs, 2), min(config.max_steps or 4, 4)
    if config.latent_dim > (X := x_train.shape[1]):
        shared.fail(f"--latent-dim {config.latent_dim} is larger than the data, {X} pixels")
    if (steps := len(x_train) // config.batch_size) == 0:
        shared.fail(f"--batch-size {config.batch_size} is larger than the data, {len(x_train)} images")
    if config.benchmark and (config.method, config.recipe) != ("vae_gan", "seed001"):
        shared.fail("--benchmark compares with seed 001's order: it needs --method vae_gan --recipe seed001")
    print(f"--width {config.width:g} --image-size {config.image_size} on {device.type}; --width 1 --image-size 64 are the seed's")

    steps = min(steps, config.max_steps or steps)
    nets = build(config, shape[0]).to(device)
    if device.type == "cpu":  # where this layout is faster for narrow nets
        nets.to(memory_format=torch.channels_last)
    step = {"vae_gan": train_step, "vae": vae_step}[config.method]
    opts = {name: torch.optim.RMSprop(net.parameters(), config.lr, config.alpha) for name, net in nets.items()}
    if config.benchmark:
        return benchmark(config, nets, opts, enlarge(x_train[:config.batch_size], shape, config))
    trace = []  # the losses of each iteration
    if checkpoint:
        nets.load_state_dict(checkpoint["nets"])
        trace = [*checkpoint["trace"].to(device)]
        for name, optimizer in opts.items():
            optimizer.load_state_dict(checkpoint[f"opt_{name}"])
    run = shared.Run(config, device, sum(p.numel() for p in nets.parameters()), checkpoint)
    seen = maps(nets, config, shape, device)

    def save():
        run.save("checkpoint.pt", trace=torch.stack(trace), nets=nets.state_dict(),
                 **{f"opt_{name}": optimizer.state_dict() for name, optimizer in opts.items()})

    if not checkpoint:
        floor = {"eval/fid_floor": shared.fid(*(u.unflatten(1, shape) for u in (data[2], shared.in_chunks(
            lambda u: reduce(enlarge(u, shape, config), shape), data[2]))))} if config.dataset == "mnist" else {}
        run.log({"epoch": 0} | shared.untrained(config, data, seen) | floor)
    for epoch in range(run.done + 1, config.epochs + 1):
        for name, optimizer in opts.items():
            optimizer.param_groups[0]["lr"] = config.lr * config.decay ** (epoch - 1) * (config.dis_lr if name == "Dis" else 1)
        order = torch.Generator(device).manual_seed(1_000_003 * config.seed + epoch)
        first = len(trace) - (epoch - 1) * steps  # iterations behind us in this epoch
        for _, i in zip(range(first, steps), shared.batches(len(x_train), config.batch_size, order, skip=first)):
            trace.append(step(nets, opts, enlarge(x_train[i], shape, config), config))
            run.tick(config.batch_size, trace[-1].sum(), config.epochs * steps)
            if run.stop:
                save()
                run.leave()
        row = {"epoch": epoch} | {key: run.finite(loss) for key, loss in zip(LOSSES, torch.stack(trace[-steps:]).mean(0))}
        if looked := epoch % config.eval_every == 0 or epoch == config.epochs:
            row |= shared.evaluate(config, data, seen, full=False)
        run.log(row)
        save()
        if looked:
            draw(run, config, data, seen, trace)

    if wanted := directions(config, data):
        run.picture("arithmetic", shared.grid(
            torch.cat(arithmetic(data, seen, wanted)).unflatten(1, shape), 10, f"epoch {run.done}: a direction added to μ, "
            "the difference of the mean codes", [row for name, *_ in wanted for row in ("x", "Dec(μ)", name)]))
    run.save("model.pt", **{name: net.state_dict() for name, net in nets.items()})
    run.finish(**shared.evaluate(config, data, seen, full=True))


if __name__ == "__main__":
    main(shared.parse_config(Config))
