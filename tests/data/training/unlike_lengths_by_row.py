"""As its neighbour, but a mean over rows, each of which is a mean over its tokens."""
import unlike_lengths
from torch.nn import functional as F
from unlike_lengths import NONE, make_batch, make_model, make_optimizer


def loss_fn(outputs, targets):
    losses = F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=NONE, reduction="none")
    return (losses.sum(1) / (targets != NONE).sum(1)).mean()


def make_microbatches(inputs, targets, count):
    parts = unlike_lengths.make_microbatches(inputs, targets, count)
    return [part._replace(size=None) for part in parts]
