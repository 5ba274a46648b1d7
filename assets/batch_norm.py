"""Batch norm for evaluation: statistics that are taken again.

In training batch norm has the statistics of each batch, and keeps running ones for later. Those
mix what went through the net (a VAE-GAN's decoder sees reconstructions and samples), and with
PyTorch's momentum 0.9 they are hardly more than the last batch's.
"""

import copy

from torch.optim.swa_utils import update_bn


def settled(net, batches):
    """A copy of net in evaluation mode; batch norm has its mean statistics over the batches."""
    net = copy.deepcopy(net)
    update_bn(batches, net.eval())
    return net
