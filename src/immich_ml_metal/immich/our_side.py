"""This service as Immich could see it: where it listens, what it serves, how it could be faster."""

from immich_ml_metal.catalog import PARTS_OF, find_model
from immich_ml_metal.client.own_service import NotServing, ask_health, local_url
from immich_ml_metal.drawing import draw_preview
from immich_ml_metal.errors import UnknownModel
from immich_ml_metal.immich.advice import OurSide
from immich_ml_metal.immich.api import ServerSettings
from immich_ml_metal.immich.gain import measure_gains
from immich_ml_metal.immich.search_delay import measure_search_delay
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.network import names_of_this_machine
from immich_ml_metal.types import Part, Task


def look_at_ours(settings: Settings, server: ServerSettings, *, measure: bool) -> OurSide:
    """Describe this service; `measure` takes a minute."""
    url = local_url(settings)
    return OurSide(
        port=settings.port,
        hosts=names_of_this_machine(),
        immich_compat=settings.immich_compat,
        why_not_served=_why_not_served,
        engines=_engines(url),
        gains=measure_gains(url, server, draw_preview) if measure else None,
        search_s=measure_search_delay(url, server, draw_preview) if measure else None,
        squashes=_squashes,
        immich_url=settings.immich_url or "",
    )


def _squashes(name: str) -> bool:
    try:
        return find_model(name, Task.CLIP, Part.VISUAL).resize_mode == "squash"
    except UnknownModel:
        return False


def _engines(url: str) -> dict[str, str]:
    try:
        table = ask_health(url).engines
    except NotServing:
        return {}
    return {task: name for task in Task for key, name in table.items() if key.startswith(task)}


def _why_not_served(task: Task, name: str) -> str:
    try:
        find_model(name, task, PARTS_OF[task][0])
    except UnknownModel as exc:
        return str(exc)
    return ""
