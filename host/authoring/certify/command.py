"""``isolator certify``: a plugin under the faults of the protocol, and a certificate if it holds."""

from __future__ import annotations

from pathlib import Path

import click

from host.authoring.certify.checks import NAMES, Check
from host.cli.options import CONFIG
from host.cli.output import safe
from isolator.cli.output import here, print_json, print_result
from isolator.errors import UsageError
from isolator.paths import Paths

FILE = "certificate.json"


@click.command(
    epilog="\b\nExamples:\n  sudo isolator certify ./deploy-bell\n"
    "  sudo isolator certify deploy-bell-1.0.0.isolator --key lab.key\n"
    "  sudo isolator certify . --check bytes --check sigterm\n  sudo isolator certify --accept certificate.json\n\n"
    "\b\nA policy that takes nothing else:\n  [require]\n  certified = true\n\n"
    "Exit code: 0 nothing was found, 1 something was.",
)
@click.argument("folder", metavar="[DIR | FILE]", required=False)
@click.option("--check", "checks", multiple=True, type=click.Choice(NAMES), help="Only this check; no certificate.")
@click.option("--event", metavar="NAME", help="Play with this event (default: the first hook).")
@click.option("--payload", metavar="JSON", help="JSON, @FILE or -, for --event (default: an example).")
@CONFIG
@click.option("--policy", metavar="FILE", help="Grant this and no more (default: what the manifest asks for).")
@click.option("--schema", "schemas", metavar="NAME=FILE", multiple=True, help="An event of your platform.")
@click.option("--key", metavar="KEY", help="Sign the certificate with this key of 'isolator sign --new-key'.")
@click.option("--output", "-o", metavar="FILE", help=f"Write the certificate there (default: {FILE}, here).")
@click.option("--accept", metavar="FILE", help="Take a certificate that a certifier of [trust] has signed.")
@here
def certify(
    root: str | None,
    folder: str | None,
    checks: tuple[str, ...],
    event: str | None,
    payload: str | None,
    config: tuple[str, ...],
    policy: str | None,
    schemas: tuple[str, ...],
    key: str | None,
    output: str | None,
    accept: str | None,
    as_json: bool,
) -> int:
    """Play the faults of the protocol against a plugin in its cage: does it hold?

    A daemon of this command's own does it, as for 'plugin test'. Nothing is reached over the network: other sides are
    down, now refusing, now silent. If nothing is found, the certificate names the digest of the content; from then on
    this host counts that version as certified. An author's own certificate proves nothing elsewhere.
    """
    if accept is not None:
        if folder is not None or key is not None:
            raise UsageError("certify", "--accept takes the certificate alone", "see --help")
        _accept(root, Path(accept), as_json=as_json)
        return 0
    if folder is None:
        raise UsageError("certify", "name a folder or a package", "see --help")
    from host.authoring.certify import certificate
    from host.authoring.certify.certifier import PATIENCE, Certifier, DeadEnd
    from host.authoring.options import plan_of
    from host.authoring.private_daemon import PrivateDaemon
    from host.authoring.sign import read_key
    from isolator.linux.signals import ending_cleanly

    plan = plan_of(folder, [event] if event else [], payload, config, policy, schemas, PATIENCE)
    private = read_key(Path(key)) if key is not None else None
    path = Path(output or FILE)
    if path.resolve().is_relative_to(Path(plan.folder).resolve()):
        raise UsageError(str(path), "is inside the folder that is certified", "name another with -o")

    def note(check: Check) -> None:
        if not as_json:
            click.echo(f"  {check.name}: {check.title}", err=True)

    dead_end = DeadEnd()
    network = dead_end.network
    try:
        with ending_cleanly(), PrivateDaemon("certify", root, options=["--certifying"], network=network) as daemon:
            report = Certifier(daemon, plan, dead_end, note).certify(checks)
    finally:
        dead_end.close()
    written = report.ok and report.whole
    if written:
        from isolator.registration import certificates

        certificate.write(report, path, private)
        certificates.keep(Paths.of(root), certificates.Certificate(report.plugin, report.version, report.digest))
    if as_json:
        print_json(certificate.to_json(report) | {"certificate": str(path) if written else None})
        return 0 if report.ok else 1
    click.echo(f"{report.plugin} {safe(report.version)} ({report.mode})")
    for one in report.results:
        verdict = "failed" if one.findings else "not played" if one.skipped else "ok"
        click.echo(f"  {verdict:<10} {one.check.name:<8} {one.check.title}")
        for line in (*one.findings, *([one.skipped] if one.skipped else ())):
            click.echo(f"             {safe(line)}")
    if written:
        click.echo(f"certified: {path}, for the content {report.digest}")
    elif report.ok:
        click.echo("no certificate: only some of the checks were played")
    return 0 if report.ok else 1


def _accept(root: str | None, path: Path, *, as_json: bool) -> None:
    import os

    from host.authoring.certify import certificate
    from isolator.errors import DeniedError
    from isolator.policy.parse.trusted import load_host_config
    from isolator.registration import certificates
    from isolator.registration.reading import read_certificate

    if os.geteuid() != 0:
        raise DeniedError("certify --accept", "only root decides what counts as certified", "run it with sudo")
    paths = Paths.of(root)
    host_config = load_host_config(paths.host_toml)
    claim = read_certificate(certificate.read(path), str(path), host_config.uid_range)
    found = certificates.checked(claim, host_config.trust)
    certificates.keep(paths, found)
    by = certificates.certifier(paths, found.digest, host_config.trust)
    print_result(
        {"plugin": found.name, "version": found.version, "digest": found.digest, "certifier": by},
        f"{found.name} {found.version} counts as certified, by {by}",
        as_json=as_json,
    )
