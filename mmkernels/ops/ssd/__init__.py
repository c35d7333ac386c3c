"""State-space duality (Mamba-2): the chunked scan over a sequence and the one-token update of its recurrent state."""
