"""The packages that the tests run with are pinned, every one, and under licences that allow what users do with them."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ALLOWED = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|PSF|Python Software Foundation|ISC|MPL|Mozilla|Zlib|CC0|CNRI|BSL|HPND|Unlicense)",
    re.IGNORECASE,
)
FORBIDDEN = re.compile(r"\b(A?GPL|GNU|SSPL|BUSL|Commons Clause|non-?commercial|proprietary)", re.IGNORECASE)
READ_BY_HAND = {"zss": "BSD-3-Clause, in its repository; the package names none"}
INSTALLERS = {"passk-guard", "pip", "wheel"}


def asked_for(name, extras):
    """What an installed package with these extras asks for here."""
    for line in importlib.metadata.requires(name) or ():
        wanted = Requirement(line)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": e}) for e in ("", *extras)):
            yield wanted


def closure(name, extras, seen=None):
    """Every installed package that passk_guard with these extras asks for, directly or not, with its extras."""
    seen = {} if seen is None else seen
    try:
        importlib.metadata.distribution(name)
    except (
        importlib.metadata.PackageNotFoundError
    ):  # for another platform, or an extra of a package that is not asked for
        return seen
    name = canonicalize_name(name)
    new = set(extras) - seen.get(name, set())
    if name in seen and not new:
        return seen
    seen.setdefault(name, set()).update(extras)
    for wanted in asked_for(name, seen[name]):
        closure(wanted.name, wanted.extras, seen)
    return seen


CLOSURE = closure("passk-guard", {"test"})
PACKAGES = sorted(set(CLOSURE) - INSTALLERS)


def pins(file):
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def installed(name):
    return importlib.metadata.version(name).split("+")[0]  # torch says +cpu


def chosen():
    """The file this environment was installed with: `make test` or `make test-oldest`."""
    oldest = pins("constraints-oldest.txt")
    return oldest if installed("transformers") == oldest["transformers"] else pins("constraints.txt")


def test_there_is_something_to_look_at():
    assert len(PACKAGES) > 50


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_is_pinned_at_what_is_installed(name):
    assert chosen().get(name) == installed(name)


@pytest.mark.parametrize("name", sorted(CLOSURE))
def test_every_package_finds_what_it_asks_for(name):
    for wanted in asked_for(name, CLOSURE[name]):
        if canonicalize_name(wanted.name) in CLOSURE:
            assert wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True), wanted


def test_nothing_is_pinned_that_nothing_asks_for():
    assert set(pins("constraints.txt")) - set(PACKAGES) == set() or chosen() != pins("constraints.txt")


@pytest.mark.parametrize("name", PACKAGES)
def test_every_licence_is_an_open_one(name):
    said = importlib.metadata.metadata(name)
    classifiers = [c for c in said.get_all("Classifier") or () if c.startswith("License")]
    stated = " ".join([said.get("License-Expression") or "", *classifiers, (said.get("License") or "")[:200]])
    if name in READ_BY_HAND:
        assert not stated.strip(), "it names one now: take it off the list"
        return
    assert ALLOWED.search(stated), stated
    assert not FORBIDDEN.search(stated), stated
