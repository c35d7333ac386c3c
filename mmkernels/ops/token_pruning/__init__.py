"""Visual-token pruning: scores of tokens, and the choice among them."""
