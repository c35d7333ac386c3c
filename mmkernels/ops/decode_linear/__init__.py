"""A few rows times a large matrix: the linear layer of a decode step."""
