"""The output layer, which knows how to turn hidden rows into a loss without holding their logits."""

from __future__ import annotations

from typing import overload

from torch import Tensor, nn

from dlm_dist.kernels.cross_entropy import weighted_cross_entropy


class LossHead(nn.Linear):
    """A linear map [V, C] without bias whose forward gives logits, or the loss of the rows that enter it.

    The loss is computed here and not by the caller because ZeRO-3 gathers a module's weight around that module's
    own forward and backward; tied to the embedding or not makes no difference.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    @overload
    def forward(self, hidden: Tensor) -> Tensor: ...

    @overload
    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        per_row: bool = False,
        l2wrap: float | None = None,
        label_smoothing: float = 0.0,
        confidence_weight: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        per_row: bool = False,
        l2wrap: float | None = None,
        label_smoothing: float = 0.0,
        confidence_weight: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [..., V] of `hidden` [..., C]; with `targets` [M] and `weights` [M] fp32 the loss of `hidden` [M, C].

        The loss is sum_i weights[i] * cross entropy of row i, 0-d fp32; with `per_row` it comes together with the
        unweighted losses of the rows, [M] fp32 without gradient. M may be 0. `label_smoothing`, `confidence_weight`,
        `l2wrap` and `z_loss`: see `weighted_cross_entropy`. For an L2Wrap or z-loss of strength s per mean over N rows,
        of whose loss this sum over D is a part, it is s * D / N.
        """
        if targets is None and weights is None and not per_row:
            return super().forward(hidden)
        if targets is None or weights is None:
            raise ValueError("A loss needs both targets [M] and weights [M].")
        total, rows = weighted_cross_entropy(
            hidden, self.weight, targets, weights, None, l2wrap, label_smoothing, confidence_weight, z_loss
        )
        return (total, rows) if per_row else total
