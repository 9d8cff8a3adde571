"""Products of two dictionaries that are too large to store: the largest entries, and what was left out."""
