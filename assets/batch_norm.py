"""Batch norm for evaluation: statistics that are taken again.

In training batch norm has the statistics of each batch, and keeps running ones for later. Those
mix what went through the net (a VAE-GAN's decoder sees reconstructions and samples), and with
a momentum of 0.9 (PyTorch's meaning) they are hardly more than the last batch's.
"""

import copy

from torch.optim.swa_utils import update_bn


def settled(net, x, batch_size):
    """A copy of net in evaluation mode; batch norm has its mean statistics over whole batches of
    the inputs x."""
    net = copy.deepcopy(net).eval()
    whole = x[: len(x) - len(x) % batch_size]
    update_bn(whole.split(batch_size), net)
    return net
