"""The scripts of scripts/launch: what they start, with which words, and that a job of Slurm is queued again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from ranks import free_port

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scripts" / "launch"
TINY = (
    "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions= "
    "--diffusion_steps 40 --batch_size 1 --num_workers 0 --max_steps 2 --device cpu"
).split()


def stub(folder: Path, name: str, body: str) -> None:
    """A program in place of one that the machine may not have."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def launch(script: str, words: list[str], *programs: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*map(str, programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, **{k: str(v) for k, v in variables.items()}}
    return subprocess.run([LAUNCH / script, *words], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("script", "program", "variables", "expected"),
    [
        ("one_node.sh", "torchrun", {"RANKS": 3}, "--standalone --nproc_per_node 3 --max-restarts 3 scripts/x"),
        (
            "several_nodes.sh",
            "torchrun",
            {"RANKS": 2, "NODES": 4, "NODE": 1, "HEAD": "h:1", "RESTARTS": 0},
            "--nnodes 4 --node_rank 1 --nproc_per_node 2 --max-restarts 0 --rdzv_backend c10d --rdzv_endpoint h:1 "
            "--rdzv_id guided-diffusion --rdzv_conf is_host=0 scripts/x",
        ),
        ("mpi.sh", "mpiexec", {"RANKS": 2, "HOSTS": "a,b"}, f"-n 2 -hosts a,b {sys.executable} scripts/x"),
        ("slurm.sh", "srun", {"SLURM_SUBMIT_DIR": ROOT}, f"--kill-on-bad-exit=1 {sys.executable} scripts/x"),
    ],
)
def test_words_reach_the_launcher(tmp_path: Path, script: str, program: str, variables: dict, expected: str) -> None:
    stub(tmp_path, program, "printf '%s ' \"$@\"")
    for command, auto in (("image_train", " --resume_checkpoint auto"), ("image_sample", "")):
        done = launch(script, [command, "--data_dir", "a"], tmp_path, **variables)
        line = expected.replace("scripts/x", f"scripts/{command}.py{auto} --data_dir a")
        assert (done.stdout.strip(), done.returncode) == (line, 0), done.stderr
    refused = launch(script, ["image_trian"], tmp_path, **variables)
    assert refused.returncode == 2
    assert "COMMAND [--FLAG VALUE ...]" in refused.stderr


@pytest.mark.parametrize(("code", "queued"), [(138, True), (0, False), (1, False)])
def test_a_job_that_was_interrupted_is_queued_again(tmp_path: Path, code: int, queued: bool) -> None:
    stub(tmp_path, "srun", f"exit {code}")
    stub(tmp_path, "scontrol", "printf '%s ' \"$@\"")
    done = launch("slurm.sh", ["image_train"], tmp_path, SLURM_JOB_ID=77, SLURM_SUBMIT_DIR=ROOT)
    assert (done.stdout.strip(), done.returncode) == ("requeue 77" if queued else "", 0 if queued else code)


def test_the_job_of_kubernetes_calls_the_script_with_all_that_it_needs() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    container, name = pod["containers"][0], job["metadata"]["name"]
    assert os.access(ROOT / container["command"][0], os.X_OK)
    given = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert given.keys() >= {"NODES", "NODE", "HEAD", "RANKS"}
    assert given["NODES"] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    assert given["RANKS"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    # pods of an indexed job are called NAME-INDEX.SUBDOMAIN, where the service without an address has that name
    assert given["HEAD"].startswith(f"{name}-0.{pod['subdomain']}:")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.slow
def test_two_machines_meet_and_train_one_network(tmp_path: Path) -> None:
    """Two launchers, as on two machines, that know of each other only by the address of the first."""
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    words = ["image_train", "--data_dir", str(tmp_path), "--log_dir", str(tmp_path / "run"), *TINY]
    common = {"NODES": 2, "RANKS": 1, "HEAD": f"127.0.0.1:{free_port()}"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    jobs = [
        subprocess.Popen(
            [LAUNCH / "several_nodes.sh", *words],
            env={**os.environ, "PATH": path, **{k: str(v) for k, v in (common | {"NODE": node}).items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]
    outputs = [job.communicate(timeout=280)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert (tmp_path / "run" / "model000002.pt").exists()
    assert "global batch 2" in (tmp_path / "run" / "log.txt").read_text()
