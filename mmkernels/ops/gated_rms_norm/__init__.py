"""RMS normalisation by groups of channels with a SiLU gate before or after it."""
