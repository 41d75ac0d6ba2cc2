"""README.md is one page. Its script is that of tests/examples/test_quickstart.py, its links those of test_pages.py."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_one_page():
    assert len(README.split()) <= 700


def test_the_two_commands_of_a_checkout():
    """CI calls them."""
    from tests.project.test_pages import blocks

    commands = [line.split("#")[0].strip() for code in blocks(README, "") for line in code.splitlines()]
    assert {"make demo", "make test"} <= set(commands)
