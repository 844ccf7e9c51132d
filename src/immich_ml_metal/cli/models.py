"""`models …`: get, check, keep, move and choose models."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import psutil
import typer

from immich_ml_metal.catalog import Family, all_models, clean_name, find_by_name
from immich_ml_metal.cli import models_show as show
from immich_ml_metal.cli.models_pull import pull_models, verify_models
from immich_ml_metal.cli.output import Exit, FolderOption, JsonOption, print_error, print_json
from immich_ml_metal.errors import ModelUnavailable
from immich_ml_metal.index_guard.guard import IndexGuard
from immich_ml_metal.index_guard.recipe import JOBS
from immich_ml_metal.models import prune as waste
from immich_ml_metal.models.advice import Here, reads
from immich_ml_metal.models.advice import recommend as suitable
from immich_ml_metal.models.importing import export_models, find_models, import_model, open_tree
from immich_ml_metal.models.manifest import load_manifest
from immich_ml_metal.models.shelf import FileState, PartStatus, Shelf
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.qualification.plan import remembered_choices
from immich_ml_metal.setting_kinds import format_bytes
from immich_ml_metal.settings import Settings
from immich_ml_metal.settings_sources import load_settings
from immich_ml_metal.system.paths import at_home
from immich_ml_metal.types import Task
from immich_ml_metal.worker.preload import preload_keys

app = typer.Typer(help="Get, check, keep, move and choose models.", no_args_is_help=True)

Names = Annotated[list[str] | None, typer.Argument(help="Model names, as in Immich's settings.")]
SomeNames = Annotated[list[str], typer.Argument(help="Model names, as in Immich's settings.")]
DeletedJsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON for scripts; deletes only with --yes.")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
_CODE_LETTERS = (2, 3)  # ISO 639


def _language_code(text: str) -> str:
    code = text.partition("-")[0].lower()
    if not (code.isascii() and code.isalpha() and len(code) in _CODE_LETTERS):
        raise typer.BadParameter(f"{text!r} is not a language code such as de, en or zh")
    return code


@app.command("list")
def list_models(
    here: Annotated[bool, typer.Option("--here", help="Only models on this disk.")] = False,
    task: Annotated[Task | None, typer.Option(help="Only models for it.")] = None,
    language: Annotated[
        str | None, typer.Option(help="Only models that read it: de, zh.", parser=_language_code)
    ] = None,
    models_dir: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every official model: what it is, and what is here of it."""
    settings, store = _open(models_dir)
    rows = [
        (spec, [store.status(spec.key(part)) for part in spec.parts])
        for spec in all_models()
        if (task is None or spec.task == task)
        and (language is None or reads(spec, frozenset({language})))
    ]
    if here:
        rows = [row for row in rows if any(status.is_usable for status in row[1])]
    choices = remembered_choices(settings, store)
    show.print_list(rows, choices, as_json=as_json)
    _tell_unreadable(store.shelf, [status for _, statuses in rows for status in statuses])


@app.command("pull")
def pull(
    names: Names = None,
    configured: Annotated[
        bool, typer.Option("--configured", help="The models of the settings.")
    ] = False,
    all_faces: Annotated[bool, typer.Option("--all-faces", help="Every face model.")] = False,
    models_dir: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download models; what is here already is not fetched again."""
    settings, store = _open(models_dir)
    wanted = [find_by_name(name) for name in names or []]
    if configured:
        wanted += [find_by_name(name) for name in _configured(settings)]
    if all_faces:
        wanted += [spec for spec in all_models() if spec.family is Family.INSIGHTFACE]
    if not wanted:
        raise typer.BadParameter("name a model, or give --configured or --all-faces")
    keys = dict.fromkeys(spec.key(part) for spec in wanted for part in spec.parts)
    failures = pull_models(store, list(keys))
    if as_json:
        show.print_pulled([store.status(key) for key in keys], failures)
    if failures:
        print_error(next(iter(failures.values())))
        raise typer.Exit(Exit.UNREACHABLE)


@app.command("verify")
def verify(
    names: Names = None,
    online: Annotated[
        bool, typer.Option("--online", help="Also compare files placed by hand with the hub's.")
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Fetch what is damaged again.")] = False,
    models_dir: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every file and compare its digest; exit 1 when something is damaged or unreadable."""
    _, store = _open(models_dir)
    specs = [find_by_name(name) for name in names] if names else all_models()
    statuses = verify_models(store, specs, online=online, repair=repair)
    show.print_verified(statuses, as_json=as_json)
    _tell_unreadable(store.shelf, statuses)
    wrong = (FileState.DAMAGED, FileState.UNREADABLE)
    if any(status.state in wrong for status in statuses):
        raise typer.Exit(Exit.FINDING)


@app.command("rm")
def remove(
    names: SomeNames,
    yes: YesOption = False,
    models_dir: FolderOption = None,
    as_json: DeletedJsonOption = False,
) -> None:
    """Delete models from the disk, every revision of them."""
    _, store = _open(models_dir)
    found = []
    for name in names:
        folder = waste.folder_of(store.shelf, find_by_name(name))
        if folder is None:
            raise ModelUnavailable(f"{name} is not on disk")
        found.append(folder)
    _delete(store.shelf, found, yes=yes, as_json=as_json)


@app.command("prune")
def prune(
    unused: Annotated[
        bool, typer.Option("--unused", help="Also every model that the settings do not name.")
    ] = False,
    yes: YesOption = False,
    models_dir: FolderOption = None,
    as_json: DeletedJsonOption = False,
) -> None:
    """Delete unfinished downloads and files for other hardware."""
    settings, store = _open(models_dir)
    keep = frozenset(map(clean_name, _configured(settings))) if unused else None
    if passed_over := store.shelf.unreadable():
        print_error(f"passed over {'; '.join(passed_over)}")
    _delete(store.shelf, waste.find_waste(store.shelf, keep), yes=yes, as_json=as_json)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A folder or a ZIP file.")],
    models_dir: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy models from an Immich cache, an InsightFace pack or an export."""
    _, store = _open(models_dir)
    with open_tree(at_home(source).absolute()) as tree:
        found = find_models(tree)
        if not found:
            raise ModelUnavailable(f"no official model found in {source}")
        done = [import_model(store.shelf, half) for half in found]
    show.print_imported(done, as_json=as_json)
    if any(half.outcome == "refused" for half in done):
        raise typer.Exit(Exit.FINDING)


@app.command("export")
def export(
    names: SomeNames,
    to: Annotated[Path, typer.Option("--to", help="A folder, or a name that ends in .zip.")],
    models_dir: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy models for another machine, which takes them with `models import`."""
    _, store = _open(models_dir)
    cleaned = [find_by_name(name).name for name in names]
    files = export_models(store.shelf, cleaned, at_home(to))
    if as_json:
        print_json({"to": str(to), "files": [path.as_posix() for path in files]})
        return
    typer.echo(f"Wrote {len(files)} files to {to}")


@app.command("info")
def info(
    name: Annotated[str, typer.Argument(help="A model name.")],
    models_dir: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a model is, what it needs, and what changing to it means."""
    settings, store = _open(models_dir)
    spec = find_by_name(name)
    statuses = [store.status(spec.key(part)) for part in spec.parts]
    records = load_manifest(store.shelf.root(spec.key(spec.parts[0]))).files
    index = IndexGuard(settings).finding(f"{spec.task}/{spec.name}")
    choices = remembered_choices(settings, store)
    show.print_info(spec, statuses, records, settings, index, choices, as_json=as_json)
    _tell_unreadable(store.shelf, statuses)


@app.command("accept")
def accept(
    names: SomeNames,
    models_dir: FolderOption = None,
) -> None:
    """Let vectors be made as the settings say from now on, although the index has others."""
    settings, _ = _open(models_dir)
    guard = IndexGuard(settings)
    for spec in [find_by_name(name) for name in names]:
        if spec.task not in JOBS:
            raise typer.BadParameter(f"{spec.name} makes no vectors: there is nothing to accept")
        guard.history.accept(f"{spec.task}/{spec.name}")
        typer.echo(f"Accepted for {spec.name}. Restart the service, then {JOBS[spec.task]}.")


@app.command("recommend")
def recommend(
    language: Annotated[
        list[str] | None,
        typer.Option(help="A language your users search in; repeat it.", parser=_language_code),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Models that suit this machine's memory and speed, and your users' languages."""
    settings, store = _open(None)
    engine = "mlx" if sys.platform == "darwin" else "cpu"
    measured_ms = remembered_choices(settings, store).picture_ms()
    now = clean_name(settings.clip_model)
    here = Here(psutil.virtual_memory().total, engine, measured_ms, now)
    show.print_advice(suitable(here, language or ["en"]), here.memory_bytes, as_json=as_json)


def _open(models_dir: Path | None) -> tuple[Settings, ModelStore]:

    settings = load_settings({"models_dir": models_dir})
    return settings, ModelStore(settings)


def _tell_unreadable(shelf: Shelf, statuses: Iterable[PartStatus]) -> None:
    """One line on standard error for each place that cannot be read, and why."""
    unreadable = [status for status in statuses if status.state is FileState.UNREADABLE]
    for reason in dict.fromkeys(shelf.unreadable_of(status.key) for status in unreadable):
        if reason:  # else a file beside the graph, which the list of files names
            print_error(reason)


def _configured(settings: Settings) -> tuple[str, ...]:
    """Every name in the settings: what the service answers with, and what it preloads."""
    preloaded = (key.name for key in preload_keys(settings))
    named = (settings.clip_model, settings.face_model, settings.ocr_model, *preloaded)
    return tuple(dict.fromkeys(named))


def _delete(shelf: Shelf, found: list[waste.Waste], *, yes: bool, as_json: bool) -> None:
    total = format_bytes(sum(one.size_bytes for one in found))
    if not as_json:
        show.print_waste(found)
        if found and not yes:
            # not Typer's question, for which Ctrl-C is a "no"
            answer = input(f"Delete these, {total}? [y/N]: ")
            if answer.strip().lower() not in ("y", "yes"):
                raise typer.Abort
    is_agreed = yes or not as_json
    for one in found if is_agreed else ():
        waste.remove(shelf, one)
    if as_json:
        rows = [
            {"path": str(one.path), "reason": one.reason, "size_bytes": one.size_bytes}
            for one in found
        ]
        print_json({"deleted": is_agreed, "found": rows})
    elif found:
        typer.echo(f"Freed {total}.")
