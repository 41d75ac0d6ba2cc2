"""The two ways a guard can refuse: the user's mistake, and data that holds no answer."""


class GuardError(ValueError):
    """Misuse: raised at construction or at train begin, and says what to pass instead."""


class FailedRefresh(Exception):
    """One refresh gave no estimate. It is logged with its reason, and training goes on."""
