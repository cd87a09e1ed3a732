"""What a loop and a curriculum find in a model: any ``torch.nn.Module``, and what it offers besides being called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.data.borders import Borders, takes_no_documents
from apt_model.errors import ConfigError
from apt_model.gpt import GPT, Output
from apt_model.ignored import IGNORED
from apt_model.layers.align import BiStateAlignment
from apt_model.layers.attention import SelfAttention
from apt_model.layers.balance import complete
from apt_model.layers.counted import counted_positions
from apt_model.layers.feed_forward import Experts, FeedForward
from apt_model.layers.in_place import MoEInPlace, layers_in_place, moe_layers
from apt_model.layers.metrics import METRICS
from apt_model.layers.moe import Lineage, MoE
from apt_model.layers.router import Router
from apt_model.layers.tally import layer_metrics, model_metrics
from apt_model.schedule.targets import matching

Loss = Callable[..., Tensor]
"""Maps logits (batch, seq, vocab_size) and targets (batch, seq) to a loss, 0-dim; may take ``hidden``, (batch, seq, width)."""


def switches(model: nn.Module) -> dict[str, Callable[[bool], None]]:
    """Return what enables and disables each module: those of ``model.switches()``, and its layers of experts as ``moe``."""
    found: dict[str, Callable[[bool], None]] = dict(getattr(model, "switches", dict)())
    layers = layers_in_place(model)

    def enable(on: bool) -> None:
        for layer in layers:
            layer.enable(on)

    if layers:
        found.setdefault("moe", enable)
    return found


def resize(
    model: nn.Module,
    *,
    at_least: int | None = None,
    at_most: int | None = None,
    change: Callable[[MoE, int], None] = MoE.resize,
) -> None:
    """Have each layer of experts have so many at least, or at most; neither: as many as it began with.

    Args:
        change: gives a layer another number of experts.

    Raises:
        ConfigError: the number does not fit.
    """
    for layer in moe_layers(model):
        number = max(layer.num_experts, at_least or 0)
        if at_least is None:
            number = min(layer.num_experts, at_most or layer.num_families)
        if number != layer.num_experts:
            change(layer, number)


def freezer(model: nn.Module) -> Callable[[str, bool], None]:
    """Return what stops or resumes training what a pattern means; ``model.freeze`` if it has one."""
    own = getattr(model, "freeze", None)
    if callable(own):
        return own  # type: ignore[no-any-return]

    def freeze(pattern: str, on: bool) -> None:
        parameters = dict(model.named_parameters())
        for name in matching(pattern, freezable(model)):
            for parameter in [parameters[name]] if name in parameters else model.get_submodule(name).parameters():
                parameter.requires_grad_(not on)
                parameter.grad = None

    return freeze


def freezable(model: nn.Module) -> list[str]:
    """Return the paths of modules and parameters, which a curriculum may freeze."""
    return [*(path for path, _ in model.named_modules() if path), *(name for name, _ in model.named_parameters())]


def take_lineage(model: nn.Module) -> list[Lineage]:
    """Return, once, whose optimizer state the parameters that appeared since the last call take over."""
    own = getattr(model, "take_lineage", None)
    lineage: list[Lineage] = list(own()) if callable(own) else []
    for layer in layers_in_place(model):
        lineage += layer.lineage
        layer.lineage = []
    return lineage


PARTS: Final[dict[type[nn.Module], str]] = {
    SelfAttention: "attention",
    Experts: "experts",
    Router: "router",
    FeedForward: "feed_forward",
    nn.Embedding: "embedding",
    BiStateAlignment: "align",
}
"""Parts of a model whose gradients are reported by themselves, by the modules that hold their parameters."""


def parameter_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of ``model`` by part: :data:`PARTS`, and ``other``, such as norms and a head of its own."""
    part_of: dict[nn.Parameter, str] = {}
    for module in model.modules():
        for kind, part in PARTS.items():
            if isinstance(module, kind):
                part_of |= dict.fromkeys(module.parameters(), part)
    found: dict[str, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        found.setdefault(part_of.get(parameter, "other"), []).append(parameter)
    return found


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the parts of ``model`` that are compiled, recomputed or sharded one by one.

    They are what ``model.blocks`` says, a list or a method that gives one; else the longest list of modules of one class.
    """
    own = getattr(model, "blocks", None)
    if own is not None:
        given: Iterable[nn.Module] = own() if callable(own) and not isinstance(own, nn.Module) else own
        return list(given)
    lists = [list(part) for part in model.modules() if isinstance(part, nn.ModuleList)]
    longest: list[nn.Module] = max((one for one in lists if len(set(map(type, one))) == 1), key=len, default=[])
    return longest


def recompute_blocks(model: nn.Module, on: bool) -> None:
    """Have the backward pass compute blocks again instead of keeping what is in them.

    Raises:
        ConfigError: the model cannot.
    """
    if hasattr(model, "activation_checkpointing"):
        setattr(model, "activation_checkpointing", on)  # noqa: B010 - to mypy a module has tensors and modules only
    elif on and callable(getattr(model, "gradient_checkpointing_enable", None)) and not layers_in_place(model):
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    elif on:
        raise ConfigError(
            f"trainer.activation_checkpointing: {type(model).__name__} cannot. It would have an attribute "
            "activation_checkpointing, and heed it. Set trainer.activation_checkpointing=false."
        )


class Forward:
    """Calls a model on tokens and targets, however it wants to be called, and makes an :class:`Output` of what it returns.

    A model may return an :class:`Output`, a loss (0-dim), a pair of logits and loss, logits alone, or an object with
    ``logits`` and perhaps ``loss``, ``hidden_states``, such as those of transformers. Where it takes no targets its logits
    are those of the next token at every position, and the loss is their cross-entropy.

    Args:
        loss: takes the place of the model's own; see :data:`Loss`.
        borders: of documents that do not see each other; the model is given their numbers, as ``documents``.

    Raises:
        ConfigError: it takes none.
    """

    def __init__(self, model: nn.Module, loss: Loss | None = None, borders: Borders | None = None) -> None:
        self.model = model
        self.loss = loss
        self.layers: list[MoEInPlace] = layers_in_place(model)
        self._takes = {} if isinstance(model, GPT) else dict(inspect.signature(model.forward).parameters)
        self._wants_hidden = loss is not None and _takes_hidden(loss)
        self.borders = borders
        if borders is not None and not isinstance(model, GPT) and "documents" not in self._takes:
            raise ConfigError(takes_no_documents(type(model).__name__))

    def __call__(
        self, run: Callable[..., Any], tokens: Tensor, targets: Tensor, *, with_metrics: bool = True
    ) -> Output:
        """Return what ``run``, the model or what wraps it, gives for (batch, seq) of each."""
        documents = {} if self.borders is None else {"documents": self.borders.numbers(tokens)}
        if isinstance(self.model, GPT):
            more: dict[str, Any] = {"with_hidden": True} if self._wants_hidden else {}
            more |= documents
            output: Output = run(tokens, targets, with_metrics=with_metrics, **more)
        else:
            counted = counted_positions(targets) if self.layers else None
            for layer in self.layers:
                layer.with_metrics, layer.counted = with_metrics, counted
                if self.model.training and not layer.driven:
                    layer.balance()
            output = self._output(self._run(run, tokens, targets, with_metrics, documents), targets)
            output = self._with_reports(output)
        return output if self.loss is None else self._with_loss(output, targets)

    def _run(
        self,
        run: Callable[..., Any],
        tokens: Tensor,
        targets: Tensor,
        with_metrics: bool,
        documents: Mapping[str, Tensor],
    ) -> Any:
        more: dict[str, Any] = {"with_metrics": with_metrics} if "with_metrics" in self._takes else {}
        more |= documents
        if self._wants_hidden and "output_hidden_states" in self._takes:
            more["output_hidden_states"] = True
        if "input_ids" in self._takes:  # labels stay here: those libraries shift them once more
            if "use_cache" in self._takes:
                more["use_cache"] = False
            return run(input_ids=tokens, **more)
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        given = [one for name, one in self._takes.items() if name != "documents"]
        takes_both = "targets" in self._takes or sum(one.kind in positional for one in given) > 1
        takes_both = takes_both or any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in self._takes.values())
        return run(tokens, targets, **more) if takes_both else run(tokens, **more)

    def _output(self, found: Any, targets: Tensor) -> Output:
        if isinstance(found, Output):
            return found
        logits: Any = None
        loss: Any = None
        hidden: Any = None
        if isinstance(found, Tensor):
            logits, loss = (None, found) if found.dim() == 0 else (found, None)
        elif isinstance(found, tuple) and len(found) == 2 and not hasattr(found, "logits"):
            logits, loss = found
        else:
            values = found if isinstance(found, Mapping) else vars(found) if hasattr(found, "__dict__") else {}
            logits, loss = values.get("logits"), values.get("loss")
            states = values.get("hidden_states")
            hidden = values.get("hidden") if states is None else states[-1]
        if not isinstance(loss, Tensor) and isinstance(logits, Tensor) and logits.dim() == 3:
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ConfigError(
                f"model: {type(self.model).__name__} returned {_described(found)}. The loop takes a loss (a tensor of one "
                "number), a pair (logits, loss), logits (batch, seq, vocabulary), an Output, or an object with logits or loss."
            )
        return Output(logits, loss, torch.zeros((), device=loss.device), {}, hidden=hidden)

    def _with_reports(self, output: Output) -> Output:
        """Add what layers of experts have to say."""
        given = [(layer, report) for layer in self.layers if (report := layer.take_report()) is not None]
        if not given:
            return output
        reports = complete([layer for layer, _ in given], [report for _, report in given])
        auxiliary = output.auxiliary_loss + torch.stack([report.loss for report in reports]).mean()
        sums = [report.sums for report in reports if report.sums is not None]
        if not sums:
            return output._replace(auxiliary_loss=auxiliary)
        routing = torch.stack(sums)
        values = model_metrics(layer_metrics(routing)).unbind()
        metrics = output.metrics | {f"moe/{name}": value for name, value in zip(METRICS, values, strict=True)}
        return output._replace(auxiliary_loss=auxiliary, metrics=metrics, routing=routing)

    def _with_loss(self, output: Output, targets: Tensor) -> Output:
        assert self.loss is not None
        if output.logits is None:
            raise ConfigError(
                "loss: it is made of logits, and the model gives none. For model=gpt set model.loss_chunk=null; a model of your "
                "own returns (logits, loss)."
            )
        more = {}
        if self._wants_hidden:
            if output.hidden is None:
                raise ConfigError(
                    f"loss: it takes hidden states, and {type(self.model).__name__} gives none. Return an object with logits "
                    "and hidden, or leave the parameter hidden out."
                )
            more["hidden"] = output.hidden
        loss = self.loss(output.logits, targets, **more)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ConfigError(f"loss: it returned {_described(loss)}. Return a tensor of one number.")
        return output._replace(language_loss=loss)


class Rereader(nn.Module):
    """Has a model without a cache read all tokens anew for each that comes next; see :class:`apt_model.generation.Reads`.

    Raises:
        ConfigError: when it is asked, and the model gives no logits.
    """

    def __init__(self, model: nn.Module, seq_len: int) -> None:
        super().__init__()
        self.model = model
        self.seq_len = seq_len
        self.forward_of = Forward(model)

    def new_cache(self) -> TokensRead:
        """Return a cache that remembers nothing."""
        return TokensRead()

    def next_logits(self, tokens: Tensor, cache: TokensRead) -> tuple[Tensor, dict[str, Tensor]]:
        """Read ``tokens`` (batch, seq) after those of ``cache``; return logits (batch, vocab_size) of the next, and nothing."""
        cache.tokens = tokens if cache.tokens is None else torch.cat((cache.tokens, tokens), dim=1)
        logits = self.forward_of(self.model, cache.tokens, cache.tokens, with_metrics=False).logits
        if logits is None:
            raise ConfigError(
                f"{type(self.model).__name__} gives no logits, and no text can be made of a loss. Have it return (logits, loss)."
            )
        return logits[:, -1].float(), {}


class TokensRead:
    """The tokens that were read, (batch, length)."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of each text."""
        return 0 if self.tokens is None else self.tokens.shape[1]


def expert_cosines(model: nn.Module) -> Tensor:
    """Return :meth:`Experts.cosine` of each layer whose experts are enabled, (num_layers,)."""
    return torch.stack([layer.experts.cosine() for layer in moe_layers(model) if layer.experts is not None])


def _takes_hidden(loss: Loss) -> bool:
    try:
        return "hidden" in inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    except (TypeError, ValueError):
        return False


def _described(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of the shape {tuple(found.shape)}"
    return f"something of the type {type(found).__name__}"
