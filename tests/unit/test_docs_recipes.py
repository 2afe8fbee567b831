"""The Slurm and Ray recipes of docs/deployment.md, with stand-ins for what they start: the daemon takes the config that
comes of them, and trainers look for the socket that it listens at. On clusters they are run by hand.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from tests.unit.test_docs_site import deployment
from weightsync.config import NodeConfig, parse_node_config
from weightsync.wire.keys import make_key_file

STAND_INS = {
    "scontrol": "echo n1; echo n2",
    "hostname": '[ "$1" = -s ] && echo n1 || echo "10.0.0.7 192.168.3.4 fd00::1 "',
    "srun": '[ "$1" = --overlap ] && shift; exec "$@"',
    "weightsyncd": 'printf "%s\\n" "$@" "$WEIGHTSYNC_DAEMON" > "$TOLD"',
    **dict.fromkeys(("weightsync", "vllm", "curl", "torchrun"), ":"),
}


def config_of(arguments: list[str], tmp_path: Any) -> NodeConfig:
    make_key_file(tmp_path / "cluster.key")
    (file,) = deployment("toml")
    sets = [value for flag, value in itertools.pairwise(arguments) if flag == "--set"]
    return parse_node_config(file.replace("/etc/weightsync/cluster.key", str(tmp_path / "cluster.key")), "n", sets)


def test_the_slurm_script(tmp_path):
    (script,) = (text for text in deployment("bash") if "#SBATCH" in text)
    assert "--exclusive" in script, "else all steps of a node share one core"
    for name, does in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o700)
    job = f"test-{os.getpid()}"
    more = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "n[1-2]", "TOLD": str(tmp_path / "told")}
    environment = {**os.environ, **more, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = script.replace("/tmp/weightsync-$SLURM_JOB_ID", f"{tmp_path}/$SLURM_JOB_ID")
    subprocess.run(["bash", "-c", f"{script}\nwait"], env=environment, cwd=tmp_path, timeout=60, check=True)
    *arguments, endpoint = (tmp_path / "told").read_text().splitlines()
    config = config_of(arguments, tmp_path)
    assert (tmp_path / job).stat().st_mode & 0o777 == 0o700
    assert config.node.name == "n1"
    assert config.node.listen == endpoint
    assert config.cluster.address == "10.0.0.7"
    assert config.cluster.listen == config.cluster.seed == "tcp://10.0.0.7:29600"


def test_the_ray_task(tmp_path, monkeypatch):
    (recipe,) = (text for text in deployment("python") if "ray" in text)
    told: dict[str, Any] = {}

    def init(runtime_env: dict[str, Any]) -> None:
        for name, value in runtime_env["env_vars"].items():
            monkeypatch.setenv(name, value.replace("/tmp", str(tmp_path)))

    def remote(**_: Any) -> Any:  # a decorator, of a function that then runs here
        return lambda function: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=function))

    nodes = [{"Alive": True, "NodeID": "ab", "NodeManagerAddress": "10.0.0.1"}, {"Alive": False}]
    util = SimpleNamespace(get_node_ip_address=lambda: "10.0.0.7")
    ray = SimpleNamespace(init=init, remote=remote, nodes=lambda: nodes, util=util)
    placing = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda *_, **__: None)
    for name, module in (("ray", ray), ("ray.util", util), ("ray.util.scheduling_strategies", placing)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(subprocess, "call", lambda arguments: told.setdefault("arguments", arguments) and 0)
    exec(recipe.replace('"/tmp/', f'"{tmp_path}/'), {})
    config = config_of(told["arguments"], tmp_path)
    assert config.node.listen == os.environ["WEIGHTSYNC_DAEMON"], "actors look for another socket"
    assert (tmp_path / "weightsync-ray").stat().st_mode & 0o777 == 0o700
    assert config.cluster.listen == "tcp://10.0.0.7:29600"
    assert config.cluster.seed == "tcp://10.0.0.1:29600"
