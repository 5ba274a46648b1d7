"""What blurs ALAE's reconstructions, G or E? Two experiments on a trained model, whose G is kept.

ALAE trains E to invert G on codes w = F(z) alone, and images of the data are not quite G(F(z)).

    Descent. Does G draw the test images x at all? From w = E(x), Adam minimises ‖x − G(w)‖² for
             each x of a tenth of them, and of the same mirrored. Nothing is learned from it.
    Refit.   E goes on alone, on generated images x = G(w). Their codes w have noise, so that E sees
             more than the G(F(z)):

                 w = F(z) + σ s ε,    z, ε ~ N(0, I),    s: the standard deviation of F(z)
                 E  minimises  ‖x − G(E(x))‖²                           (--loss image)
                 or            ‖w − E(x)‖², as Step III of ALAE has it  (--loss latent)

             No image of the data and no critic take part.

Neither is in the paper or in the official code.

    python step3_official_alae/refit_encoder.py --model runs/train_fc_alae/NAME/model.pt
    python step3_official_alae/train_fc_alae.py --eval runs/refit_encoder/NAME/alae.pt

Expect (preset clean, seed 0, test images): identity 98.2 %, 94.5 % as trained, 99.0 % by descent.

`alae.pt` is the model with its new E, and with the old one, where a second refit begins. Metrics
"as trained" are those of the old E; "the same", and those of the "descent", are of that tenth.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from torch import nn

# Options of train_fc_alae.py that are used here
OF_ALAE = {"dataset", "split", "preset", "latent_dim", "width", "slope", "mapping"}
OF_ALAE |= {"mapping_layers", "output", "input_range"}


@dataclass
class Config(shared.Protocol):
    model: str = option("", "model.pt; in its path {seed} is --seed (default: assets/fc_alae.pt)")
    dataset: str = option("", "the model's: read from it")
    split: str = option("", "the model's: read from it")
    trained: str = option("", "the model's preset: read from it")
    loss: str = option("image", "compare images, or codes as ALAE does", ("image", "latent"))
    epochs: int = option(10, "passes over as many codes as there are training images", low=0)
    batch_size: int = option(128, "codes per step", low=1)
    lr: float = option(0.001, "Adam's rate at the start", low=1e-9)
    decay: float = option(
        1.0, "last share of the training, with a falling rate", low=0.01, high=1.01
    )
    noise: float = option(0.5, "σ: noise on w, in standard deviations of w", low=0)
    descent_steps: int = option(100, "steps of the descent", low=0)
    descent_lr: float = option(0.05, "Adam's rate in the descent", low=1e-9)
    precision: str = option("fp32", "of matrix products in training", ("fp32", "bf16"))


# B batch, W = latent_dim, X = pixels (784), H = width


def load_alae(config):
    """The model as a dict; its training's options become config.alae, and its data our data."""
    path = config.model.replace("{seed}", str(config.seed)) or shared.ROOT / "assets/fc_alae.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        experiment, options = saved["experiment"], SimpleNamespace(**saved["config"])
    except Exception as error:  # torch.load raises many kinds
        shared.fail(f"--model {path}: cannot be read ({type(error).__name__})")
    if experiment != "train_fc_alae" or "E" not in saved or OF_ALAE - vars(options).keys():
        shared.fail(f"--model {path}: is no model.pt of train_fc_alae.py, or of an older version")
    own = {"dataset": options.dataset, "split": options.split, "trained": options.preset}
    for name, value in own.items():
        if getattr(config, name) not in ("", value):
            shared.fail(f"--{name}: leave it out, the model has its own, {value}")
        setattr(config, name, value)
    config.alae = options
    return saved


def build(alae, X):
    """F: z (B, W) → w (B, W), G: w → x (B, X), E: x → w, as in train_fc_alae.py."""
    W, H = alae.latent_dim, alae.width
    leaky, leaky_out = nn.LeakyReLU(0.2), nn.LeakyReLU(alae.slope)
    F = []
    if alae.mapping != "identity":
        F.append(nn.RMSNorm(W, eps=1e-8, elementwise_affine=False))  # pixel norm
    if alae.mapping == "mlp":
        for _ in range(alae.mapping_layers):
            F += [nn.Linear(W, W), leaky]
    G = [nn.Linear(W, H), leaky_out, nn.Linear(H, H), leaky_out, nn.Linear(H, X)]
    if alae.output == "bounded":
        G.append(nn.Sigmoid() if alae.input_range == "01" else nn.Tanh())
    E = [nn.Linear(X, H), leaky, nn.Linear(H, H), leaky, nn.Linear(H, W), leaky_out]
    nets = {"F": shared.Float32(*F), "G": nn.Sequential(*G), "E": nn.Sequential(*E)}
    return nn.ModuleDict(nets)


def noisy_codes(F, z, sigma):
    """w = F(z) + σ s ε (B, W)."""
    w = F(z)
    return w + sigma * w.std() * torch.randn_like(w)


def train_step(nets, optimizer, z, config):
    """A step of E on the images x (B, X) of codes w (B, W) that come from z (B, W)."""
    F, G, E = nets["F"], nets["G"], nets["E"]
    with shared.products(config, z.device):
        with torch.no_grad():
            w = noisy_codes(F, z, config.noise)
            x = shared.fp32(G(w))
        w_rec = shared.fp32(E(x))
        error = w - w_rec if config.loss == "latent" else x - shared.fp32(G(w_rec))
    loss = error.square().sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"L_E": loss.detach()}


def descend(G, w, x, config):
    """The w (n, W) that Adam reaches on ‖x − G(w)‖², for each x (n, X) by itself."""
    w = w.clone().requires_grad_()
    optimizer = torch.optim.Adam([w], config.descent_lr)
    for _ in range(config.descent_steps):
        optimizer.zero_grad()
        (x - G(w)).square().sum().backward()
        optimizer.step()
    return w.detach()


def to_x(pixels, config):
    """Pixels in [0, 1] → the range that the networks see."""
    return pixels * 2 - 1 if config.alae.input_range == "11" else pixels


def to_pixels(x, config):
    return (x + 1) / 2 if config.alae.input_range == "11" else x


def evaluate(nets, data, config, full=False):
    """Short features: E(x) (N, W); long: the activations (N, H) before E's last layer."""
    F, G, E = nets["F"], nets["G"], nets["E"]
    long = [shared.chunked(E[:4], to_x(x, config)) for x in (data.x_train, data.x_test)]
    short = [shared.chunked(E[4:], hidden) for hidden in long]
    generator = torch.Generator().manual_seed(0)  # z as in train_fc_alae.py
    z = torch.randn(len(data.x_test), config.alae.latent_dim, generator=generator)
    x_rec = to_pixels(shared.chunked(G, short[1]), config)
    x_fake = to_pixels(shared.chunked(nn.Sequential(F, G), z.to(data.x_test)), config)
    metrics = shared.image_metrics(data, x_rec, x_fake)
    metrics |= shared.code_metrics(data, *short, "short", full)
    if full:
        metrics |= shared.code_metrics(data, *long, "long")
    return metrics


def under(name, metrics):
    """The metrics with `name` in place of eval."""
    return {key.replace("eval", name): value for key, value in metrics.items()}


def drawn(nets, data, config):
    """The test images of data as G draws them, pixels (n, X): from E(x), and after the descent."""
    G, x = nets["G"], to_x(data.x_test, config)
    w = shared.chunked(nets["E"], x)
    x_descent = shared.chunked(G, descend(G, w, x, config))
    return to_pixels(shared.chunked(G, w), config), to_pixels(x_descent, config)


def first_tests(data):
    """The data with a tenth of its test images, at least 20; and with the same ones mirrored."""
    n = max(20, len(data.x_test) // 10)
    y = None if data.y_test is None else data.y_test[:n]
    few = data._replace(x_test=data.x_test[:n], y_test=y)
    mirrored = few.images(few.x_test).flip(3).flatten(1)
    return few, few._replace(name="mirrored", x_test=mirrored)  # no digits to LeNet


@torch.no_grad()
def draw(run, data, config, x_before, x_descent):
    """Reconstructions; and 20 test images as E had them before, as it has them now, by descent."""
    G, E = run.nets["G"], run.nets["E"]
    x = data.x_test[:50]
    x_rec = to_pixels(G(E(to_x(x, config))), config)
    title = f"FC ALAE, E refitted for {run.epoch} epochs"
    pairs = shared.pairs(data.images(x), data.images(x_rec), f"{title}: test images x and G(E(x))")
    run.picture("reconstructions", pairs)
    lines = min(2, len(x_before) // 10)
    rows = torch.stack([part[: 10 * lines] for part in (x, x_before, x_rec, x_descent)])
    rows = rows.unflatten(1, (lines, 10)).transpose(0, 1).flatten(0, 2)
    names = ["x", "E as trained", "E refitted", "descent on w"] * lines
    run.picture("comparison", shared.grid(data.images(rows), 10, title, names))


def save_alae(run, saved, old_E):
    """The whole model with its new E as alae.pt, for train_fc_alae.py --eval."""
    history = copy.deepcopy(saved["history"])
    for name in ("commands", "commits"):
        history[name] += run.history[name]
    whole = saved | {"history": history, "E_as_trained": old_E, "E": run.nets["E"].state_dict()}
    shared.write_file(run.dir / "alae.pt", lambda path: torch.save(whole, path))


def main(config):
    device = shared.setup(config)
    saved = load_alae(config)
    data = shared.load_data(config, device)
    nets = build(config.alae, data.x_train.shape[1]).to(device)
    old_E = saved.get("E_as_trained", saved["E"])
    nets["E"].load_state_dict(old_E)
    for name in ("F", "G"):
        nets[name].load_state_dict(saved[name])
        nets[name].requires_grad_(False)
    optimizer = torch.optim.Adam(nets["E"].parameters(), config.lr, fused=True)
    parts = {"nets": nets, "optimizer": optimizer}

    run = shared.Run(config, device, nets, len(data.x_train) // config.batch_size)
    as_trained = evaluate(nets, data, config, full=not config.smoke)  # its own
    few, mirrored = first_tests(data)  # its own
    x_before, x_descent = drawn(nets, few, config)  # its own
    for _ in run.epochs(parts):  # its own
        for _ in range(run.epoch_steps):  # its own
            left = min(1.0, (1 - run.progress) / config.decay)  # its own
            optimizer.param_groups[0]["lr"] = config.lr * left  # its own
            z = torch.randn(config.batch_size, config.alae.latent_dim, device=device)  # its own
            losses = train_step(nets, optimizer, z, config)  # its own
            run.step(losses, len(z))  # its own
        run.log_losses()
        if run.is_due():
            run.log(evaluate(run.nets, data, config))
            draw(run, data, config, x_before, x_descent)  # its own
        run.save(parts)
    metrics = evaluate(run.nets, data, config, full=True)
    metrics |= under("as trained", as_trained)  # its own
    metrics |= under("as trained, the same", shared.image_metrics(few, x_before))  # its own
    metrics |= under("descent", shared.image_metrics(few, x_descent))  # its own
    _, x_mirrored = drawn(nets, mirrored, config)  # its own
    metrics |= under("descent, mirrored", shared.image_metrics(mirrored, x_mirrored))  # its own
    draw(run, data, config, x_before, x_descent)  # its own
    save_alae(run, saved, old_E)  # its own
    run.finish(metrics)


if __name__ == "__main__":
    main(shared.parse_config(Config))
