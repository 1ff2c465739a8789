"""furiosa-serve status."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from furiosa_llm.cli.name_option import name_option

if TYPE_CHECKING:
    from furiosa_llm.run_dir import RunDir

NOT_RUNNING = 3


@click.command()
@name_option
@click.option("--all", "is_for_all", is_flag=True, help="Every daemon of this user.")
@click.option("--json", "is_json", is_flag=True, help="As JSON: a list of daemons.")
def status(name: str, is_for_all: bool, is_json: bool) -> None:
    """Show a daemon's state, model, addresses and workers.

    Exit codes: 0 ready; 1 it runs, but is not ready; 3 it is not running.
    """
    from furiosa_llm.run_dir import RunDir, all_running

    run_dirs = all_running() if is_for_all else [RunDir(name)]
    found = [_status_of(each) for each in run_dirs]
    if is_json:
        click.echo(json.dumps(found, indent=1))
    else:
        click.echo("\n\n".join(_shown(each) for each in found) or "no daemon is running")
    codes = [_exit_code(each["state"]) for each in found]
    sys.exit(max(codes, default=NOT_RUNNING))


def _status_of(run_dir: RunDir) -> dict[str, Any]:
    from furiosa_llm.errors import FuriosaLLMError
    from furiosa_llm.server.control_client import ControlClient

    pid = run_dir.running_pid()
    if pid is None:
        return {"name": run_dir.name, "state": "not running"}
    try:
        with ControlClient(run_dir.control, "status") as control:
            answer = control.receive()
    except FuriosaLLMError as error:
        if run_dir.running_pid() is None:
            return {"name": run_dir.name, "state": "not running"}
        return {
            "name": run_dir.name,
            "state": "silent",
            "pid": pid,
            "failure": str(error),
            "workers": [],
        }
    del answer["ok"]
    return answer


def _exit_code(state: str) -> int:
    return {"ready": 0, "not running": NOT_RUNNING}.get(state, 1)


def _shown(found: dict[str, Any]) -> str:
    if "pid" not in found:
        return f"{found['name']}: not running"
    lines = [f"{found['name']}: {found['state']}"]
    if found["state"] == "starting":
        lines[0] += f" ({found['phase']})"
    if found.get("failure"):
        lines.append(f"  reason    {found['failure']}")
    lines.append(f"  pid       {found['pid']}")
    if "uptime_s" in found:
        lines[-1] += f", up {_duration(found['uptime_s'])}"
        lines.append(f"  model     {found['model']}")
        lines.append(f"  http      {found['http']}")
        lines += [f"  socket    {found['socket']}"] if found["socket"] else []
        num, connections = found["num_in_flight"], found["num_connections"]
        lines.append(
            f"  requests  {num} in flight; {connections} HTTP connections, "
            f"{found['num_clients']} clients on the socket"
        )
    lines += [
        f"  front-end {each['index']}, pid {each['pid'] or 'none'}: {each['num_in_flight']} in "
        f"flight, {each['num_connections']} HTTP connections, {each['num_restarts']} restarts"
        for each in found.get("front_ends", ())
    ]
    lines += [f"  worker {worker['worker_id']}  {_worker(worker)}" for worker in found["workers"]]
    return "\n".join(lines)


def _worker(worker: dict[str, Any]) -> str:
    head = f"{worker['devices']}  {worker['phase']}"
    if "pid" not in worker:  # it is being started
        return head
    restarts = sum(count for _, count in worker["restarts"])
    pid = "no process" if worker["pid"] is None else f"pid {worker['pid']}"
    return (
        f"{head}, {pid}: {worker['num_running']} running, {worker['num_waiting']} waiting, "
        f"{worker['num_free_blocks']} of {worker['num_blocks']} blocks free, "
        f"{restarts} restarts, {worker['num_output_tokens']} tokens"
    )


def _duration(seconds: float) -> str:
    minutes, left_s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min")]
    text = " ".join(f"{count} {unit}" for count, unit in parts if count)
    return text if days or hours else f"{text} {left_s} s".strip()
