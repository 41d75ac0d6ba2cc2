"""A patched method, and every order in which patches can be taken off again."""

import itertools

import pytest

from passk_guard.utils.errors import GuardError
from passk_guard.utils.patching import MethodPatch


class Greeter:
    def greet(self, name: str) -> str:
        """Say hello."""
        return f"hello {name}"


def adding(suffix: str):
    return lambda original: lambda *args, **kwargs: original(*args, **kwargs) + suffix


def test_wraps_one_instance_and_restores_it_exactly():
    greeter, other = Greeter(), Greeter()
    with MethodPatch(greeter, "greet", adding("!")) as patch:
        assert patch.installed
        assert greeter.greet("you") == "hello you!"
        assert greeter.greet.__doc__ == "Say hello."
        assert other.greet("you") == "hello you"
    assert vars(greeter) == {}
    assert greeter.greet("you") == "hello you"


def test_an_instance_attribute_there_before_comes_back():
    greeter = Greeter()
    mine = greeter.greet = lambda name: "hi"
    with MethodPatch(greeter, "greet", adding("!")):
        assert greeter.greet("you") == "hi!"
    assert vars(greeter) == {"greet": mine}


def test_restored_after_an_exception():
    greeter = Greeter()
    with pytest.raises(RuntimeError), MethodPatch(greeter, "greet", adding("!")):
        raise RuntimeError
    assert vars(greeter) == {}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_removal_in_any_order(order):
    greeter = Greeter()
    patches = [MethodPatch(greeter, "greet", adding(str(i)), owner=i).install() for i in range(3)]
    left = set(range(3))
    for i in order:
        patches[i].remove()
        left.remove(i)
        assert greeter.greet("") == "hello " + "".join(map(str, sorted(left)))
    assert vars(greeter) == {}


def test_under_a_stranger_it_becomes_a_pass_through_and_can_be_installed_again():
    greeter = Greeter()
    patch = MethodPatch(greeter, "greet", adding("!")).install()
    ours = greeter.greet
    greeter.greet = lambda name: ours(name) + "?"
    patch.remove()
    assert greeter.greet("") == "hello ?"
    patch.install()
    assert greeter.greet("") == "hello ?!"
    patch.remove()
    assert greeter.greet("") == "hello ?"


def test_one_owner_patches_once():
    greeter = Greeter()
    with MethodPatch(greeter, "greet", adding("!"), owner="a"):
        with pytest.raises(GuardError, match=r"`Greeter.greet` is already patched by 'a'"):
            MethodPatch(greeter, "greet", adding("?"), owner="a").install()
        with MethodPatch(greeter, "greet", adding("?"), owner="b"):
            assert greeter.greet("") == "hello !?"
    MethodPatch(greeter, "greet", adding("?"), owner="a").install()


def test_removing_twice_or_without_installing_does_nothing():
    greeter = Greeter()
    patch = MethodPatch(greeter, "greet", adding("!"))
    patch.remove()
    patch.install()
    patch.remove()
    patch.remove()
    assert vars(greeter) == {}


def test_removal_after_others_took_it_off_does_nothing():
    greeter = Greeter()
    patch = MethodPatch(greeter, "greet", adding("!")).install()
    del greeter.greet
    patch.remove()
    assert vars(greeter) == {}


def test_a_missing_method_is_named():
    with pytest.raises(GuardError, match="method `wave`; found Greeter"):
        MethodPatch(Greeter(), "wave", adding("!"))
