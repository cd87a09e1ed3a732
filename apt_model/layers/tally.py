"""What routers did, as sums that add up over batches and ranks, and the metrics that come of them.

They cost a few passes over the routers' probabilities, so a forward pass takes them only where it is asked to. Metrics are
made of sums and not of other metrics: a load is that of all batches of an update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apt_model.layers.counted import Counted, mean_over
from apt_model.layers.metrics import EXPERT_COSINE, MEANS, METRICS
from apt_model.layers.router import Dispatch, Routing


@torch.no_grad()
def tally(
    routing: Routing,
    dispatch: Dispatch,
    *,
    num_sequences: int,
    balance: Tensor,
    z: Tensor,
    counts: Tensor,
    counted: Counted | None = None,
) -> Tensor:
    """Return a layer's sums, (len(MEANS) + 1 + num_experts,) float32.

    They are :data:`MEANS` and the mean entropy of a sequence's load, times the number of slots (a token at one of its
    experts), and the slots that wanted each expert, dropped ones included: ``counts``. Tokens that do not count are in none.
    """
    p, kept = routing.probabilities, dispatch.kept
    wanted = routing.experts.view(num_sequences, -1)
    of_sequences = torch.zeros(num_sequences, p.shape[1], device=p.device)
    slots: Tensor | int = kept.numel()
    if counted is None:
        of_sequences = of_sequences.scatter_add(1, wanted, torch.ones_like(wanted, dtype=of_sequences.dtype))
        of_a_sequence = entropy(of_sequences / wanted.shape[1]).mean()
    else:
        ones = counted.mask.unsqueeze(1).expand_as(kept).reshape(wanted.shape).to(of_sequences.dtype)
        of_sequences = of_sequences.scatter_add(1, wanted, ones)
        slots = counts.sum()
        own = of_sequences.sum(dim=1)  # a sequence's slots
        share = own / (slots / num_sequences).clamp(min=1e-9)  # 1.0 where each has as many
        of_a_sequence = (entropy(of_sequences / own.clamp(min=1.0).unsqueeze(1)) * share).mean()
    means = [
        balance,
        z,
        mean_over(counted, entropy(p)),
        mean_over(counted, p.amax(dim=-1)),
        1.0 - mean_over(counted, kept.float()),
        1.0 - mean_over(counted, kept.any(dim=-1).float()),
        of_a_sequence,
    ]
    weighted = slots * torch.stack([mean.detach().float() for mean in means])
    return torch.cat((weighted, counts.float()))


def entropy(p: Tensor) -> Tensor:
    """Return the entropy in nats of the distributions over the last dimension of ``p``."""
    return -torch.xlogy(p, p).sum(dim=-1)


def layer_metrics(sums: Tensor) -> Tensor:
    """Return :data:`METRICS` of each layer, (num_layers, len(METRICS)); ``sums``: (num_layers, ...) of :func:`tally`."""
    weighted, counts = sums[:, : len(MEANS) + 1], sums[:, len(MEANS) + 1 :]
    slots = counts.sum(dim=1, keepdim=True).clamp(min=1.0)  # none, where no token counts
    load, means = counts / slots, weighted / slots
    of_load = entropy(load)
    of_loads = (
        load.amax(dim=1) * load.shape[1],  # over the equal share
        of_load,
        (counts == 0).sum(dim=1).float(),
        (of_load - means[:, -1]).clamp(min=0.0),
    )
    return torch.cat((means[:, :-1], torch.stack(of_loads, dim=1)), dim=1)


def model_metrics(layers: Tensor) -> Tensor:
    """Return :data:`METRICS` of a model, (len(METRICS),), from those of its layers."""
    values = layers.mean(dim=0)
    values[METRICS.index("max_load")] = layers[:, METRICS.index("max_load")].amax()
    values[METRICS.index("dead_experts")] = layers[:, METRICS.index("dead_experts")].sum()
    return values


def routing_metrics(sums: Tensor, cosines: Tensor | None = None) -> dict[str, float]:
    """Return the metrics of a model, and of each layer, by name; waits for the device once.

    Args:
        sums: (num_layers, ...), added over whatever the metrics are to be of.
        cosines: (num_layers,) of the experts' weights, reported as :data:`EXPERT_COSINE`; None: they are not.
    """
    layers, names = layer_metrics(sums), METRICS
    model = model_metrics(layers)
    if cosines is not None:
        names = (*names, EXPERT_COSINE)
        layers = torch.cat((layers, cosines.unsqueeze(1)), dim=1)
        model = torch.cat((model, cosines.mean(dim=0, keepdim=True)))
    model_values, *each = torch.cat((model.unsqueeze(0), layers)).tolist()
    metrics = {f"moe/{name}": value for name, value in zip(names, model_values, strict=True)}
    for number, values in enumerate(each):
        metrics |= {f"moe/layer_{number:02}/{name}": value for name, value in zip(names, values, strict=True)}
    return metrics
