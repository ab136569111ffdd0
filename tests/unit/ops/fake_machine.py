"""A machine of files: /proc, /sys and cgroups below a temporary directory, healthy until a test breaks one thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpserverd.config.load import loads
from mpserverd.ops.findings import Finding, Level
from mpserverd.ops.site import Site

MEMINFO = "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\n"
LIMITS = (
    "Limit                     Soft Limit           Hard Limit           Units\nMax open files            {} {} files\n"
)
SNMP = "Tcp: InSegs OutSegs RetransSegs\nTcp: {} {} {}\n"
NETSTAT = "TcpExt: TCPRcvQDrop ListenOverflows\nTcpExt: {} {}\n"


class Machine:
    """``site`` looks at it; ``write`` breaks it."""

    def __init__(self, root: Path, toml: str = "") -> None:
        self.root = root
        self.spool = root / "spool"
        self.spool.mkdir()
        (root / "run").mkdir()
        self.config_path = root / "mpserverd.toml"
        self.config_path.write_text("")
        self.write("proc/meminfo", MEMINFO)
        self.write("proc/self/limits", LIMITS.format(65536, 65536))
        self.write("proc/sys/net/core/rmem_max", "134217728\n")
        self.write("proc/sys/net/core/wmem_max", "134217728\n")
        self.write("proc/sys/net/core/somaxconn", "4096\n")
        self.write("proc/net/snmp", SNMP.format(10_000, 10_000, 1))
        self.write("proc/net/netstat", NETSTAT.format(0, 0))
        self.write("proc/net/tcp", "  sl  local_address\n")
        self.card("eth0", rx_packets=1_000_000, rx_dropped=0, rx_errors=0)
        self.site = Site(
            config_path=self.config_path,
            proc=root / "proc",
            sys=root / "sys",
            cgroups=root / "cgroup",
            unreachable="no such socket",
            sleep=lambda _: None,
        )
        self.configure(toml)

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def card(self, name: str, **values: int) -> None:
        for key, value in values.items():
            self.write(f"sys/class/net/{name}/statistics/{key}", f"{value}\n")

    def configure(self, toml: str) -> None:
        """The settings; spool and control socket lie below the machine's root."""
        self.site.config = loads(
            toml,
            [f"spool.path={self.spool}", f"server.control_socket={self.root}/run/control.sock"],
        )

    def process(self, pid: int, **files: str) -> None:
        for name, text in files.items():
            self.write(f"proc/{pid}/{name}", text)


def levels(found: Any) -> list[Level]:
    return [finding.level for finding in found]


def only(found: Any) -> Finding:
    """The one finding that there is."""
    findings = list(found)
    assert len(findings) == 1, findings
    finding = findings[0]
    assert isinstance(finding, Finding)
    return finding
