"""How far codes are from the prior that they should follow, for the adversarial autoencoders."""

from statistics import fmean

import torch
from torch.nn.functional import normalize


def sliced_wasserstein(a, b):
    """Mean over 200 directions of the 1-Wasserstein distance of a and b (N, Z), projected."""
    generator = torch.Generator().manual_seed(0)
    theta = normalize(torch.randn(a.shape[1], 200, generator=generator), dim=0).to(a)
    return ((a @ theta).sort(0).values - (b @ theta).sort(0).values).abs().mean().item()


def gaps(z_train, z_test, draws):
    """Mean distances to every second of an even number of draws of the prior, (M, Z) each: those of
    z_test (M, Z), of the first M of z_train and, as the floor, of the draw before it."""
    first, second = draws[::2], draws[1::2]
    z_train = z_train[: len(z_test)]
    return {
        "eval/prior_gap": fmean(sliced_wasserstein(z_test, z) for z in second),
        "eval/prior_gap_floor": fmean(map(sliced_wasserstein, first, second)),
        "eval/prior_gap_train": fmean(sliced_wasserstein(z_train, z) for z in second),
    }
