"""Runs from Python and from the command line: calls that train, sweeps, and the folders that they leave."""
