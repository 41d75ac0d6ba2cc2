"""The prompts of an analysis, checked before a model is loaded."""

from __future__ import annotations

from typing import Any

from passk_guard.analysis.prompts import prompt_text
from passk_guard.analysis.settings import Settings
from passk_guard.probe.prompts import ProbeSet
from passk_guard.probe.verifier import Verifier
from passk_guard.utils.errors import GuardError


def drawn_probe(probe: Any, verifier: Verifier, settings: Settings) -> ProbeSet:
    """The prompts that the settings ask for, with all that the verifier needs.

    Raises:
        GuardError: a probe that cannot be read, columns that are missing, or more prompts asked for than there are.
    """
    whole = ProbeSet.of(probe)
    whole.require_columns(verifier.required_columns)
    _refuse_broken_text(whole)
    if settings.prompts is None:
        return whole
    if settings.prompts > len(whole):
        raise GuardError(
            f"Expected `prompts` of at most {len(whole)}, the different prompts in the probe; found "
            f"{settings.prompts}. Leave it out to take all."
        )
    return ProbeSet(whole[i] for i in whole.draw(0, settings.prompts, settings.seed))


def _refuse_broken_text(probe: ProbeSet) -> None:
    for row in probe.rows:
        text = prompt_text(row)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise GuardError(
                f"Expected prompts of whole characters; found half of a surrogate pair in {text[:60]!r}, which no "
                "tokenizer takes. Mend the probe: JSON writes such a character as two \\u escapes."
            )
