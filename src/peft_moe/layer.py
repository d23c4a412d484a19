"""The one layer: a linear base layer with a bank of experts and a router beside it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from . import fused
from .bank import ExpertBank
from .offloading import onloaded
from .quantised import Aside, backend_of, check_can_merge, is_quantised_linear, requantise, weight_of
from .routing import Batch, GroupedRouter, Router, RoutingContext, TaskRouter, View
from .shortcut import Shortcut
from .stand_in import StandIn, fingerprint

# Linear layers of a base model's own experts: their inputs are tokens picked from all rows.
IN_BASE_EXPERTS = re.compile(r"(^|\.)experts\.(expert_)?\d+(\.|$)")


class MoeLinear(nn.Module, BaseTunerLayer):
    """`base_layer(x) + bank(x, router(x))`, per adapter.

    Args:
        base_layer: `nn.Linear`, GPT-2's `Conv1D`, or a quantised or other layer with `in_features` and `out_features`.
        context: where the tuner leaves what a call was told.
        fan_in_fan_out: the base weight is stored (in, out).
    """

    adapter_layer_names = ("moelora_bank", "moelora_router")
    other_param_names = ("shared_routers", "stand_ins")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        context: RoutingContext,
        fan_in_fan_out: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.context = context
        self.fan_in_fan_out = fan_in_fan_out
        self.moelora_bank = nn.ModuleDict()
        self.moelora_router = nn.ModuleDict()
        self.shared_routers: dict[str, Router] = {}  # registered on the tuner, so not here: a parameter has one name
        self.stand_ins: dict[str, StandIn] = {}  # from `calibrate`; an adapter's weights do not depend on them
        self.in_features, self.out_features = cast(tuple[int, int], _get_in_out_features(self.get_base_layer()))
        self.quantization_backend = backend_of(self.get_base_layer(), **kwargs)
        self.cast_input_dtype_enabled = True
        self.merged_adapters: list[str] = []
        # what to take out again, whatever is trained meanwhile
        self._merged_weights: dict[str, torch.Tensor | StandIn | None] = {}
        self._unmerged: Aside | None = None  # a quantised base as it was before merging
        self._shortcut: Shortcut | None = None  # for the next call without a gradient
        self._disable_adapters = False
        self._active_adapter: str | list[str] = adapter_name
        self.train(base_layer.training)

    def update_layer(self, adapter_name: str, *, bank: ExpertBank, router: Router | None, shared: bool) -> None:
        """Add an adapter. A shared router is held by reference; no router is a plain LoRA."""
        self.moelora_bank[adapter_name] = bank.train(self.training)
        if router is not None:
            routers: Any = self.shared_routers if shared else self.moelora_router
            routers[adapter_name] = router.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As in peft, but routers and trained experts keep their type, which rounding and widening would not give back.

        Neither goes to the meta device, where its weights would be lost.
        """
        if adapter_name not in self.moelora_bank:
            return
        kept = {}
        if adapter_name in self.moelora_router:
            kept["moelora_router"] = self.moelora_router[adapter_name]
        if self.bank(adapter_name).pretrained:
            kept["moelora_bank"] = self.moelora_bank[adapter_name]
        for name in kept:
            del getattr(self, name)[adapter_name]
        try:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        finally:
            for name, module in kept.items():
                getattr(self, name)[adapter_name] = module
        target = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for module in kept.values():
            if target is not None and target.type != "meta" and not any(p.is_meta for p in module.parameters()):
                module.to(device=target)

    def cast_adapter(self, adapter_name: str, *, widen: bool) -> None:
        """Cast what `_move_adapter_to_device_of_base_layer` left alone.

        Args:
            widen: trained experts in half precision to float32, as peft does with an adapter's parameters; else to the
                type of the base layer, and the router, which computes in float32 in any case, to that of the bank.
        """
        if adapter_name not in self.moelora_bank:
            return
        bank = self.bank(adapter_name)
        if bank.pretrained:
            dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
            if widen and bank.lora_A.weight.dtype in (torch.float16, torch.bfloat16):
                bank.float()
            elif not widen and dtype is not None and dtype.is_floating_point:
                bank.to(dtype)
        if not widen and adapter_name in self.moelora_router:
            self.moelora_router[adapter_name].to(bank.lora_A.weight.dtype)

    def _replicate_for_data_parallel(self) -> NoReturn:
        """What `torch.nn.DataParallel` calls, which Trainer uses where it sees several GPUs and no launcher."""
        raise RuntimeError(
            "torch.nn.DataParallel copies a model in every call, without what tells the copies' layers which rows they "
            "have. For several GPUs start the script with `accelerate launch` or `torchrun`; for one, set "
            "CUDA_VISIBLE_DEVICES=0 before it starts."
        )

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output (..., out), and to it what the experts of the active adapters add.

        Args:
            x: (..., in).
            args, kwargs: what else the base layer takes.

        Disabled adapters add nothing; merged ones are in the base layer's weights already.
        """
        if not torch.compiler.is_compiling():
            shortcut = self._shortcut
            if shortcut is not None and not (args or kwargs) and shortcut.fits(self, x):
                return shortcut.run(x)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return cast(torch.Tensor, self.base_layer(x, *args, **kwargs))
        adapters = [name for name in self.active_adapters if name in self.moelora_bank]
        if (parts := self.context.parts) is not None:
            return self._add_to_rows(self.call_base(x, *args, **kwargs), x, parts)
        if adapters and not (args or kwargs) and fused.can_run(self, x, adapters):
            if not torch.is_grad_enabled():
                self._shortcut = Shortcut.of(self, adapters)
                if self._shortcut is not None and self._shortcut.fits(self, x):  # the same to the bit from now on
                    return self._shortcut.run(x)
            return fused.run(self, x, adapters)
        return self.add(self.call_base(x, *args, **kwargs), x, adapters)

    def call_base(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the base layer makes of x."""
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return (
            result if self.quantization_backend is None else self.quantization_backend.maybe_clone_base_result(result)
        )

    def add(self, result: torch.Tensor, x: torch.Tensor, adapters: Sequence[str]) -> torch.Tensor:
        """`result` (..., out) of the base layer and what adapters make of x (..., in), by calling their modules.

        The reference for `kernels`, and what is compiled.
        """
        dtype = result.dtype
        for adapter in adapters:
            bank = self.bank(adapter)
            x = self._cast_input_dtype(x, bank.lora_A.weight.dtype)
            result = result + bank(x, self.weights(adapter, x))
        return result.to(dtype)

    def _add_to_rows(self, result: torch.Tensor, x: torch.Tensor, adapters: Iterable[str]) -> torch.Tensor:
        """Add to each row what its adapter makes of it, as if these rows had come alone."""
        mixed = result.clone()
        for adapter in adapters:
            if adapter not in self.moelora_bank:
                continue
            view = self.context.view(adapter)
            positions, own, base = view.positions_in(x), view.own(x), view.own(result)
            if fused.can_run(self, x, [adapter]):
                added = fused.add(self, adapter, own, view, base, writable=positions is not None)
            else:
                bank = self.bank(adapter)
                own = self._cast_input_dtype(own, bank.lora_A.weight.dtype)
                added = base + bank(own, self.weights(adapter, own, view))
            if positions is None:
                return added.to(result.dtype)
            mixed.index_copy_(0, positions, added.to(result.dtype))
        return mixed

    def router_of(self, adapter_name: str) -> Router | None:
        """The router of an adapter, its own or the shared one; None for a bank of one."""
        if adapter_name in self.moelora_router:
            return cast(Router, self.moelora_router[adapter_name])
        return self.shared_routers.get(adapter_name)

    def bank(self, adapter: str) -> ExpertBank:
        """The bank of an adapter."""
        return cast(ExpertBank, self.moelora_bank[adapter])

    def weights(
        self, adapter: str, x: torch.Tensor, view: View | None = None, product: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """What the router gives experts for x (..., in): (..., E), leading axes broadcast; None for a bank of one.

        Args:
            adapter: its name.
            x: (..., in).
            view: what the router sees of the call, if it is not all of it.
            product: (..., E), x times the gate's weight, if it has been made.
        """
        router, bank = self.router_of(adapter), self.bank(adapter)
        if router is None:
            return None
        view = view or self.context.view(adapter)
        weights: torch.Tensor = router(x, view) if product is None else router(x, view, product)
        if bank.num_anchored and self.training and view.ledger is not None:
            weights = view.ledger.charge(f"{adapter}.base", bank.anchor_coefficient, bank.anchor_loss(), weights)
        return weights

    def reads_input(self, adapter: str) -> bool:
        """Whether what an adapter adds here depends on the input, even for one task."""
        router = self.router_of(adapter)
        if isinstance(router, GroupedRouter):
            return bool(router.free_choices(self.context.controls.get(adapter)))
        return not (router is None or isinstance(router, TaskRouter))

    def check_mergeable(self, adapter: str) -> None:
        """Raise a ValueError if no weights of an adapter, nor a stand-in, hold for every input."""
        if adapter in self.moelora_bank:
            self._merge_weights(adapter)

    def _merge_weights(self, adapter: str) -> torch.Tensor | StandIn | None:
        """Weights (E,) that hold for every input: of the chosen task, or fixed by the user; or else the stand-in."""
        router = self.router_of(adapter)
        if router is None:
            return None
        if isinstance(router, TaskRouter):
            return router.of_tasks(self.context.one_task(adapter))[0]
        if not self.reads_input(adapter):
            with onloaded(router):  # which another layer may hold, so that peft brings back this one alone
                return cast(GroupedRouter, router).constant(self.context.controls.get(adapter))
        return self.stand_in(adapter)

    def stand_in(self, adapter: str) -> StandIn:
        """The LoRA that `calibrate` has found to come closest to an adapter here.

        Raises:
            ValueError: there is none, or the adapter's weights have changed since.
        """
        router = self.router_of(adapter)
        if adapter not in self.stand_ins:
            free = isinstance(router, GroupedRouter) and router.free_choices(self.context.controls.get(adapter))
            raise not_mergeable(adapter, free or ())
        if self.stand_ins[adapter].made_for != self.fingerprint(adapter):
            raise ValueError(
                f"Adapter {adapter!r} has changed since it was calibrated; call peft_moe.calibrate(model, batches) "
                "again."
            )
        return self.stand_ins[adapter]

    def fingerprint(self, adapter: str) -> int:
        """A number that changes with what an adapter does here."""
        bank, router, control = self.bank(adapter), self.router_of(adapter), self.context.controls.get(adapter)
        with onloaded(bank, router):
            tensors = [bank.lora_A.weight, bank.lora_B.weight, *(router.parameters() if router is not None else ())]
            return fingerprint(tensors if control is None else [*tensors, control.numbers()])

    def tokens_that_count(self, adapter: str, x: torch.Tensor) -> torch.Tensor | None:
        """(t,) true for the tokens of an input (..., in) that are no padding, as far as the call says; None for all."""
        batch = self.context.view(adapter).batch or Batch(rows=x.shape[0])
        _, mask = batch.tokens_of(x, in_decoder=bool(getattr(self.router_of(adapter), "in_decoder", False)))
        return None if mask is None else mask.flatten()

    def folded(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r) of the LoRA of scaling 1 that an adapter is here, or that stands in for it."""
        weights, bank = self._merge_weights(adapter), self.bank(adapter)
        with onloaded(bank):
            return weights[:2] if isinstance(weights, StandIn) else bank.folded(weights)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What an adapter adds to the base weight, for the chosen task or fixed weights, in the base weight's shape.

        Where experts are chosen by the input, it is what `calibrate` has found to come closest.

        Raises:
            ValueError: what is added depends on the input and was not calibrated, or on a task and none was chosen.
        """
        return self._delta_weight(adapter_name, self._merge_weights(adapter_name))

    @torch.no_grad()
    def _delta_weight(self, adapter: str, weights: torch.Tensor | StandIn | None) -> torch.Tensor:
        bank = self.bank(adapter)
        if isinstance(weights, StandIn):
            delta = weights.delta_weight().to(bank.lora_A.weight)
        else:
            delta = bank.delta_weight(None if weights is None else weights.to(bank.lora_A.weight.device))
        return delta.T if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, for the task chosen with `set_task`, `task` or `default_task`, or for the
        weights that were fixed with `set_group_weights` or `routing`; otherwise what `calibrate` has found.

        Raises:
            ValueError: no task was chosen, or weights depend on the input and were not calibrated; with `safe_merge`,
                also a merged weight that is not finite. The weight is then as before.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.moelora_bank:
                continue
            weights = self._merge_weights(adapter)
            self._add_to_base(self._delta_weight(adapter, weights), adapter if safe_merge else None)
            self.merged_adapters.append(adapter)
            self.context.in_base.add(adapter)
            self._merged_weights[adapter] = weights
            if isinstance(self.router_of(adapter), TaskRouter):
                self.context.merged[adapter] = self.context.one_task(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take merged adapters out of the base weight again; a quantised weight is put back as it was."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        done = self._unmerged is not None and self._unmerged.put_back(self)
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            weights = self._merged_weights.pop(adapter)
            if not done:
                self._add_to_base(-self._delta_weight(adapter, weights))
            self.context.merged.pop(adapter, None)
            self.context.in_base.discard(adapter)
        self._unmerged = None

    def check_finite(self, adapter_names: Sequence[str]) -> None:
        """Raise a ValueError if a weight of these adapters is NaN or infinite."""
        for name in set(adapter_names) & self.moelora_bank.keys():
            bank = self.bank(name)
            with onloaded(bank):
                finite = all(bool(w.isfinite().all()) for w in (bank.lora_A.weight, bank.lora_B.weight))
            if not finite:
                raise broken(name)

    def _add_to_base(self, delta: torch.Tensor, check_for: str | None = None) -> None:
        check_can_merge(self)
        weight = weight_of(self)
        delta = delta.to(device=weight.device)
        merged = weight + delta.to(weight.dtype)
        if check_for is not None and not torch.isfinite(merged).all():
            raise broken(check_for)
        if self.quantization_backend is None:
            self.set_base_weight(merged)
            return
        before = Aside(self.get_base_layer())
        loss = requantise(self, weight, delta, measure=self.context.requantised is not None)
        self._unmerged = self._unmerged or before
        if self.context.requantised is not None and loss is not None:
            self.context.requantised.setdefault(self.quantization_backend.backend_name, []).append(loss)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name in self.stand_ins or not self.reads_input(adapter_name)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "peft_moe." + super().__repr__()


def broken(adapter: str) -> ValueError:
    """The error for merging weights that are no numbers, in peft's words, which its users search for."""
    return ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")


def not_mergeable(adapter: str, free: Sequence[str] = ()) -> ValueError:
    """The error for merging an adapter whose experts are chosen by the input.

    Args:
        adapter: its name.
        free: what the input decides and a user could fix.
    """
    closest = "or let peft_moe.calibrate(model, batches) find the LoRA that comes closest to it, and merge that"
    if free:
        return ValueError(
            f"Adapter {adapter!r} cannot be merged exactly while {', '.join(free)} depend on the input; fix them with "
            f"model.set_group_weights(...) or `with model.routing(...)`, {closest}."
        )
    return ValueError(
        f"Adapter {adapter!r} chooses experts for each token, so that no single weight matrix does what it does; keep "
        f"it as an adapter, {closest}."
    )


def check_base_layer(module: nn.Module, key: str) -> None:
    """Raise a ValueError unless `MoeLinear` can extend the module."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"Target module {key!r} belongs to torch.nn.MultiheadAttention, which reads its weight and never calls "
            "it, so that an adapter would have no effect; name it in exclude_modules."
        )
    linear = isinstance(base, (nn.Linear, Conv1D)) or is_quantised_linear(base)
    if not linear and not (hasattr(base, "in_features") and hasattr(base, "out_features")):
        raise ValueError(
            f"Target module {key!r} is a {type(base).__name__}, which is not supported: experts extend linear layers "
            "(torch.nn.Linear, transformers' Conv1D, quantised ones); name it in exclude_modules."
        )
