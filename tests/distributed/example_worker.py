"""examples/grpo_deepspeed.py, left without the interpreter's shutdown, in which gloo's threads sometimes abort."""

from examples.grpo_deepspeed import main
from tests.distributed.launch import leave

if __name__ == "__main__":
    main()
    leave()
