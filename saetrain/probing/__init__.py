"""A causal language model in the loop: what a dictionary keeps of it, and what its features do to it."""
