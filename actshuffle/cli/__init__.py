"""The command line; `actshuffle.cli.app` puts it together."""
