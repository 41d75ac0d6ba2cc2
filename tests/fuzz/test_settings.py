"""Settings from Python, files and a command line: what is accepted is in its bounds, all else is refused in words."""

import dataclasses
import math

import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import HfArgumentParser

from passk_guard import Advanced, GuardConfig, GuardError
from passk_guard.cli import main
from passk_guard.config import config_problems
from tests.fuzz.strategies import ANY_TEXT, JSON_VALUE, NUMBER, ODD_TEXT, SCALAR, as_json, damaged, scratch

FIELDS = [field.name for kind in (GuardConfig, Advanced) for field in dataclasses.fields(kind)]
NAMES = st.one_of(st.sampled_from(FIELDS), ANY_TEXT, st.sampled_from(["self", "__dataclass_self__", "args", "kwargs"]))
SETTINGS = st.dictionaries(NAMES, st.one_of(SCALAR, NUMBER, JSON_VALUE), max_size=3)
GOOD = b"k: 4\nnum_samples: 8\nmitigation: off\nthreshold: -0.1\nadvanced: {alert_rule: each_look}\n"


def check(config):
    """Every promise of the bounds, said once more without pydantic."""
    for value in [*vars(config).values(), *vars(config.advanced).values()]:
        if isinstance(value, int) and not isinstance(value, bool):
            assert 0 <= value < 2**31
        if isinstance(value, float):
            assert math.isfinite(value)
    assert 2 <= config.k <= config.num_samples
    assert 0 <= config.gamma < 1
    assert 0 < config.floor_max <= config.k
    assert 0.5 < config.advanced.gate_confidence < 1


def read(path, content):
    """`from_yaml`, `config_problems` and the command must agree on a file."""
    path.write_bytes(content)
    try:
        problems = config_problems(path)
    except GuardError:
        problems = ["cannot be read"]
    try:
        check(GuardConfig.from_yaml(path))
        assert not problems
    except GuardError:
        assert problems
    assert main(["check", str(path)]) == int(bool(problems))


@given(SETTINGS)
@example({"self": 1})
@example({"__dataclass_self__": 1})
@example({"advanced": "[]"})
def test_from_python(settings):
    try:
        config = GuardConfig(**settings)
    except (ValidationError, TypeError):  # TypeError: Python's own, for a name given twice
        return
    check(config)


@given(st.dictionaries(st.one_of(NAMES, SCALAR), st.one_of(SCALAR, JSON_VALUE, st.dates()), max_size=3))
@example({"self": 1})
@example({"__dataclass_self__": 1})
def test_from_a_file(settings):
    with scratch() as folder:
        read(folder / "guard.json", as_json({str(name): str(value) for name, value in settings.items()}).encode())
        try:
            text = yaml.safe_dump(settings, allow_unicode=True).encode()
        except ValueError:  # halves of surrogate pairs, and whole numbers of more digits than Python writes
            return
        read(folder / "guard.yaml", text)


@given(damaged(GOOD))
@example(b"a\nb: 1\n\x1b[31m: 2")
@example(b"[" * 900)
def test_any_bytes(content):
    with scratch() as folder:
        read(folder / "guard.yaml", content)


@given(st.lists(st.tuples(st.sampled_from(FIELDS), st.one_of(SCALAR, NUMBER, ODD_TEXT)), max_size=3))
def test_from_a_command_line(pairs):
    line = [f"--{name}={value}" for name, value in pairs]
    try:
        (config,) = HfArgumentParser((GuardConfig,)).parse_args_into_dataclasses(line, look_for_args_file=False)
    except (ValueError, SystemExit):  # argparse has written what is wrong
        return
    check(config)
