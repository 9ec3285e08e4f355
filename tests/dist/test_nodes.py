"""Two machines, one run: the launch script's ranks meet over a network and train as one process
would; a machine that dies is replaced, and the run ends with the bits of one that never failed."""

from __future__ import annotations

import subprocess
import time
import warnings
from pathlib import Path

import pytest
import torch
from agreement import LATER_LOSS, SAME_LOSS
from nodes import Node, two_nodes
from ports import free_port
from records import curve, weights

STEPS = 10
RUN = (
    "model.num_layers=2 model.hidden_size=64 model.num_attention_heads=2 model.num_query_groups=2 "
    "model.ffn_hidden_size=128 model.seq_length=64 train.micro_batch=2 train.global_batch=8 "
    f"train.steps={STEPS} train.eval_interval=4 data.valid_tokens=256 checkpoint.interval=3 "
    "optim.params_dtype=fp32 precision=nvfp4 logging.wandb.mode=disabled logging.console=quiet "
    "data.mock=true"
).split()

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, []),
        pytest.param(2, ["parallel.tensor=2"], marks=pytest.mark.long),
    ],
    ids=["DP between nodes", "DP between nodes, TP 2 inside"],
)
def test_a_lost_node_is_replaced_and_the_run_ends_as_if_nothing_had_been(
    ranks, tmp_path: Path, processes: int, layout: list[str]
) -> None:
    """Bit for bit the run on one machine, and one process's curve. From the first start on with
    resume=auto, which begins where there is nothing to go on from."""
    run, whole, single = tmp_path / "run", tmp_path / "whole", tmp_path / "single"
    lose_a_node([*RUN, *layout, f"run_dir={run}"], run=run, processes=processes, returns=True)
    ranks.run("train", [*RUN, *layout, f"run_dir={whole}"], size=2 * processes)
    ranks.run("train", [*RUN, f"run_dir={single}"], size=1)

    assert curve(run) == curve(whole)
    last = f"checkpoints/step_{STEPS:08d}"
    one, other = weights(whole / last), weights(run / last)
    assert one.keys() == other.keys()
    assert not [key for key in one if not torch.equal(one[key], other[key])]
    assert_close(run, single)


@pytest.mark.long  # torchrun waits half a minute for other nodes before it begins with fewer
def test_a_run_goes_on_without_a_lost_node(ranks, tmp_path: Path) -> None:
    """With NNODES=1:2 the other node trains on alone, from the last checkpoint: one process's curve."""
    run, single = tmp_path / "run", tmp_path / "single"
    lose_a_node([*RUN, f"run_dir={run}"], run=run, processes=1, returns=False)
    ranks.run("train", [*RUN, f"run_dir={single}"], size=1)
    assert_close(run, single)


@pytest.mark.parametrize(
    ("odd", "line"),
    [
        ("optim.lr=0.002", "optim.lr: 0.002 here and 0.001 on the main rank"),
        ("optim.lx=3", "optim.lx: no such key"),
    ],
)
def test_a_node_that_was_started_otherwise_stops_both_at_once(
    tmp_path: Path, odd: str, line: str
) -> None:
    """Nothing is trained; the line stands on that node and, with its name, on the main one."""
    logs = [tmp_path / f"node{index}.log" for index in range(2)]
    began, port = time.monotonic(), str(free_port())
    with two_nodes() as nodes:
        agents = [
            node.torchrun(
                [*RUN, f"run_dir={tmp_path / 'run'}", *([odd] if index else [])],
                logs[index],
                NNODES="2",
                NPROC_PER_NODE="1",
                NODE_RANK=str(index),
                MASTER_ADDR=nodes[0].address,
                MASTER_PORT=port,
            )
            for index, node in enumerate(nodes)
        ]
        statuses = [agent.wait(timeout=300) for agent in agents]
    said = [log.read_text() for log in logs]
    assert all(statuses), said
    assert [text.count(f"fp4pretrain: {line}") for text in said] == [1, 1], said
    assert "(rank 1 on " in said[0]
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - began < 240


def assert_close(run: Path, single: Path) -> None:
    """The losses of two layouts, stochastic rounding and all."""
    gaps = [
        abs(a["loss"] / b["loss"] - 1)
        for a, b in zip(curve(run), curve(single), strict=True)
        if a["event"] == "train"
    ]
    assert gaps[0] <= SAME_LOSS, gaps
    assert max(gaps) <= LATER_LOSS, gaps


def lose_a_node(overrides: list[str], *, run: Path, processes: int, returns: bool) -> None:
    """Train on two nodes; one's torchrun dies after step 5, its ranks with it, and may come back.

    The lost node holds rank 0 (torchrun orders nodes by address), the other hosts the rendezvous.
    """
    log = run.with_suffix(".log")
    with two_nodes() as (first, host):
        if not first.isolated:
            warnings.warn("no network namespaces here: two loopback addresses", stacklevel=2)

        def start(node: Node) -> subprocess.Popen:
            return node.torchrun(
                [*overrides, "resume=auto"],
                log,
                NNODES="2" if returns else "1:2",
                NPROC_PER_NODE=str(processes),
                NODE_RANK=str(int(node is not host)),
                MASTER_ADDR=host.address,
                MAX_RESTARTS="2",  # one may go to a port that was taken before a rank opened it
                RDZV_CONF="keep_alive_interval=1,keep_alive_max_attempt=2",
            )

        agents = [start(host), start(first)]
        _wait_for_step(run, 5, agents, log)
        assert first.lose(b"torchrun") == 2  # the script and the agent: no rank outlives them
        agents.pop().wait()
        if returns:
            agents.append(start(first))
        statuses = [agent.wait(timeout=600) for agent in agents]
        assert set(statuses) == {0}, log.read_text()[-4000:]


def _wait_for_step(run: Path, step: int, agents: list[subprocess.Popen], log: Path) -> None:
    """Until the run logged ``step``. Fails with the nodes' output if it ends or hangs before."""
    deadline = time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() or len(curve(run)) < step:
        assert all(agent.poll() is None for agent in agents), log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)
