"""A small page over a run's trace while it is written, for this machine's browser only.

Whoever reads it needs the token in its address. It answers on 127.0.0.1 and only to that name, so
that no other page can reach it by a name of its own (DNS rebinding), and lets its page load
nothing from elsewhere.
"""

import hmac
import json
import secrets
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jinja2
from markupsafe import Markup

from longspan.errors import DataError
from longspan.report import svg
from longspan.report.alerts import alerts
from longspan.report.page import charts, figures
from longspan.report.summary import summarise
from longspan.report.words import clean
from longspan.trace import read_trace

__all__ = ["Server", "Watch", "serve"]


@dataclass(frozen=True)
class Watch:
    """A run's trace, read anew when it has grown; ``token`` opens the page."""

    run: Path
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    def state(self) -> dict[str, Any]:
        """What the page shows: name, verdict, alerts, figures, charts as SVG; all of it escaped."""
        path = self.run / "trace.jsonl"
        try:
            rows = list(read_trace(path))
        except DataError:
            rows = []
        run = summarise(rows, self.run.resolve().name)
        silent_s = time.time() - path.stat().st_mtime if rows else None
        drawn = charts(run)
        return {
            "name": run.name,
            "ended": str(run.end.get("reason", "")),
            "verdict": [{"state": v.state, "words": v.words} for v in run.verdict] if rows else [],
            "alerts": [clean(line) for line in alerts(rows, silent_s)],
            "figures": figures(run) if rows else [],
            "charts": [str(drawn[name]) for name in ("loss", "speed") if drawn[name]],
        }

    def page(self) -> tuple[str, str]:
        """The page, and the nonce that its style and script carry."""
        nonce = secrets.token_urlsafe(16)
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("longspan.report", "."),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
        )
        text = environment.get_template("watch.html.j2").render(
            name=clean(self.run.resolve().name),
            nonce=nonce,
            token=self.token,
            light=Markup(svg.variables(svg.LIGHT)),
            dark=Markup(svg.variables(svg.DARK)),
            rules=Markup(svg.RULES),
        )
        return text, nonce


def serve(run: Path, port: int = 0) -> "Server":
    """A server for the run's page on 127.0.0.1; ``.address`` is what to open in a browser.

    Raises DataError if there is no such folder. The caller runs and closes it.
    """
    if not run.is_dir():
        raise DataError(f"no run at {run}: give the folder of a run, such as runs/NAME")
    return Server(Watch(run), port)


class Server(ThreadingHTTPServer):
    """Answers for one ``watch``."""

    daemon_threads = True

    def __init__(self, watch: Watch, port: int) -> None:
        self.watch = watch
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def address(self) -> str:
        """The page's address, with its token."""
        return f"http://127.0.0.1:{self.server_port}/?token={self.watch.token}"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version = "longspan"
    sys_version = ""

    def do_GET(self) -> None:
        """The page, or its state as JSON."""
        address = urlsplit(self.path)
        token = parse_qs(address.query).get("token", [""])[0]
        port = self.server.server_port
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            self._answer(403, "text/plain", "this page has another name\n")
        elif not hmac.compare_digest(token.encode(), self.server.watch.token.encode()):
            self._answer(403, "text/plain", "open the address that longspan watch has printed\n")
        elif address.path == "/":
            page, nonce = self.server.watch.page()
            self._answer(200, "text/html", page, nonce)
        elif address.path == "/state":
            self._answer(200, "application/json", json.dumps(self.server.watch.state()))
        else:
            self._answer(404, "text/plain", "there is only one page\n")

    def _answer(self, code: int, kind: str, text: str, nonce: str = "") -> None:
        body = text.encode("utf-8", errors="replace")
        self.send_response(code)
        own = f"'nonce-{nonce}'" if nonce else "'none'"
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": f"default-src 'none'; script-src {own}; style-src {own}; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is for the address."""
