"""Checks of the running service and of what surrounds it. Each answers (outcome, finding, fix)."""

from immich_ml_metal.doctor.facts import Answer, Facts, Outcome
from immich_ml_metal.gateway import remedies
from immich_ml_metal.gateway.companions import NO_KEY
from immich_ml_metal.logs import FILE_BYTES, FILES_KEPT
from immich_ml_metal.service import mac_privacy
from immich_ml_metal.setting_kinds import format_bytes
from immich_ml_metal.system.network import url_host

SKEW_WARN_S = 60.0
SKEW_FAIL_S = 300.0  # certificates and tokens begin to fail
LOGS_WARN_FACTOR = 2
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def check_port(facts: Facts) -> Answer:
    """Our port is free, or it is us who hold it."""
    port = facts.port
    if port.state == "free":
        return Outcome.OK, f"{port.number} is free; the service is not running", ""
    if port.state == "ours":
        return Outcome.OK, f"{port.number} answers: version {port.version}", ""
    who = port.holder or "another program"
    if port.state == "other_ml":
        what = f"{port.number} is held by another machine-learning service ({who})"
        fix = "stop the container's published port, or set port (ML_PORT)"
        return Outcome.FAIL, what, fix
    return Outcome.FAIL, f"{port.number} is held by {who}", "stop it, or set port (ML_PORT)"


def check_version(facts: Facts) -> Answer:
    """The serving process is the installed version."""
    if facts.port.state != "ours":
        return Outcome.SKIP, "the service is not running", ""
    if facts.port.version != facts.version:
        return (
            Outcome.FAIL,
            f"{facts.port.version} is still serving, {facts.version} is installed",
            "immich-ml-metal service restart",
        )
    return Outcome.OK, f"{facts.version} is installed and serving", ""


def check_service(facts: Facts) -> Answer:
    """It comes back after a restart of the machine."""
    if facts.service_error:
        fix = "chown or chmod it for the user that runs this"
        return Outcome.WARN, f"not known: {facts.service_error}", fix
    if facts.service == "none":
        return Outcome.WARN, "does not start at boot", "immich-ml-metal service install"
    if facts.service == "stopped":
        return Outcome.FAIL, "installed but not running", "immich-ml-metal service logs"
    return Outcome.OK, "starts at boot", ""


def check_engines(facts: Facts) -> Answer:
    """Every task really answers on the engine it is meant for."""
    failed = [f"{t.task} on {t.engine}: {t.error}" for t in facts.tests if t.error]
    if failed:
        errors = "; ".join(failed)
        return Outcome.FAIL, errors, remedies.remedy_of(errors) or remedies.REPORT
    told = [f"{t.task} on {t.engine} {t.skipped}".rstrip() for t in facts.tests]
    if not told:
        return Outcome.SKIP, "not tested", ""
    return Outcome.OK, ", ".join(told), ""


def check_verdicts(facts: Facts) -> Answer:
    """What was measured of the engines on this machine, and what speaks against one."""
    warnings = list(dict.fromkeys(one.warning for one in facts.choices if one.warning))
    if warnings:
        return Outcome.WARN, "; ".join(warnings), remedies.ENGINE
    told = ", ".join(one.told for one in facts.choices)
    if any(one.is_pending for one in facts.choices):
        return Outcome.OK, f"{told}; the service checks what is not known by itself", ""
    return Outcome.OK, told or "nothing to measure", ""


def check_address(facts: Facts) -> Answer:
    """What to type into Immich."""
    port = facts.port.number
    host = facts.settings.host
    if host in _LOOPBACK:
        return (
            Outcome.WARN,
            f"listens on {host}: only this machine and its Docker Desktop can connect "
            f"(http://host.docker.internal:{port})",
            "set host (ML_HOST) to 0.0.0.0 for Immich on another machine",
        )
    if not facts.addresses:
        return Outcome.WARN, "this machine has no network address", "connect it to the network"
    urls = [f"http://{url_host(address)}:{port}" for address in facts.addresses[:3]]
    shown = f"{' or '.join(urls)}; from Docker on this machine http://host.docker.internal:{port}"
    return Outcome.OK, shown, ""


def check_immich(facts: Facts) -> Answer:
    """Immich's settings do not hold us back."""
    if facts.immich_error:
        fix = "set immich_url and immich_api_key right: immich-ml-metal immich status"
        return Outcome.FAIL, facts.immich_error, fix
    if facts.immich is None:
        return Outcome.SKIP, "no immich_url and immich_api_key, so its settings are not seen", ""
    if not facts.immich:
        return Outcome.OK, "its settings suit this service", ""
    level = Outcome.FAIL if any(item.is_fault for item in facts.immich) else Outcome.WARN
    return level, facts.immich[0].text, "immich-ml-metal immich status"


def check_privacy(facts: Facts) -> Answer:
    """MacOS lets a job at boot read and reach what it needs."""
    machine = facts.machine
    if machine.system != "Darwin":
        return Outcome.SKIP, "only macOS keeps folders from services", ""
    if facts.closed:
        fix = "then immich-ml-metal service install"
        return Outcome.WARN, mac_privacy.explain_unreadable(facts.closed), fix
    if mac_privacy.needs_local_network(facts.settings, machine.release):
        return Outcome.OK, mac_privacy.EXPLAIN_LOCAL_NETWORK, ""
    return Outcome.OK, "nothing that the service needs is kept from it", ""


def check_index(facts: Facts) -> Answer:
    """Vectors are made as those in Immich's index were."""
    changed = [one for one in facts.index if one.state == "changed"]
    if changed:
        fix = "immich-ml-metal models accept NAME, once you have decided"
        return Outcome.WARN, "; ".join(one.text for one in changed), fix
    if not facts.index:
        return Outcome.SKIP, "nothing was served yet: what made the index is not known here", ""
    names = ", ".join(one.model.partition("/")[2] for one in facts.index)
    return Outcome.OK, f"made as since the first use here: {names}", ""


def check_queues(facts: Facts) -> Answer:
    """Nothing keeps Immich's jobs waiting, and nothing can burn them."""
    if facts.settings.immich_url is None or facts.settings.immich_api_key is None:
        return Outcome.SKIP, NO_KEY, ""
    health = facts.port.health
    if facts.port.state != "ours" or "guard" not in health:
        return Outcome.SKIP, "the service is not running", ""
    guard, see = health["guard"], "immich-ml-metal immich status"
    if paused := guard.get("paused"):
        told = [f"{queue} is paused by us: {one['reason']}" for queue, one in paused.items()]
        return Outcome.FAIL, "; ".join(told), see
    if troubles := health.get("troubles"):
        told = [f"{one['task']} by {one['model']} {one['reason']}" for one in troubles]
        return Outcome.FAIL, "; ".join(told), see
    if guard["why_off"]:
        outcome = Outcome.WARN if "API key" in guard["why_off"] else Outcome.SKIP
        return outcome, f"not paused when we cannot serve: {guard['why_off']}", see
    return Outcome.OK, "looked after", ""


def check_clock(facts: Facts) -> Answer:
    """The clock is right."""
    skew_s = facts.clock_skew_s
    if skew_s is None:
        return Outcome.SKIP, "no server told the time", ""
    if abs(skew_s) > SKEW_WARN_S:
        level = Outcome.FAIL if abs(skew_s) > SKEW_FAIL_S else Outcome.WARN
        return level, f"the clock is off by {skew_s:+.0f} s", "switch on automatic time"
    return Outcome.OK, f"within {max(abs(skew_s), 1):.0f} s", ""


def check_sleep(facts: Facts) -> Answer:
    """A Mac that sleeps is not reached."""
    minutes = facts.machine.sleep_min
    if minutes is None:
        return Outcome.SKIP, "not known on this system", ""
    if minutes:
        return (
            Outcome.WARN,
            f"sleeps after {minutes} min; kept awake while work is queued, but not reached asleep",
            "sudo pmset -c sleep 0",
        )
    return Outcome.OK, "does not sleep on mains power", ""


def check_logs(facts: Facts) -> Answer:
    """The logs stay within their cap."""
    if facts.logs_bytes is None:
        return Outcome.SKIP, "their folder may not be entered", ""
    shown = format_bytes(facts.logs_bytes)
    limit_bytes = 2 * FILE_BYTES * (FILES_KEPT + 1)  # of two processes
    if facts.logs_bytes > LOGS_WARN_FACTOR * limit_bytes:
        fix = "immich-ml-metal service restart empties the capture of standard error"
        return (
            Outcome.WARN,
            f"{shown}, more than the cap of {format_bytes(limit_bytes)}",
            fix,
        )
    return Outcome.OK, shown, ""
