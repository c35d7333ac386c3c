"""Scans of a grid in several directions: orders, cross_scan, cross_merge, and the ops that read through them."""
