"""No positions at all (NoPE; Kazemnejad et al. 2023, arXiv:2305.19466): only the causal mask tells before from after."""

from positions.base import Position  # noqa: F401
