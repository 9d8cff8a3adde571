"""The command line; `saetrain.cli.app` puts it together."""

from saetrain.cli.app import main

__all__ = ["main"]
