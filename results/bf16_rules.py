"""FC ALAE in bf16 under other rules than ours: what costs accuracy?

    python results/sweep.py step3_official_alae/sweeps/bf16_rules.yaml --workers 2

`ours` is train_fc_alae.py's --precision bf16. `outputs-fp32`, `r1-fp32`, `F-D-bf16` and
`one-context` differ from it in one thing, `whole-step` in all that a plain autocast around
train_step does; `rounded-weights` differs from `fp32` in one.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "step3_official_alae"))
import shared
from shared import option

import torch
import train_fc_alae as alae
from torch import nn
from torch.nn.functional import linear

BF16 = alae.FAST | {"precision": "bf16"}
PRESETS = {
    "fp32": alae.FAST,
    "ours": BF16,  # a context of autocast for each step of algorithm 1, F and D in fp32
    "outputs-fp32": BF16,  # the last layers of G and E in fp32, too
    "r1-fp32": BF16,  # D(E(x)) and its gradient in fp32, too
    "F-D-bf16": BF16,  # F and D in bf16, their outputs in fp32
    "one-context": BF16,  # each weight's first cast is kept to the step's end, although it moves
    "whole-step": BF16,  # one context, and F, D and the losses in bf16
    "rounded-weights": alae.FAST,  # products in fp32, of weights of G and E rounded to bf16
}
train_step, build, L_adv_ED = alae.train_step, alae.build, alae.L_adv_ED


@dataclass
class Config(alae.Config):
    preset: str = option("ours", "what is in bf16", tuple(PRESETS))


class Rounded(alae.Linear):
    """alae.Linear with its weight rounded to bf16 in training; the gradient ignores this."""

    def forward(self, x):
        weight = self.weight
        if weight.requires_grad:
            weight = weight + (weight.bfloat16().float() - weight).detach()
        return linear(x, weight, self.bias)


class Outputs32(nn.Sequential):
    """Layers in bf16 whose output is fp32."""

    def forward(self, x):
        return shared.fp32(super().forward(x))


def in_one_context(nets, opt_ED, opt_FG, x, config):
    """train_step in one autocast context, which keeps each weight's first cast until its end."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return train_step(nets, opt_ED, opt_FG, x, config)


def L_adv_ED_fp32(D, E, x, x_fake, gamma):
    """L_adv_ED with D(E(x)), and so R1, in fp32; D(E(x_fake)) stays in bf16."""
    E32 = shared.Float32(*E)

    def encode(images):  # x alone requires a gradient, for R1
        return E32(images) if images.requires_grad else E(images)

    return L_adv_ED(D, encode, x, x_fake, gamma)


def build_by_rule(config, X):
    """The same networks with the same initial weights, in layers of other types."""
    nets = build(config, X)
    if config.preset == "F-D-bf16":
        nets.update({name: Outputs32(*nets[name]) for name in "FD"})
    elif config.preset == "whole-step":
        nets.update({name: nn.Sequential(*nets[name]) for name in "FD"})
    elif config.preset == "outputs-fp32":
        for name in "GE":
            nets[name][4] = shared.Float32(nets[name][4])
    elif config.preset == "rounded-weights":
        for layer in [*nets["G"], *nets["E"]]:
            if isinstance(layer, alae.Linear):
                layer.__class__ = Rounded
    return nets


def main(config):
    alae.build = build_by_rule
    if config.preset in ("one-context", "whole-step"):
        alae.train_step = in_one_context
    if config.preset == "r1-fp32":
        alae.L_adv_ED = L_adv_ED_fp32
    alae.main(config)


if __name__ == "__main__":
    main(shared.parse_config(Config, PRESETS))
