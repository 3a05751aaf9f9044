"""The chat page that a server gives out at `/`: where its files lie, and what a browser may do with them.

The files are sent as they are, index.html at `/` and the others beside it. Knows nothing of HTTP."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""What the files of the page are to be sent as, by suffix; no others in the folder are meant for browsers."""

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Where a browser knows them: text cannot be made into markup at all, not even by a mistake of ours.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
