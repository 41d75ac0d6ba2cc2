"""Settings from Python, files and a command line: what is accepted is in its bounds, all else is refused in words."""

import dataclasses
import math

import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import HfArgumentParser

from passk_guard import GuardConfig, GuardError
from passk_guard.cli import main
from passk_guard.config import config_problems
from tests.fuzz.strategies import ANY_TEXT, JSON_VALUE, NUMBER, ODD_TEXT, SCALAR, as_json, damaged, scratch

FIELDS = [field.name for field in dataclasses.fields(GuardConfig)]
NAMES = st.one_of(st.sampled_from(FIELDS), ANY_TEXT, st.sampled_from(["self", "__dataclass_self__", "args", "kwargs"]))
SETTINGS = st.dictionaries(NAMES, st.one_of(SCALAR, NUMBER, JSON_VALUE), max_size=3)
GOOD = b"k: 4\nnum_samples: 8\nmitigation: off\nthreshold: -0.1\npassk_guard: {k: 4, gate: always}\n"
YAML_BITS = st.one_of(
    st.sampled_from(
        ["k: ", "threshold: ", "- ", "? ", "&a ", "*a", "{", "}", "[", "]", ": ", "\n", "  ", "off", "~", "12"]
    ),
    st.sampled_from(
        ["!!bool x", "!!int ''", "!!float ''", "!!timestamp x", "!!binary x", "!!set {a}", "!!omap [a: 1]"]
    ),
    st.sampled_from(["!!python/object/apply:os.system ['true']", "0x" + "f" * 5000, "2020-13-45", "1e400", "<<: *a"]),
    st.sampled_from(["=", "---\n", "%YAML 9.9\n", "\t", "'", '"', "|\n"]),
)


def check(config):
    """Every promise of the bounds, said once more without pydantic."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int) and not isinstance(value, bool):
            assert 0 <= value < 2**31 + 1
        if isinstance(value, float):
            assert math.isfinite(value)
    assert 2 <= config.k <= config.num_samples
    assert 0 <= config.gamma < 1
    assert 0 < config.floor_max <= config.k


def read(path):
    """The settings of a file, or None: `from_yaml`, `config_problems` and the command must agree on it."""
    try:
        problems = config_problems(path)
    except GuardError:
        problems = ["cannot be read"]
    try:
        config = GuardConfig.from_yaml(path)
    except GuardError:
        config = None
    assert (config is None) == bool(problems)
    assert main(["check", str(path)]) == int(config is None)
    return config


@given(SETTINGS)
@example({"threshold": math.nan})
@example({"probe_temperature": math.inf})
@example({"correct_threshold": math.nan})
@example({"refresh_steps": True})
@example({"probe_seed": 2**63})
def test_from_python(given_settings):
    try:
        config = GuardConfig(**{str(name): value for name, value in given_settings.items()})
    except (ValidationError, TypeError):  # TypeError: Python's own, for a name given twice
        return
    check(config)
    for name, value in given_settings.items():
        assert not isinstance(value, bool) or isinstance(getattr(config, name), (bool, str, type(None)))


@given(SETTINGS)
@example({"self": 1})
@example({"__dataclass_self__": 1})
def test_from_json(given_settings):
    with scratch() as folder:
        path = folder / "guard.json"
        path.write_text(as_json(given_settings))
        if (config := read(path)) is not None:
            check(config)


@given(st.dictionaries(st.one_of(NAMES, SCALAR), st.one_of(SCALAR, JSON_VALUE, st.dates(), st.binary()), max_size=3))
def test_from_yaml(given_settings):
    with scratch() as folder:
        path = folder / "guard.yaml"
        try:
            path.write_text(yaml.safe_dump(given_settings, allow_unicode=True))
        except (UnicodeEncodeError, ValueError):
            return
        if (config := read(path)) is not None:
            check(config)


@given(st.one_of(damaged(GOOD), st.lists(YAML_BITS, max_size=12).map(lambda bits: "".join(bits).encode())))
@example(b"k: !!bool maybe\n")
@example(b"k: !!timestamp x\n")
@example(b"k: !!int ''\n")
@example(b"0x" + b"f" * 5000 + b": 1\n")
@example(b"k: 0x" + b"f" * 5000 + b"\n")
@example(b"a\nb: 1\n\x1b[31m: 2")
@example(b"[" * 900)
def test_any_bytes(content):
    with scratch() as folder:
        path = folder / "guard.yaml"
        path.write_bytes(content)
        read(path)


def test_a_file_that_doubles_itself_thirty_times_is_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30)] + ["k: *a29"]
    path = tmp_path / "guard.yaml"
    path.write_text("\n".join(lines))
    assert read(path) is None


@given(st.lists(st.tuples(st.sampled_from(FIELDS), st.one_of(SCALAR, NUMBER, ODD_TEXT)), max_size=3))
def test_from_a_command_line(pairs):
    line = []
    for name, value in pairs:
        try:
            line += [f"--{name}={value}"]
        except ValueError:  # a whole number of more digits than Python writes
            return
    try:
        (config,) = HfArgumentParser((GuardConfig,)).parse_args_into_dataclasses(line, look_for_args_file=False)
    except (ValidationError, SystemExit):  # argparse has said what is wrong
        return
    check(config)
