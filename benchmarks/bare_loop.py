"""A training step with nothing around it: model, loss, fp32 masters, clipping and optimizer, written plainly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_dist.config import RunConfig
from dlm_dist.diffusion.model_inputs import on_device
from dlm_dist.training.optimizers import build_optimizer, parameter_groups


class BareLoop:
    """Steps on micro-batches that are ready on the host. Takes over `model` (fp32) and casts its weights.

    With `full_logits` the loss is the one that published code computes (LLaDA's GUIDELINES.md): logits of all
    positions, then the cross entropy of the masked ones in fp32. Value and gradient are those of ours.
    """

    def __init__(self, model: Any, config: RunConfig, device: torch.device, full_logits: bool = False) -> None:
        settings = config.optimizer
        self.model = model.to(device).train()
        self.device = device
        self.full_logits = full_logits
        self.clipping = config.train.gradient_clipping
        groups = parameter_groups(
            model, model.parameter_roles(), settings.lr, settings.weight_decay, settings.name.endswith("8bit")
        )
        self.weights = [weight for group in groups for weight in group["params"]]
        self.masters = self.weights
        if config.train.precision == "bf16":
            masters = {weight: torch.nn.Parameter(weight.detach().clone()) for weight in self.weights}
            self.masters = list(masters.values())
            for weight in self.weights:
                weight.data = weight.data.bfloat16()
            for group in groups:
                group["params"] = [masters[weight] for weight in group["params"]]
        self.optimizer = build_optimizer(settings.name, groups, settings.lr, settings.betas, settings.eps, guard=False)

    def step(self, micro_batches: Sequence[Mapping[str, Tensor]], denominator: int) -> Tensor:
        """One optimizer step -> the loss, 0-d, on the device."""
        total = torch.zeros((), device=self.device)
        for micro_batch in micro_batches:
            inputs = on_device(micro_batch, self.device)
            loss = (self._full_logits_loss(**inputs) if self.full_logits else self.model(**inputs)) / denominator
            loss.backward()
            total += loss.detach()
            if self.masters is not self.weights:
                self._accumulate()
        torch.nn.utils.clip_grad_norm_(self.masters, self.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters is not self.weights:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        return total

    def _accumulate(self) -> None:
        """Move the bf16 gradients of one micro-batch into the fp32 ones."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad += weight.grad
            weight.grad = None

    def _full_logits_loss(
        self,
        input_ids: Tensor,
        supervised: Tensor,
        targets: Tensor,
        weights: Tensor,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        logits = self.model(input_ids, document_ids=document_ids).logits.flatten(0, 1)
        losses = F.cross_entropy(logits[supervised].float(), targets, reduction="none")
        return (losses * weights).sum()
