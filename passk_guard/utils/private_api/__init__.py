"""Every private or undocumented name of other libraries that is touched here, and what is said when one is gone.

Such a name may go away with any release. Each stands in `TABLE` once, with what it is for, and `check` is called where
its owner is met, at train begin at the latest: a missing name is an error with a remedy and not a wrong result later.
`tests/test_foreign_names.py` reads the sources and fails where one is touched that is not in the table.
"""

from passk_guard.utils.private_api.check import TABLE, check, installed, is_trl, supported
from passk_guard.utils.private_api.records import Private, Seam

__all__ = ["TABLE", "Private", "Seam", "check", "installed", "is_trl", "seams", "supported"]
