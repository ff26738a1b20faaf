"""The daemon's own metrics are those that the documentation names."""

from pathlib import Path

from kvstore.service.http.metrics import OWN
from tests.helpers.daemons import local_daemon

ROOT = Path(__file__).resolve().parents[4]


def test_every_number_of_the_daemon_has_a_help_text_and_a_line_in_the_documentation(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()

    with local_daemon(tmp_path / "kv.sock") as daemon:
        told = daemon.look(lambda inside: inside.state.own_metrics())

    assert set(told) == set(OWN)
    for name, text in OWN.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        assert f"| `{name}` | {kind} | {text} |" in page
