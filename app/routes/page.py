"""GET /: the page people see."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)

WEB = Path(__file__).parents[1] / "web"


@router.get("/")
async def index() -> FileResponse:
    return FileResponse(WEB / "index.html")
