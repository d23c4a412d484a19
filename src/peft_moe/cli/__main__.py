"""`python -m peft_moe.cli` is `peft-moe`."""

import sys

from . import main

sys.exit(main())
