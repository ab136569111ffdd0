"""Is the daemon healthy? What a health probe asks, computed from the shared tables.

Each check has a name, a verdict and what was found, in words. Nothing here asks the daemon.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mpserverd.arena.live import LiveState
from mpserverd.arena.report import SCHEMA_VERSION, heartbeat_age_s, storer, workers
from mpserverd.arena.state import STORER_SLOT, SUPERVISOR_SLOT, Head, Phase

HEARTBEAT_AGE_S_MAX = 5.0
"""Children beat at least once a second."""


def health(live: LiveState) -> dict[str, Any]:
    """What a health probe asks: each check with what was found, and whether all are fine."""
    checks = [_phase_check(live), *_worker_checks(live), *_storer_checks(live), _supervisor_check(live)]
    checks += _reload_checks(live)
    wrong = [one for one in live.ledger.equations if not one.holds]
    off = len(live.ledger.off)
    text = "every equation holds"
    if not live.ledger.holds:
        text = f"{off} streams and {len(wrong)} of the totals' equations are off; see mpserverctl ledger"
    checks.append(_check("ledger", live.ledger.holds, text))
    return {
        "schema_version": SCHEMA_VERSION,
        "healthy": all(check["ok"] for check in checks),
        "checks": checks,
    }


def _check(name: str, ok: bool, text: str) -> dict[str, Any]:
    return {"check": name, "ok": ok, "detail": text}


def _phase_check(live: LiveState) -> dict[str, Any]:
    phase = Phase(live.state.words[Head.PHASE])
    return _check("phase", phase is Phase.SERVING, phase.name.lower())


def _supervisor_check(live: LiveState) -> dict[str, Any]:
    return _beat_check(live, "supervisor", live.state.slots[SUPERVISOR_SLOT])


def _reload_checks(live: LiveState) -> list[dict[str, Any]]:
    """One that was refused is there to be seen, and no fault: the daemon serves with the settings that it had."""
    error = live.facts.get("reload_error")
    return [_check("reload", True, f"refused, the settings before it are in force: {error}")] if error else []


def _worker_checks(live: LiveState) -> list[dict[str, Any]]:
    wanted = {worker["slot"] for worker in live.facts.get("workers", []) if worker.get("wanted", True)}
    found = [worker for worker in workers(live) if worker["slot"] in wanted]  # old ones leave after a reload
    running = [worker for worker in found if worker["state"] == "running"]
    others = ", ".join(f"worker-{one['index']} is {one['state']}" for one in found if one not in running)
    text = f"{len(running)} of {len(found)} running" + (f": {others}" if others else "")
    checks = [_check("workers", bool(found) and len(running) == len(found), text)]
    slots = live.state.slots
    return checks + [_beat_check(live, f"worker-{worker['index']}", slots[worker["slot"]]) for worker in running]


def _storer_checks(live: LiveState) -> list[dict[str, Any]]:
    found = storer(live)
    if found is None:
        return []
    checks = [_check("storer", found["state"] == "running", found["state"])]
    if found["state"] == "running":
        checks.append(_beat_check(live, "storer", live.state.slots[STORER_SLOT], "storer-heartbeat"))
    return [*checks, _spool_check(found)]


def _spool_check(found: dict[str, Any]) -> dict[str, Any]:
    """Nothing there, nothing free and not full is what a storer says that has never looked."""
    if not (found["full"] or found["free_bytes"] or found["spool_bytes"]):
        return _check("spool", False, "unknown: the storer has not looked yet")
    text = f"{found['free_bytes']} bytes free"
    return _check("spool", not found["full"], f"full, {text}" if found["full"] else text)


def _beat_check(live: LiveState, name: str, row: npt.NDArray[np.uint64], check: str = "") -> dict[str, Any]:
    age_s = heartbeat_age_s(row)
    text = "no heartbeat yet" if age_s is None else f"last heartbeat {age_s:.1f} s ago"
    limit_s = max(HEARTBEAT_AGE_S_MAX, float(live.facts.get("heartbeat_timeout_s", 0.0)))
    return _check(check or f"{name}-heartbeat", age_s is not None and age_s <= limit_s, text)
