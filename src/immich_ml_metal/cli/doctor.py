"""`doctor`: one screen of checks, the cause first, a fix for each failure."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from immich_ml_metal.cli.output import EnvFileOption, Exit, JsonOption, make_table, print_json
from immich_ml_metal.doctor.checks import CHECKS, Finding, examine, first_cause
from immich_ml_metal.doctor.collect import collect_facts
from immich_ml_metal.doctor.selftest import run_self_test
from immich_ml_metal.doctor.share import write_bundle
from immich_ml_metal.service.log_files import log_files
from immich_ml_metal.system.programs import run_program

_MARKS = MappingProxyType(
    {
        "ok": "[green]ok  [/]",
        "warn": "[yellow]warn[/]",
        "fail": "[red]FAIL[/]",
        "skip": "[dim]-   [/]",
    }
)
VerifyOption = Annotated[
    bool, typer.Option("--verify", help="Read every model file and compare its digest.")
]
TestOption = Annotated[bool, typer.Option("--test/--no-test", help="Ask every task for real.")]
ShareOption = Annotated[
    Path | None, typer.Option("--share", help="Write a zip without anything private.")
]


def doctor(
    env_file: EnvFileOption = None,
    verify: VerifyOption = False,
    test: TestOption = True,
    share: ShareOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the installation and say what to do, the cause of the trouble first.

    Exit code: 0 nothing is broken, 1 something is.
    """
    facts = collect_facts(run_program, env_file=env_file, digests=verify)
    if test and not facts.config_error:
        named = {"--env-file": env_file}
        options = {option: str(path) for option, path in named.items() if path is not None}
        facts = replace(facts, tests=run_self_test(facts, options))
    findings = examine(CHECKS, facts)
    cause = first_cause(findings)
    if share is not None:
        write_bundle(share, facts, findings, log_files(facts.settings))
        typer.echo(f"Wrote {share}; look into it before you attach it to an issue.", err=True)
    if as_json:
        rows = [asdict(finding) for finding in findings]
        print_json({"cause": cause and cause.name, "checks": rows})
    else:
        _print(findings, cause)
    raise typer.Exit(Exit.FINDING if cause else Exit.OK)


def _print(findings: Sequence[Finding], cause: Finding | None) -> None:
    console = Console(highlight=False)
    if cause is not None:
        console.print(f"[bold red]Fix first: {cause.name}[/]")
        console.print(Text(f"  {cause.text}"))
        if cause.fix:
            console.print(Text(f"  {cause.fix}", style="bold"))
        console.print()
    table = make_table("", "", "")
    for finding in findings:
        text = Text(finding.text)
        if finding.follows:
            text.append(f"\nfollows from {finding.follows}", style="dim")
        elif finding.fix and finding is not cause:
            text.append(f"\n{finding.fix}", style="cyan")
        table.add_row(_MARKS[finding.level], finding.name, text)
    console.print(table)
