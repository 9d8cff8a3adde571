"""`python -m saetrain`, `torchrun -m saetrain`."""

import sys

from saetrain.cli import main

sys.exit(main())
