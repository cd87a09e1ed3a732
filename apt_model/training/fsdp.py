"""A model in shards, one on each rank (FSDP2), with experts spread over ranks; modules switch while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from apt_model.errors import ConfigError
from apt_model.layers.align import BiStateAlignment
from apt_model.layers.feed_forward import Experts
from apt_model.layers.in_place import moe_layers
from apt_model.layers.moe import MoE
from apt_model.training import subject
from apt_model.training.engines import Engine
from apt_model.training.sharding import full_tensor
from apt_model.training.torch_names import lacking, require

ALONE = "Set trainer.parallel=ddp"
SHARED = "Set trainer.expert_parallel=1"


class Sharded(Engine):
    """Every rank holds a part of each parameter, its gradient and its moments, and gathers a layer at a time (FSDP2).

    Each block is a unit; so are its dense layer, router and experts, which are added and removed. Experts are shared out whole,
    by their first dimension, where every rank gets as many; else each is cut. With ``expert_parallel`` N, N ranks in a row
    share one set of experts and send each other tokens; only what is left of a set is cut among the other ranks.

    A switch of experts gathers one layer at a time, switches it as a process alone would, and shards it again.
    """

    whole_blocks: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        world: int,
        *,
        expert_parallel: int = 1,
        dtype: torch.dtype = torch.float32,
        device_type: str,
    ) -> None:
        super().__init__(model)
        require("trainer.parallel=fsdp", ALONE, "torch.distributed.fsdp:FSDPModule._get_fsdp_state")
        self.world = world
        self.expert_mesh: DeviceMesh | None = None
        if expert_parallel == 1:
            self.mesh = self.cut_mesh = init_device_mesh(device_type, (world,), mesh_dim_names=("ranks",))
        else:
            shape, names = (world // expert_parallel, expert_parallel), ("shards", "experts")
            require("trainer.expert_parallel", SHARED, "torch.distributed.device_mesh:DeviceMesh._flatten")
            both = init_device_mesh(device_type, shape, mesh_dim_names=names)
            self.mesh, self.cut_mesh, self.expert_mesh = both._flatten("ranks"), both["shards"], both["experts"]
        half = None if dtype == torch.float32 else dtype
        self.multiplied = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self._check()
        for parameter in model.parameters():
            _from_rank_zero(parameter)
        self.align = next((part for part in model.modules() if isinstance(part, BiStateAlignment)), None)
        for layer in moe_layers(model):
            self._shard(layer)
        for block in subject.blocks(model):
            fully_shard(block, mesh=self.mesh)
        self._shard_align()
        fully_shard(model, mesh=self.mesh)
        for state in _states(model)[:1]:
            if not (hasattr(state, "_is_root") and hasattr(getattr(state, "_state_ctx", None), "all_states")):
                raise lacking("trainer.parallel=fsdp", ALONE, "FSDPState._is_root or FSDPState._state_ctx.all_states")

    def _check(self) -> None:
        if self.expert_mesh is None:
            return
        layer, cut = next(iter(moe_layers(self.model)), None), self.cut_mesh.size()
        if layer is None or layer.dense is None:
            raise ConfigError("trainer.expert_parallel: the model has no layers of experts. Set it to 1.")
        d_ff, d_model = layer.dense.up.shape
        widths = {d_ff, d_model, d_ff // layer.granularity}
        if layer.num_experts % self.expert_mesh.size():
            raise ConfigError(
                f"trainer.expert_parallel = {self.expert_mesh.size()} does not divide moe.num_experts = {layer.num_experts}."
                " Choose a divisor."
            )
        if any(width % cut for width in widths):
            raise ConfigError(
                f"trainer.expert_parallel = {self.expert_mesh.size()} leaves {cut} ranks to cut each expert, and "
                "model.d_model and model.d_ff are no multiples of that. Choose a larger trainer.expert_parallel."
            )

    def switches(self) -> Mapping[str, Callable[[bool], None]]:
        """Return what enables and disables each module, sharded before and after."""
        found = subject.switches(self.model)
        if moe_layers(self.model):
            found["moe"] = self._enable_moe
        if self.align is not None:
            found["align"] = self._enable_align
        return found

    def _enable_moe(self, on: bool) -> None:
        for layer in moe_layers(self.model):
            if layer.enabled != on:
                self._change(layer, partial(layer.enable, on))

    def resize(self, *, at_least: int | None = None, at_most: int | None = None) -> None:
        """See :func:`apt_model.training.subject.resize`."""

        def change(layer: MoE, number: int) -> None:
            self._change(layer, partial(layer.resize, number))

        subject.resize(self.model, at_least=at_least, at_most=at_most, change=change)

    def _change(self, layer: MoE, change: Callable[[], None]) -> None:
        """Have ``change`` give ``layer`` other parameters, while it is whole."""
        self.rest()
        self._had = None  # a new parameter may have the identity of one that is gone
        before = dict(layer.named_parameters())
        for name, part in list(layer.named_children()):
            if isinstance(part, FSDPModule):
                setattr(layer, name, _whole_module(part))
        origins = {parameter: before[name] for name, parameter in layer.named_parameters()}
        change()
        if layer.router is not None:
            _from_rank_zero(layer.router.weight)
        if layer.experts is not None and layer.upcycling != "copy":  # they are drawn, too
            for weight in layer.experts.parameters():
                _from_rank_zero(weight)
        names = {parameter: name for name, parameter in layer.named_parameters()}
        lineage = [(names[link.child], link._replace(parent=origins[link.parent])) for link in layer.lineage]
        self._shard(layer)
        now = dict(layer.named_parameters())
        layer.lineage = [link._replace(child=now[child]) for child, link in lineage]

    def _enable_align(self, on: bool) -> None:
        self.rest()
        self._had = None
        if self.align is not None and on != self.align.enabled:
            self.align.enable(on)
            self._shard_align()

    def _shard_align(self) -> None:
        for part in self.align.children() if self.align is not None else ():
            for parameter in part.parameters():
                _from_rank_zero(parameter)
            fully_shard(part, mesh=self.mesh)

    def _shard(self, layer: MoE) -> None:
        """Shard the parts of a feed-forward layer, which are whole."""
        if layer.dense is not None:
            fully_shard(layer.dense, mesh=self.mesh, mp_policy=self.multiplied)
        if layer.router is not None:
            fully_shard(layer.router, mesh=self.mesh)  # in float32 whatever autocast says
        if layer.experts is not None:
            self._shard_experts(layer.experts)

    def _shard_experts(self, experts: Experts) -> None:
        if self.expert_mesh is not None:
            for name, weight in list(experts.named_parameters()):
                spread = distribute_tensor(weight.detach(), self.expert_mesh, [Shard(0)], src_data_rank=None)
                setattr(experts, name, nn.Parameter(spread, weight.requires_grad))
            experts.exchange = ExpertExchange(self.expert_mesh)
        cut, shapes = self.cut_mesh.size(), [weight.shape for weight in experts.parameters()]
        cuttable = all(shape[1] % cut == 0 for shape in shapes)
        inside = self.expert_mesh is not None or (cuttable and any(shape[0] % cut for shape in shapes))
        fully_shard(
            experts,
            mesh=self.cut_mesh,
            mp_policy=self.multiplied,
            shard_placement_fn=lambda weight: Shard(1 if inside else 0),
        )
        if self.expert_mesh is not None and isinstance(experts, FSDPModule):
            experts.set_gradient_divide_factor(float(self.world))  # it has met the tokens of all that share it
            # gloo knows no other; torch 2.13 divides a lone rank's twice
            experts.set_force_sum_reduction_for_comms(cut > 1)

    def _settle(self) -> None:
        """Have torch find its units again at the next forward pass."""
        for state in _states(self.model):
            state._is_root = None
            state._state_ctx.all_states.clear()

    def rest(self) -> None:
        """Put the shards back in the place of what was gathered."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()


def _states(model: nn.Module) -> list[Any]:
    return [part._get_fsdp_state() for part in model.modules() if isinstance(part, FSDPModule)]


def _whole_module(part: Any) -> nn.Module:
    """Return a module like the sharded ``part``, with whole parameters, of no engine."""
    classes = type(part).__mro__
    alike: Any = object.__new__(classes[classes.index(FSDPModule) + 1])  # torch puts its own before that of the module
    nn.Module.__init__(alike)
    of_engines = {*vars(alike), "_is_fsdp_managed_module", "_fsdp_use_orig_params"} - {"training"}
    for name, value in vars(part).items():
        if name not in of_engines and not name.startswith("__composable"):
            setattr(alike, name, value)
    for name, parameter in part.named_parameters():
        alike.register_parameter(name, nn.Parameter(full_tensor(parameter.detach()), parameter.requires_grad))
    for name, buffer in part.named_buffers():
        alike.register_buffer(name, buffer, persistent=name not in part._non_persistent_buffers_set)
    module: nn.Module = alike
    return module


def _from_rank_zero(tensor: Tensor) -> None:
    if not tensor.is_meta:
        dist.broadcast(tensor.data, src=0)


class ExpertExchange:
    """Sends rows to the ranks that have their experts, and what comes of them back (GShard, arXiv:2006.16668).

    The host learns how many rows go where, which is a synchronisation a layer.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group()
        self.ranks = mesh.size()
        name = "torch.distributed._functional_collectives:all_to_all_single_autograd"
        (self.all_to_all,) = require("trainer.expert_parallel", SHARED, name)

    def __call__(self, x: Tensor, ends: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Compute what ``compute(x, ends)`` would be with all experts here; see :meth:`Experts.forward`."""
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        theirs = torch.empty_like(counts)  # for my experts, by rank, then by expert
        dist.all_to_all_single(theirs, counts, group=self.group)
        by_rank = torch.stack((counts, theirs)).view(2, self.ranks, -1)
        sent, received = by_rank.sum(dim=2).tolist()
        rows = self.all_to_all(x[: sum(sent)], received, sent, self.group)
        owner = torch.arange(by_rank.shape[2], device=x.device).repeat(self.ranks)
        order = owner.repeat_interleave(theirs.long()).argsort(stable=True)
        rows, ends = rows[order], by_rank[1].sum(dim=0).cumsum(0).int()
        if not len(order):  # no kernel likes none, and a gradient must come: a row of zeros stands in
            rows, ends[-1] = F.pad(rows, (0, 0, 0, 1)), 1
        output = compute(rows, ends)[: len(order)]
        back = torch.empty_like(output).index_copy(0, order, output)
        home = self.all_to_all(back, sent, received, self.group)
        return torch.cat((home, home.new_zeros(x.shape[0] - home.shape[0], home.shape[1])))
