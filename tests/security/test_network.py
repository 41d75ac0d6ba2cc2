"""Neither the commands nor their pages fetch or send anything."""

import re
import socket

import pytest

from passk_guard import GuardConfig
from passk_guard.analysis.page import analysis_page
from passk_guard.cli import main
from passk_guard.reporting.html.page import SCRIPT, STYLE, packed_plotly
from tests.analysis.cases import command, save_model, synthetic, write_probe
from tests.helpers.journals import write_run


@pytest.fixture
def no_network(monkeypatch):
    """Let every way to the network raise, and list the attempts."""
    tried = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("no network here")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    return tried


def test_the_commands_reach_for_no_network(no_network, tmp_path):
    model = save_model(tmp_path / "model")
    assert command(model, write_probe(tmp_path / "probe.jsonl"), tmp_path / "out") == 0
    assert main(["report", str(write_run(tmp_path / "run"))]) == 0
    (tmp_path / "guard.yaml").write_text("k: 4\n")
    assert main(["check", str(tmp_path / "guard.yaml")]) == 0
    assert main(["schema"]) == 0
    assert GuardConfig.from_yaml(tmp_path / "guard.yaml").k == 4
    assert no_network == []


def test_the_pages_name_no_address(tmp_path):
    assert main(["report", str(write_run(tmp_path / "run", settings={"k": 8}))]) == 0
    pages = [(tmp_path / "run" / "passk_guard.html").read_text(), analysis_page(synthetic(6).to_dict())]
    for page in pages:
        page = page.replace(packed_plotly()[0], "")  # plotly's addresses of map tiles: the policy lets none of it load
        assert not re.search(r"https?:|//[a-z0-9.-]+\.[a-z]{2,}|url\(|@import", page)
        assert re.search(r'http-equiv="Content-Security-Policy" content="default-src \'none\'', page)
    assert not re.search(r"fetch|XMLHttpRequest|WebSocket|sendBeacon|import\(|innerHTML|eval|document\.write", SCRIPT)
    assert "url(" not in STYLE
