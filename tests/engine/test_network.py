"""The local cluster is private: it listens on loopback only."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import sys

import psutil
import pytest

import actshuffle
from actshuffle.errors import ClusterError
from actshuffle.executors import local_cluster
from support.processes import PLAN, SEED, assert_exact, source


def listening():
    """Addresses on which this process and its children accept connections."""
    found = set()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        for link in process.net_connections(kind="inet"):
            if link.status == psutil.CONN_LISTEN:
                found.add((link.laddr.ip, link.laddr.port))
    return found


def test_own_cluster_listens_on_loopback_only_and_imports_what_it_is_told(tmp_path):
    src = source(tmp_path / "src.zarr")
    before = listening()
    with local_cluster(2, imports=["wave"]) as executor:
        imported = executor.client.run(lambda: [name in sys.modules for name in ("wave", "chunk")])
        assert [*imported.values()] == [[True, False]] * 2
        actshuffle.shuffle(src, tmp_path / "dst.zarr", seed=SEED, fsync=False, executor=executor, **PLAN)
        ours = listening() - before
        assert len(ours) >= 3  # a scheduler and two workers
        outside = {(ip, port) for ip, port in ours if not ipaddress.ip_address(ip).is_loopback}
        assert outside == set()
    assert not (listening() - before)


def test_control_sockets_on_all_addresses_are_seen():
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        assert ("0.0.0.0", server.getsockname()[1]) in listening()


def test_serial_runs_open_no_sockets(tmp_path):
    src = source(tmp_path / "src.zarr")
    before = listening()
    actshuffle.shuffle(src, tmp_path / "dst.zarr", seed=SEED, fsync=False, **PLAN)
    assert listening() == before
    assert_exact(src, tmp_path / "dst.zarr")


# --- Certificates, the Dask way -----------------------------------------------------------------


def _authority(folder, name):
    """A certificate authority, and a certificate that it signed: (CA file, certificate, key)."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def subject(text):
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    def certificate(holder, key, issuer, signer, is_authority):
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject(holder))
            .issuer_name(subject(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
            .sign(signer, hashes.SHA256())
        )

    folder.mkdir()
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1()))
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(certificate(name, authority_key, name, authority_key, True).public_bytes(pem))
    (folder / "cert.pem").write_bytes(certificate("node", key, name, authority_key, False).public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return {
        "tls_ca_file": str(folder / "ca.pem"),
        "require_encryption": True,
        **{
            f"tls_{who}_{what}": str(folder / f"{what}.pem")
            for who in ("client", "scheduler", "worker")
            for what in ("cert", "key")
        },
    }


def _cluster(security):
    from distributed import LocalCluster

    return LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tls://",
        security=security,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    )


def test_tls_with_the_right_and_the_wrong_authority(tmp_path):
    from distributed import Client, Security

    right = Security(**_authority(tmp_path / "right", "right"))
    wrong = Security(**_authority(tmp_path / "wrong", "wrong"))
    src = source(tmp_path / "src.zarr")
    with _cluster(right) as cluster:
        assert cluster.scheduler_address.startswith("tls://")
        with Client(cluster.scheduler_address, security=right) as client:
            actshuffle.shuffle(src, tmp_path / "dst.zarr", seed=SEED, fsync=False, client=client, **PLAN)
        for security in (wrong, None):
            with pytest.raises((OSError, TypeError, ClusterError)):
                Client(cluster.scheduler_address, security=security, timeout=3)
    assert_exact(src, tmp_path / "dst.zarr")


@pytest.mark.parametrize("authority", ["right", "wrong"])
def test_command_line_with_certificates_configured_the_dask_way(authority, tmp_path):
    """The wrong authority is an error, not an unchecked run."""
    import dask
    from click.testing import CliRunner
    from distributed import Security

    from actshuffle.cli.app import main

    files = {name: _authority(tmp_path / name, name) for name in ("right", "wrong")}
    src, dst = source(tmp_path / "src.zarr"), tmp_path / "dst.zarr"
    ours = files[authority]
    settings = {
        "distributed.comm.tls.ca-file": ours["tls_ca_file"],
        "distributed.comm.tls.client.cert": ours["tls_client_cert"],
        "distributed.comm.tls.client.key": ours["tls_client_key"],
        "distributed.comm.timeouts.connect": "60s" if authority == "right" else "2s",
    }
    with _cluster(Security(**files["right"])) as cluster, dask.config.set(settings):
        command = ["run", str(src), str(dst), "--seed", str(SEED), "--scheduler"]
        told = CliRunner().invoke(main, [*command, cluster.scheduler_address])
    if authority == "right":
        assert told.exit_code == 0, told.stderr
        assert_exact(src, dst)
    else:
        assert told.exit_code == 1
        assert "error: no Dask scheduler answers at tls://" in told.stderr
        assert not dst.exists()


def test_environment_of_tests_is_no_proxy():
    assert not os.environ.get("DASK_DISTRIBUTED__COMM__DEFAULT_SCHEME")
