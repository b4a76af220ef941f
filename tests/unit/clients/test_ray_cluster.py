"""What fits on a cluster, and addresses that are none."""

import socket

import pytest

from moescope.clients.ray_cluster import check_address, size_replicas
from moescope.tracer.errors import InputError


def gpus(*counts):
    return [{"CPU": 16.0, "GPU": float(count)} for count in counts]


def cpus(*counts):
    return [{"CPU": float(count)} for count in counts]


@pytest.mark.parametrize(
    ("nodes", "replicas", "gpus_each", "sized"),
    [
        (gpus(8, 8), None, 2, (8, 1.0, 2)),
        (gpus(8, 8), 3, 4, (3, 1.0, 4)),
        (gpus(3, 3), None, 2, (2, 1.0, 2)),  # a replica lies within one machine
        ([*gpus(4), *cpus(8)], None, 1, (4, 1.0, 1)),
        (cpus(2), 2, 1, (2, 1.0, 0)),
        (cpus(8, 8), None, 1, (2, 8.0, 0)),
        (cpus(8, 8), 3, 1, (3, 4.0, 0)),  # 5 each would leave the third without a machine
        (cpus(2), 4, 1, (4, 0.5, 0)),
    ],
)
def test_replicas_are_sized_to_the_machines(nodes, replicas, gpus_each, sized):
    assert size_replicas(nodes, replicas, gpus_each) == sized


@pytest.mark.parametrize(
    ("nodes", "replicas", "gpus_each", "said"),
    [
        (gpus(8), 5, 2, "hold 4"),
        (gpus(4, 4), None, 8, "up to 4 GPUs each hold 0"),
        ([], 1, 1, "no CPU"),
    ],
)
def test_what_does_not_fit_is_refused(nodes, replicas, gpus_each, said):
    with pytest.raises(InputError, match=said):
        size_replicas(nodes, replicas, gpus_each)


@pytest.mark.parametrize("address", ["foo", "host:", ":6379", "http://host:80/x"])
def test_an_address_of_another_form_is_named(address):
    with pytest.raises(InputError, match="is no address: give `local`"):
        check_address(address)


def test_nobody_at_the_address_is_said_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(InputError, match="no Ray cluster answers at"):
            check_address(address)


def test_the_client_port_is_refused_with_what_to_do():
    with pytest.raises(InputError, match="ray job submit"):
        check_address("ray://127.0.0.1:10001")
