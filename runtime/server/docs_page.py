"""GET /docs: a page that shows the OpenAPI document and sends requests, with nothing from afar."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

PAGE = Path(__file__).with_name("docs_page.html")

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


class DocsPage:
    """The endpoint. It needs no key: the page is the same on every server; what it shows does."""

    async def get(self, request: Request) -> Response:
        page = PAGE.read_text(encoding="utf-8")
        headers = {
            "content-security-policy": content_security_policy(page),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }
        return Response(page, media_type="text/html", headers=headers)


def content_security_policy(page: str) -> str:
    """Only the page's own script and style, told by their hashes, and requests to this server."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = b64encode(sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return (
        f"default-src 'none'; connect-src 'self'; script-src {' '.join(hashes['script'])}; "
        f"style-src {' '.join(hashes['style'])}; base-uri 'none'; form-action 'self'; "
        f"frame-ancestors 'none'"
    )
