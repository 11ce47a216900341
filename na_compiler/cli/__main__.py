"""``python -m na_compiler.cli``."""

import sys

from na_compiler.cli import main

sys.exit(main())
