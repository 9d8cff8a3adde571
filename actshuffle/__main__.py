"""Run the command line by ``python -m actshuffle``."""

from actshuffle.cli.app import main

if __name__ == "__main__":  # also imported by the workers of a cluster that it starts
    main(prog_name="actshuffle")
