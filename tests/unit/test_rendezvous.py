"""How ranks meet: the network interface of the route to the first host, and a store that no earlier start has used."""

import socket
import threading
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist

from dsft.distributed import rendezvous, runtime
from dsft.errors import UserError
from tests.helpers import PRODUCED


def test_ranks_meet_where_ranks_have_died_before_and_start_in_any_order():
    store = dist.HashStore()
    store.set("dsft/token/1", "of a rank that has died")
    store.set("dsft/start", '["old", ["x", "of a rank that has died", "y"]]')
    store.set("dsft/agreed/old", "")
    found: dict[int, dist.Store] = {}

    def join(rank: int) -> None:
        found[rank] = rendezvous.store_of_this_start(store, rank, 3)
        found[rank].set(f"here/{rank}", "")

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(3)]
    for thread in (threads[0], threads[2], threads[1]):
        thread.start()
        thread.join(3 * rendezvous.POLL_SECONDS)  # rank 0 has read the old token by the time rank 1 comes
    for thread in threads:
        thread.join(10)
    assert sorted(found) == [0, 1, 2]
    assert all(own.check([f"here/{rank}" for rank in range(3)]) for own in found.values())
    again: dict[int, dist.Store] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: again.update({rank: rendezvous.store_of_this_start(store, rank, 2)}))
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not again[1].check(["here/0"])
    again[0].set("new", "")
    assert again[1].check(["new"])


@pytest.fixture
def interfaces(monkeypatch):
    """Interfaces with an IPv4 address each, and two hosts of two ranks."""

    def given(**addresses: str) -> None:
        found = {name: [SimpleNamespace(family=socket.AF_INET, address=own)] for name, own in addresses.items()}
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)

    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    return given


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ({"lo": "127.0.0.1", "eth0": "10.0.0.1"}, "eth0"),  # the first host calls itself 127.0.0.1
        ({"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"}, None),  # gloo's own choice
        ({"eth0": "10.0.0.1", "fast": "127.0.0.1"}, "eth0"),
        ({"lo": "127.0.0.1"}, None),
    ],
)
def test_gloo_does_not_use_the_loopback_interface_between_hosts(interfaces, monkeypatch, addresses, expected):
    interfaces(**addresses)
    rendezvous.set_gloo_interface()
    assert rendezvous.os.environ.get("GLOO_SOCKET_IFNAME") == expected


def test_gloo_uses_the_interface_of_the_route_to_the_first_host(interfaces, monkeypatch):
    monkeypatch.setattr(rendezvous, "_source_address", {"first": "10.1.0.7"}.get)
    monkeypatch.setenv("MASTER_ADDR", "first")
    interfaces(lo="127.0.0.1", eth0="10.0.0.7", ib0="10.1.0.7")
    rendezvous.set_gloo_interface()
    assert rendezvous.os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_the_users_interface_and_a_single_host_are_left_alone(interfaces, monkeypatch):
    interfaces(lo="127.0.0.1", eth0="10.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    rendezvous.set_gloo_interface()
    assert rendezvous.os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    rendezvous.set_gloo_interface()
    assert "GLOO_SOCKET_IFNAME" not in rendezvous.os.environ


def test_a_port_in_use(monkeypatch):
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
        with pytest.raises(UserError) as caught:
            rendezvous.start_process_group(torch.device("cpu"))
    told = f"port {port} is in use on this machine; give the launcher another --master_port"
    assert str(caught.value) == told
    PRODUCED.add(told)


def test_a_file_that_another_machine_sees_late_is_waited_for(monkeypatch, tmp_path):
    path, seen = tmp_path / "written by rank 0", iter([False, False, True])
    monkeypatch.setattr(runtime, "gather_objects", lambda _: [True, next(seen)])
    monkeypatch.setattr(runtime.time, "sleep", lambda _: None)
    runtime.check_visible(path)
    assert next(seen, None) is None
