"""The weighings φ(P, G) of the attention map by its gradient, in torch. P ≥ 0, so P·relu(G) = relu(P·G)."""

from __future__ import annotations

from torch import Tensor

PHIS = ("p", "p_relu_g", "p_g", "relu_g", "abs_g")
WITH_MAP = frozenset({"p", "p_relu_g", "p_g"})
WITH_GRADIENT = frozenset({"p_relu_g", "p_g", "relu_g", "abs_g"})


def expect_phi(phi: str) -> None:
    """Refuse an unknown name, with ``ValueError``."""
    if phi not in PHIS:
        raise ValueError(f"phi: expected one of {', '.join(PHIS)}, received {phi!r}")


def weighed(probabilities: Tensor | None, gradient: Tensor | None, phi: str) -> Tensor:
    """φ(P, G) of a tile; may overwrite either."""
    if phi == "p":
        assert probabilities is not None, "phi 'p' reads the map"
        return probabilities
    assert gradient is not None, f"phi {phi!r} reads the gradient"
    if phi == "abs_g":
        return gradient.abs_()
    if phi == "relu_g":
        return gradient.relu_()
    assert probabilities is not None, f"phi {phi!r} reads the map"
    return probabilities.mul_(gradient if phi == "p_g" else gradient.relu_())
