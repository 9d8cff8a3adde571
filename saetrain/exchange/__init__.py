"""Folders of other tools: their weights, written and read, and what they say of themselves."""
