"""The model of a step's seconds, against limits that can be reckoned by hand."""

from dataclasses import replace

import pytest

from scaling4d.pretrain.plan.closed_form import StepLayout, flops
from scaling4d.pretrain.plan.performance import CASES, Efficiency, Group, step_seconds
from scaling4d.pretrain.plan.plan import build, settings_of
from scaling4d.pretrain.plan.work import Work, work_of
from scaling4d.training.gpus import GPUS

IDEAL = Efficiency(1.0, 1.0, 1.0, 1.0, launch_s=0.0, block_cpu_s=0.0, fsdp_cpu_s=0.0, node_hop_s=0.0, network_hop_s=0.0)
H100 = GPUS["h100"]
PLAIN = StepLayout(1, False)


@pytest.fixture
def j(in_the_project: None) -> Work:
    return work_of(build("j", settings_of("j")))


def test_a_perfect_gpu_with_endless_links_takes_the_time_of_its_flops(j: Work) -> None:
    endless = replace(H100, memory_bytes_per_s=1e30, node_bytes_per_s=1e30, network_bytes_per_s=1e30, host_bytes_per_s=1e30)
    seconds = step_seconds(j, StepLayout(8, False), endless, IDEAL, clips=64, replicas=32)
    ideal_s = 64 * flops(j, recompute=False)["total"] / H100.bf16_flop_per_s
    assert 1 <= sum(seconds.values()) / ideal_s < 1.05  # tiles and waves


def test_a_gpu_alone_sends_nothing_and_recomputing_takes_longer(j: Work) -> None:
    for share in CASES.values():
        plain = step_seconds(j, PLAIN, H100, share, clips=1, replicas=1)
        again = step_seconds(j, replace(PLAIN, recompute=True), H100, share, clips=1, replicas=1)
        assert plain["communication"] == 0 and sum(again.values()) > sum(plain.values())


def test_a_slower_network_is_exposed_and_launches_weigh_more_in_small_batches(j: Work) -> None:
    layout, slow = StepLayout(8, False), replace(H100, network_bytes_per_s=H100.network_bytes_per_s / 10)
    fast_s, slow_s = (step_seconds(j, layout, gpu, IDEAL, clips=16, replicas=32) for gpu in (H100, slow))
    assert slow_s["communication"] > fast_s["communication"] and slow_s["compute"] == fast_s["compute"]
    one, many = (step_seconds(j, PLAIN, H100, CASES["slow"], clips=clips, replicas=1) for clips in (1, 16))
    assert one["launches"] == many["launches"]


def test_a_ring_over_machines_uses_all_adapters_of_a_machine() -> None:
    assert Group(8, 8).seconds(450e9, 0, H100, IDEAL) == 1
    assert Group(256, 8).seconds(400e9, 0, H100, IDEAL) == 1  # eight adapters of 50 GB/s
    assert Group(32, 1).seconds(50e9, 0, H100, IDEAL) == 1
    assert Group(1, 8).seconds(0, 0, H100, CASES["slow"]) == 0
