"""Attention under masks of O(seqlen) integers: causal, windows, documents, and modality-mutual rectangles."""
