"""`python -m emo_megatron`: the command line."""

import sys

from emo_megatron.cli import main

sys.exit(main())
