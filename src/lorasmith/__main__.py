"""`python -m lorasmith`, and with it `torchrun -m lorasmith train`."""

import sys

from lorasmith.cli.main import main

sys.exit(main())
