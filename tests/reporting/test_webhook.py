"""Alerts to an address of the user's own: they arrive, and nothing that fails or hangs there reaches training."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from passk_guard import GuardConfig
from passk_guard.reporting import webhook
from passk_guard.reporting.webhook import Webhook


@pytest.fixture
def server():
    """A server that answers with `status` after `seconds`, and lists what it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            time.sleep(self.server.seconds)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.taken.append((self.headers["Content-Type"], json.loads(body)))
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.taken, server.status, server.seconds = [], 200, 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def post(server, text):
    hook = Webhook(f"http://127.0.0.1:{server.server_port}/services/secret")
    hook.send(text)
    hook.finish()


def test_an_alert_arrives_as_json_with_a_text(server):
    post(server, "passk_guard: LOSING\npass@1: -0.045")
    assert server.taken == [("application/json", {"text": "passk_guard: LOSING\npass@1: -0.045"})]
    Webhook(None).send("nowhere")


@pytest.mark.parametrize(("status", "seconds", "words"), [(500, 0, "HTTPError 500"), (200, 0.5, "TimeoutError")])
def test_what_fails_is_logged_without_the_address(server, monkeypatch, caplog, status, seconds, words):
    monkeypatch.setattr(webhook, "TIMEOUT", 0.1 if seconds else 5.0)
    server.status, server.seconds = status, seconds
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        began = time.monotonic()
        post(server, "x")
        assert time.monotonic() - began < 5
        time.sleep(0.1 if seconds else 0)
    assert f"alert_webhook did not take the alert: {words}" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("address", ["ftp://host/x", "file:///etc/passwd", "hooks.slack.com/x", "https://"])
def test_other_addresses_are_refused(address):
    with pytest.raises(ValueError, match="alert_webhook"):
        GuardConfig(alert_webhook=address)


def test_the_address_is_not_among_the_settings_that_are_shown():
    config = GuardConfig(alert_webhook="https://hooks.example/services/secret", k=4)
    assert config.shown["k"] == 4
    assert "secret" not in str(config.shown) + repr(config)
    assert GuardConfig.from_journal(config.shown) == GuardConfig(k=4)
