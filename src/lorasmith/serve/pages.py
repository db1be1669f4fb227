"""The page at `/`, for a person with a browser: the files of the folder `page`, and nothing else of the disk."""

from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse

FOLDER = Path(__file__).parent / "page"
# Said here, not looked up: a Windows registry may call JavaScript plain text, which browsers then refuse to run.
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
NAMES = frozenset(path.name for path in FOLDER.iterdir() if path.suffix in TYPES)
HEADERS = {
    "Cache-Control": "no-cache",  # asked again each time: modules of two versions would not fit
    "Content-Security-Policy": "frame-ancestors 'none'",  # the rest stands in the page; this part counts here only
    "X-Content-Type-Options": "nosniff",
}


def page_routes() -> APIRouter:
    """`/` and `/page/NAME`; open to all, since the page itself asks for a key."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    @router.get("/page/{name}")
    async def page(name: str = "index.html") -> FileResponse:
        if name not in NAMES:
            raise HTTPException(404)
        return FileResponse(FOLDER / name, media_type=TYPES[Path(name).suffix], headers=HEADERS)

    return router
