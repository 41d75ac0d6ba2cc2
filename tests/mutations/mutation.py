"""What is taken away, and the test that must then fail."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """`old`, which stands once in passk_guard/`file`, becomes `new`; `test` is a pytest id below tests/.

    `effect` says what the fault comes to while its handling stands.
    """

    fault: str
    effect: str
    file: str
    old: str
    new: str
    test: str
