"""The files that a pod's containers share: resolv.conf and hostname."""

from __future__ import annotations

from pathlib import Path

from crishim.model.cri import DNSConfig
from crishim.model.records import SandboxRecord


def resolv_conf(dns: DNSConfig | None, host: str) -> str:
    """resolv.conf(5) from the pod's DNS configuration, or the host's where the pod has none."""
    if dns is None or dns == DNSConfig():
        return host
    lines = [f"nameserver {server}" for server in dns.servers]
    if dns.searches:
        lines.append("search " + " ".join(dns.searches))
    if dns.options:
        lines.append("options " + " ".join(dns.options))
    return "".join(f"{line}\n" for line in lines)


def write(folder: Path, record: SandboxRecord, hostname: str) -> None:
    """Write both into ``folder``; blocks."""
    host = Path("/etc/resolv.conf")
    text = resolv_conf(record.config.dns_config, host.read_text(errors="replace") if host.exists() else "")
    for name, content in (("resolv.conf", text), ("hostname", f"{hostname}\n")):
        path = folder / name
        path.write_text(content)
        path.chmod(0o644)
