"""examples/grpo_deepspeed.py, left without the interpreter's shutdown, in which gloo's threads sometimes abort."""

import os
import sys

from examples.grpo_deepspeed import main

if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
