"""Alerts to an address of the user's own, the only thing that the package itself sends."""

from __future__ import annotations

import json
import logging
import threading
import urllib.request

logger = logging.getLogger(__name__)
TIMEOUT = 5.0  # seconds


class Webhook:
    """Posts texts as `{"text": ...}`, which Slack, Mattermost and others take. Training never waits for it.

    Args:
        address: http or https; None sends nothing.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._sending: list[threading.Thread] = []

    def send(self, text: str) -> None:
        """Post it from a thread; what fails is logged without the address, which lets who has it post."""
        if self._address is not None:
            thread = threading.Thread(target=self._post, args=(self._address, text), daemon=True)
            thread.start()
            self._sending = [one for one in self._sending if one.is_alive()] + [thread]

    def finish(self) -> None:
        """Wait for what is on its way, at most about `TIMEOUT` seconds in all."""
        for thread in self._sending:
            thread.join(TIMEOUT / len(self._sending) + 0.1)
        self._sending = []

    @staticmethod
    def _post(address: str, text: str) -> None:
        try:
            body = json.dumps({"text": text}).encode()
            request = urllib.request.Request(address, body, {"Content-Type": "application/json"})  # noqa: S310
            with urllib.request.urlopen(request, timeout=TIMEOUT):  # noqa: S310  the settings take http(s) alone
                pass
        except Exception as error:  # its text may hold the address
            status = getattr(error, "code", "")
            logger.warning("passk_guard: alert_webhook did not take the alert: %s %s", type(error).__name__, status)
