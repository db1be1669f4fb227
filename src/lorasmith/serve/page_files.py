"""The files of the chat page, which the server sends at its root address."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

PAGE = Path(__file__).parent / "page"
# Defined here rather than looked up: Windows may map .js to plain text, which browsers refuse to run.
PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PAGE_FILES = frozenset(path.name for path in PAGE.iterdir() if path.suffix in PAGE_TYPES)
PAGE_HEADERS = {
    "Cache-Control": "no-cache",  # modules of different versions do not fit together
    "Content-Security-Policy": "frame-ancestors 'none'",  # not allowed in a meta tag; the rest is in index.html
    "X-Content-Type-Options": "nosniff",
}


def add_page_routes(app: FastAPI) -> None:
    """The chat page. It needs no API key, since it asks for one itself."""

    @app.get("/")
    @app.get("/page/{name}")
    async def page(name: str = "index.html") -> FileResponse:
        if name not in PAGE_FILES:
            raise HTTPException(404)
        return FileResponse(PAGE / name, media_type=PAGE_TYPES[Path(name).suffix], headers=PAGE_HEADERS)
