"""`python -m passk_guard` is `passk-guard`."""

import sys

from passk_guard.cli import main

if __name__ == "__main__":
    sys.exit(main())
