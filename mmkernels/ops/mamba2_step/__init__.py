"""One token of a Mamba-2 block: norm, projections, convolution, state update and gate in one call."""
