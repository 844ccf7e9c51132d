"""What an installed service goes by and leaves behind: its settings, its files."""

from collections.abc import Iterator
from pathlib import Path

from immich_ml_metal.service.log_files import log_files
from immich_ml_metal.service.plan import Manager
from immich_ml_metal.settings import Settings
from immich_ml_metal.settings_sources import (
    DEFAULT_FILE,
    Resolved,
    load_settings,
    named_by_caller,
    network_variables,
    settings_file,
)
from immich_ml_metal.settings_text import merge, render

DOCUMENTS = (
    "engines",
    "guard",
    "index",
    "index-accepted",
)  # of ours, in a state folder that may be anybody's
_REMEMBERED = ("{}.json", ".{}.json.*", "{}.damaged", "{}.lock", ".{}.lock")


def keep_in_file(resolved: Resolved, env_file: Path | None) -> tuple[Path | None, str, bool]:
    """The settings file of a service that is to do as the caller does now.

    Returns:
        The file, its text, and whether that is another than what it holds now; None and nothing
        where there is no file, and nothing to write into one.
    """
    file = settings_file()
    network = network_variables(env_file)
    names = resolved.set_names(str(file))
    if file is not None:
        before = file.read_text(encoding="utf-8")
        values = {name: getattr(resolved.settings, name) for name in names}
        text = merge(before, values, network)
        return file, text, text != before
    text = merge(render(resolved.settings, names), {}, network) if names or network else ""
    return DEFAULT_FILE.expanduser() if text else None, text, bool(text)


def settings_of(manager: Manager) -> Settings:
    """Those that the installed service goes by: of the files in its definition.

    The caller's are taken where nothing is installed, or where the caller names a file.
    """
    command = manager.command()
    if not command or named_by_caller() is not None:
        return load_settings()
    return load_settings(environ={}, file=config_of(command))


def config_of(command: tuple[str, ...]) -> Path | None:
    """The settings file that a definition names."""
    return Path(command[command.index("--config") + 1]) if "--config" in command else None


def traces(settings: Settings) -> Iterator[Path]:
    """Every file that a service leaves: settings in their usual place, memory, logs."""
    yield DEFAULT_FILE.expanduser()
    for document in DOCUMENTS:
        for pattern in _REMEMBERED:
            yield from settings.state_folder.glob(pattern.format(document))
    for log in log_files(settings):
        yield from log.expanduser().parent.glob(f"{log.name}*")


def purge(settings: Settings) -> list[Path]:
    """Remove every trace, and the folders that are empty then; what was removed."""
    removed = [path for path in dict.fromkeys(traces(settings)) if path.is_file()]
    for path in removed:
        path.unlink()
    for folder in dict.fromkeys(path.parent for path in removed):
        if not any(folder.iterdir()):
            folder.rmdir()
    return removed


def what_stays(settings: Settings, config: Path | None) -> list[str]:
    """What a purge leaves alone, and how to remove it."""
    models = settings.models_dir.expanduser()
    stays = ["the program: uv tool uninstall immich-ml-metal, or pipx, or delete the checkout"]
    if config is not None and config != DEFAULT_FILE.expanduser():
        stays.append(f"your settings file: rm {config}")
    if models.exists():
        stays.append(f"models, which Immich's own service can use: rm -r {models}")
    return stays
