#!/usr/bin/env python3
"""Serve this folder on 127.0.0.1, with the headers that WebAssembly threads need: python serve.py [PORT]."""

from __future__ import annotations

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Handler(SimpleHTTPRequestHandler):
    """Files with those headers; ``isolated`` False leaves out the ones that threads need."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }
    isolated = True

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            if self.isolated or not name.startswith("Cross-Origin"):
                self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def server(port: int = 0) -> ThreadingHTTPServer:
    """A server of this folder; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(Path(__file__).parent)))


if __name__ == "__main__":
    with server(int(sys.argv[1]) if len(sys.argv) > 1 else 8000) as http:
        print(f"http://127.0.0.1:{http.server_port}/")
        http.serve_forever()
