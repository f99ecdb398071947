"""`python -m smolora.cli`, the same as `smolora`."""

import sys

from . import main

sys.exit(main())
