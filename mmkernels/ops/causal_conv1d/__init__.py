"""Causal depthwise convolution over time, with states and packed sequences."""
