"""Checks of the daemon itself: its configuration, processes, storer, ledger. The rows stand in doctor.py."""

from __future__ import annotations

from collections.abc import Iterator

from mpserverd.arena.health import health
from mpserverd.arena.report import storer as storer_report
from mpserverd.arena.report import workers as worker_reports
from mpserverd.config.show import as_dict
from mpserverd.ops.findings import Finding, fault, note, ok, warning
from mpserverd.ops.site import Site

CYCLE_S_SLOW = 1.0
NS_PER_STREAM = 50_000
"""A cycle takes 33 to 40 us a stream anyway."""
RESTARTS_PER_DAY_HIGH = 1.0


def configuration(site: Site) -> Iterator[Finding]:
    """It loads, and says what the running daemon has."""
    path = site.config_path
    if site.config is None:
        level = warning if site.live is not None and not path.exists() else fault
        for line in site.config_faults:
            yield level(line, f"mpserverd --config {path} --check-config")
        if site.live is None:
            yield note("until it loads, the other checks judge the default settings")
        return
    differing = _differing(site)
    if differing:
        yield note(
            f"{path} says something else than the running daemon has: {', '.join(differing)}",
            "mpserverctl reload   (it names what needs a restart)",
        )
    else:
        yield ok(f"{path} loads" + (", and is what the daemon has" if site.running is not None else ""))


def _differing(site: Site) -> list[str]:
    if site.running is None or site.config is None:
        return []
    ours, theirs = as_dict(site.config), as_dict(site.running)
    found = []
    for section, content in ours.items():
        other = theirs.get(section)
        if isinstance(content, dict) and isinstance(other, dict) and section != "layout":
            found += [f"{section}.{key}" for key, value in content.items() if other.get(key) != value]
        elif section != "layout" and content != other:
            found.append(section)
    return found


def daemon(site: Site) -> Iterator[Finding]:
    """Answers, and every process of it is well."""
    if site.live is None:
        yield from _not_there(site)
        return
    wrong = [check for check in health(site.live)["checks"] if not check["ok"] and check["check"] != "ledger"]
    for check in wrong:
        yield fault(f"{check['check']}: {check['detail']}", "mpserverctl events; mpserverctl workers")
    uptime_d = max(site.live.facts.get("uptime_s", 0.0) / 86_400, 1.0)
    for name, restarts in _restarts(site):
        text = f"{name} was replaced {restarts} times in {uptime_d:.1f} days"
        if restarts / uptime_d > RESTARTS_PER_DAY_HIGH:
            yield warning(text, "mpserverctl events   (why each one died)")
        elif restarts:
            yield note(text, "mpserverctl events")
    if not wrong:
        facts = site.live.facts
        yield ok(f"version {facts.get('version')} runs as pid {facts.get('pid')}, with {len(site.pids)} processes")


def _restarts(site: Site) -> list[tuple[str, int]]:
    if site.live is None:
        return []
    found = [(f"worker-{worker['index']}", int(worker["restarts"])) for worker in worker_reports(site.live)]
    storer = storer_report(site.live)
    return [*found, ("storer", int(storer["restarts"]))] if storer is not None else found


def _not_there(site: Site) -> Iterator[Finding]:
    state = site.unit.get("ActiveState", "")
    if state == "failed" or site.unit.get("SubState") == "auto-restart":
        yield fault(
            f"the service has failed ({site.unit.get('Result') or state}), restarts: {site.unit.get('NRestarts', '?')}",
            "journalctl -xeu mpserverd",
        )
    elif state in ("active", "activating"):
        yield fault(f"systemd says {state}, and the daemon does not answer: {site.unreachable}", "mpserverctl check")
    else:
        start = "systemctl start mpserverd" if site.unit else "mpserverd --config FILE"
        yield note(f"no daemon answers ({site.unreachable}); what needs one is left out", start)


def storer(site: Site) -> Iterator[Finding]:
    """How long writing takes, and whether all of it worked."""
    found = storer_report(site.live) if site.live is not None else None
    if found is None or site.live is None:
        yield ok("no storer to look at")
        return
    streams = len(site.live.ledger.streams.rows)
    last_s, longest_s = found["cycle_ns"] / 1e9, found["cycle_ns_max"] / 1e9
    allowed_s = max(CYCLE_S_SLOW, site.settings.spool.commit_interval_s, 3 * streams * NS_PER_STREAM / 1e9)
    text = f"the last cycle took {last_s:.3f} s, the longest {longest_s:.3f} s, streams now: {streams:,}"
    bad = False
    if found["full"]:
        bad = True
        yield fault("the spool is full: nothing is stored", "df -h; free space, or lower min_free_bytes")
    if found["write_errors"] or found["segments_aside"]:
        bad = True
        yield warning(
            f"{found['write_errors']} writes or syncs failed, {found['segments_aside']} segments were set aside",
            "dmesg | tail; smartctl -a /dev/...; mpserverctl events",
        )
    if last_s > allowed_s:
        bad = True
        yield warning(f"{text}; {allowed_s:g} s are much", "mpserverctl doctor --probe; iostat -x 1")
    if not bad:
        yield ok(text)


def ledger(site: Site) -> Iterator[Finding]:
    """Every byte is accounted for, and none was given up."""
    if site.live is None:
        yield ok("no daemon to ask")
        return
    found = site.live.ledger
    totals = found.totals
    if not found.holds:
        wrong = sum(not one.holds for one in found.equations)
        yield fault(f"{wrong} equations and {len(found.off)} streams are off, 0 may be", "mpserverctl ledger")
    for account, why in (
        ("dropped_bytes", "the buffers were full: the disk was slower than the clients"),
        ("lost_bytes", "clients had them no more"),
    ):
        if totals[account]:
            yield warning(
                f"{totals[account]:,} of {totals['received_bytes']:,} bytes: {account.replace('_', ' ')}; {why}",
                "mpserverctl ledger --streams; mpserverctl doctor --probe",
            )
    if found.holds:
        yield ok(f"balances: {totals['received_bytes']:,} bytes received, {totals['at_risk_bytes']:,} at risk now")
