"""A saved view of a project on wandb, made for runs of this framework (``pip install 'fp4pretrain[wandb]'``).

Charts over tokens of the losses, the gap, the optimizer, throughput, the observers' means and events; above
them the finished runs: gap against the share of FP4 FLOPs, and bars of the gap. Runs are sorted by their
final gap, and the columns by which one sorts stand first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fp4pretrain.errors import UserError, first_line
from fp4pretrain.observe.sink import DECIDED, HAPPENED
from fp4pretrain.precision import GEMMS, OPERANDS

_NAMED = re.compile(r"[^/\s]+/[^/\s]+")
_COLUMNS = (
    "summary:final/gap_percent",
    "summary:final/extra_tokens_percent",
    "summary:final/val_loss",
    "summary:final/fp4_flops_percent",
    "summary:final/tokens_per_second",
)
_OPERANDS = [f"{gemm}.{operand}" for gemm in GEMMS for operand in OPERANDS[gemm]]
_OBSERVED = ("sqnr_db", "underflow", "saturation", "kurtosis")
# Section -> chart -> the keys that it draws over tokens.
_CHARTS: dict[str, dict[str, Sequence[str]]] = {
    "Loss": {key: (key,) for key in ("loss", "val_loss", "val_loss_bf16")},
    "Gap to the baseline": {key: (key,) for key in ("gap", "gap_bf16")},
    "Optimizer": {key: (key,) for key in ("lr", "grad_norm")},
    "Throughput": {key: (key,) for key in ("tokens_per_second", "mfu", "memory_gib")},
    "Casts": {name: [f"observe/{name}/{one}" for one in _OPERANDS] for name in _OBSERVED},
    "Events": {"events": [f"events/{name}" for name in sorted(DECIDED | HAPPENED)]},
}
_OPEN = ("Loss", "Gap to the baseline")


def save_view(project: str, *, group: str | None, name: str) -> str:
    """Save the view in ``ENTITY/PROJECT``, of one group's runs or of all; its address.

    Raises UserError where the package is missing, or the server does not take it.
    """
    if not _NAMED.fullmatch(project):
        raise UserError(f"project: {project!r} is no ENTITY/PROJECT of wandb; give both")
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError(
            "dashboard: it needs wandb-workspaces; pip install 'fp4pretrain[wandb]'"
        ) from None
    view = made_view(ws, project, group=group, name=name)
    try:
        view.save()
    except Exception as error:  # of the network, the server, the package
        line = first_line(error)
        raise UserError(
            f"dashboard: {project} did not take the view ({line}); look at the name, the network and wandb "
            "login"
        ) from None
    return str(view.url)


def made_view(ws: Any, project: str, *, group: str | None, name: str) -> Any:
    """The view as wandb's package ``ws`` has it, not saved yet."""
    import wandb_workspaces.reports.v2 as reports

    entity, _, project = project.partition("/")
    gap, share = "final/gap_percent", "final/fp4_flops_percent"
    finished = [
        reports.ScatterPlot(
            title="Gap (%) over the share of FP4 FLOPs (%)",
            x=reports.SummaryMetric(share),
            y=reports.SummaryMetric(gap),
        ),
        reports.BarPlot(title="Gap (%)", metrics=[gap]),
        reports.RunComparer(diff_only="split"),
    ]
    sections = [ws.Section(name="Finished runs", panels=finished, is_open=True)]
    for title, charts in _CHARTS.items():
        panels = [reports.LinePlot(title=n, x="tokens", y=list(keys)) for n, keys in charts.items()]
        sections.append(ws.Section(name=title, panels=panels, is_open=title in _OPEN))
    runs = ws.RunsetSettings(
        filters="" if group is None else ws.And(ws.Metric("Group") == group),
        order=[ws.Ordering(ws.Summary(gap))],
        pinned_columns=list(_COLUMNS),
    )
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="tokens"),
        runset_settings=runs,
    )
