"""All faults that docs/faults.md lists."""

from tests.mutations.kept_rollouts import KEPT_ROLLOUTS
from tests.mutations.one_process import ONE_PROCESS
from tests.mutations.two_ranks import TWO_RANKS

MUTATIONS = ONE_PROCESS + TWO_RANKS + KEPT_ROLLOUTS
