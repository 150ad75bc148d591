"""The launch scripts without a cloud: syntax, dry runs, a fake gcloud."""

import os
import pathlib
import subprocess
import sys

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
TPU_VM = (
  *("--name", "opo", "--zone", "us-east5-b", "--type", "v5e-8"),
  *("--bucket", "kept", "--exp", "quickstart"),
)
GKE = (
  *("--name", "opo", "--exp", "quickstart", "--image", "registry/opo:1"),
  *("--bucket", "kept", "--accelerator", "tpu-v6e-slice", "--topology", "8x8"),
  *("--hosts", "16", "--chips", "4"),
)


def run(script, *arguments, **variables):
  return subprocess.run(
    ["bash", str(LAUNCH / script), *arguments],
    capture_output=True,
    text=True,
    env=os.environ | variables,
    cwd=LAUNCH.parent,
    timeout=120,
  )


def commands(output):
  """The commands that a dry run printed, split into words by bash."""
  lines = [line[2:] for line in output.splitlines() if line.startswith("+ ")]
  words = [f"printf '%s\\0' {line}" for line in lines]
  read = [subprocess.check_output(["bash", "-c", word], text=True) for word in words]
  return [text.split("\0")[:-1] for text in read]


def test_scripts_are_bash(subtests):
  for script in ("tpu_vm.sh", "slurm.sbatch", "gke.sh"):
    with subtests.test(script):
      subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


def test_a_dry_run_on_a_tpu_vm_prints_every_command_in_order():
  flags = ("--steps", "3", "--data.system", "a b")
  done = run("tpu_vm.sh", *TPU_VM, "--spot", "--dry-run", "--", *flags)
  assert done.returncode == 0, done.stderr
  create, archive, copy, setup, train = commands(done.stdout)
  assert create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "opo"]
  assert create[create.index("--accelerator-type") + 1] == "v5litepod-8"
  assert "--spot" in create
  assert archive[0] == "git" and "archive" in archive
  assert "--worker=all" in copy and "--worker=all" in train
  assert "make -C opo_jax install" in setup[-1]
  assert "gcsfuse --implicit-dirs --rename-dir-limit 200000 " in setup[-1]
  assert "EXP=quickstart" in train[-1] and "--steps 3" in train[-1]
  # If one process reads a cached program that another compiles, both may wait forever.
  assert "CACHE_DIR" not in done.stdout
  # A value with a space reaches the experiment as one word.
  assert r"a\ b" in train[-1]


def program(folder, name, body):
  """Writes an executable shell script."""
  path = folder / name
  path.write_text(f"#!/usr/bin/env bash\n{body}\n")
  path.chmod(0o755)


GCLOUD = """cd "$SANDBOX"
verb="$4"
[ "$verb" != describe ] || { cat state 2>/dev/null; exit; }
if [ "$verb" = ssh ]; then
  case "${!#}" in set*) verb=setup ;; *) verb=train ;; esac
  printf '%s\n' "${!#}" >"$verb.sh"
fi
echo "$verb" >>calls
read -r wanted status state <outcomes
sed -i 1d outcomes
[ "$verb" = "$wanted" ] || { kill "$PPID"; exit 99; }
[ "$state" != - ] || exit "$status"
if [ "$state" = MISSING ]; then rm -f state; else echo "$state" >state; fi
exit "$status" """


def launch(sandbox, *outcomes):
  """Runs tpu_vm.sh with a fake gcloud. Outcome: verb, exit status, VM state after."""
  (sandbox / "outcomes").write_text("".join(f"{line}\n" for line in outcomes))
  program(sandbox, "gcloud", GCLOUD)
  program(sandbox, "sleep", "")
  path = f"{sandbox}:{os.environ['PATH']}"
  done = run("tpu_vm.sh", *TPU_VM, PATH=path, SANDBOX=str(sandbox))
  calls = (sandbox / "calls").read_text().split()
  assert calls == [line.split()[0] for line in outcomes], done.stderr
  return done


READY = ("scp 0 -", "setup 0 -")
NEW = ("create 0 READY", *READY)


def test_a_tpu_vm_that_is_unavailable_or_preempted_is_requested_again(tmp_path):
  done = launch(
    tmp_path,
    *("create 1 MISSING", "create 1 MISSING", "create 1 MISSING"),  # no capacity
    *("create 0 READY", "scp 1 PREEMPTED", "delete 0 MISSING"),
    *("create 0 READY", "scp 0 -", "setup 1 PREEMPTED", "delete 0 MISSING"),
    *(*NEW, "train 1 PREEMPTED", "delete 1 -", "delete 0 MISSING"),
    *(*NEW, "train 0 -"),
  )
  assert done.returncode == 0, done.stderr


def test_only_consecutive_failures_on_one_tpu_vm_are_counted(tmp_path):
  twice = ("train 1 -", *READY, "train 1 -", *READY)
  taken = ("train 1 PREEMPTED", "delete 0 MISSING")
  done = launch(tmp_path, *NEW, *twice, *taken, *NEW, *twice, "train 0 -")
  assert done.returncode == 0, done.stderr


def test_a_run_that_fails_three_times_on_one_tpu_vm_ends_the_script(tmp_path):
  done = launch(
    tmp_path, *NEW, "train 1 -", "scp 0 -", "setup 1 -", *READY, "train 1 -"
  )
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith("error: failed 3 times on a healthy")


@pytest.mark.parametrize("python", ["3.10", "3.12"])
@pytest.mark.parametrize("gcsfuse", ["", "--metadata-cache-negative-ttl-secs"])
def test_a_host_gets_the_python_and_the_gcsfuse_that_it_lacks(
  tmp_path, python, gcsfuse
):
  launch(tmp_path, *NEW, "train 0 -")
  (tmp_path / "calls").unlink()
  for name in ("sudo", "tar", "make"):
    program(tmp_path, name, f'echo "{name} $*" >>"$SANDBOX/calls"')
  # TERM ends the run that was left behind; KILL then finds none.
  program(
    tmp_path,
    "pkill",
    'echo "pkill $*" >>"$SANDBOX/calls"; [ "$1" = -TERM ]',
  )
  program(tmp_path, "gcsfuse", f'echo "{gcsfuse}"; echo "mount $*" >>"$SANDBOX/calls"')
  program(tmp_path, "mountpoint", "exit 1")
  for name in ("curl", "lsb_release"):
    program(tmp_path, name, "")
  minor = int(python.split(".")[1])
  version = f"import sys; sys.version_info = (3, {minor}); exec(sys.argv[1])"
  program(tmp_path, "python3", f'{sys.executable} -c "{version}" "$2"')
  for name in ("python3.13", "python3.12", "python3.11"):
    program(tmp_path, name, "exit 127")
  done = subprocess.run(
    ["bash", str(tmp_path / "setup.sh")],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=os.environ
    | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SANDBOX": str(tmp_path)},
  )
  assert done.returncode == 0, done.stderr
  calls = (tmp_path / "calls").read_text().splitlines()
  assert calls[0] == "pkill -TERM -f -- -m [o]po_jax"
  installed = [
    call.split("-y ")[1] for call in calls if "apt-get" in call and "-y" in call
  ]
  wanted = ["python3.12 python3.12-venv"] * (minor < 11) + ["gcsfuse"] * (not gcsfuse)
  assert installed == wanted
  assert calls[-2].startswith("mount --implicit-dirs --rename-dir-limit 200000 ")
  assert calls[-2].endswith(" kept runs")
  assert calls[-1] == "make -C opo_jax install JAX_EXTRA=tpu"


def test_a_dry_run_on_slurm_installs_once_and_starts_on_all_nodes():
  done = run("slurm.sbatch", "quickstart", "--steps", "3", DRY_RUN="1")
  assert done.returncode == 0, done.stderr
  install, train = commands(done.stdout)
  assert install == ["make", "install", "JAX_EXTRA=cuda"]
  assert train[:2] == ["srun", "--kill-on-bad-exit=1"]
  assert train[-2:] == ["--steps", "3"]


def test_a_dry_run_on_gke_prints_a_complete_jobset():
  done = run("gke.sh", *GKE, "--dry-run")
  assert done.returncode == 0, done.stderr
  assert "{" not in done.stdout.split("spec:", 1)[1]
  jobset = yaml.safe_load(done.stdout)
  (job,) = jobset["spec"]["replicatedJobs"]
  assert job["template"]["spec"]["parallelism"] == 16
  pod = job["template"]["spec"]["template"]["spec"]
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "8x8"
  (container,) = pod["containers"]
  assert "EXP=quickstart" in container["command"]
  assert "ARGS=" in container["command"] and "env" not in container
  (volume,) = pod["volumes"]
  options = volume["csi"]["volumeAttributes"]["mountOptions"].split(",")
  assert "rename-dir-limit=200000" in options
  assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_flags_reach_the_experiment_on_gke_unchanged():
  flags = ["--data.system", 'it\'s {name} & a: "b" # \\', "--steps", "3"]
  done = run("gke.sh", *GKE, "--dry-run", "--", *flags)
  assert done.returncode == 0, done.stderr
  (job,) = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"]
  (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
  (given,) = [word for word in container["command"] if word.startswith("ARGS=")]
  # Split as make's shell does.
  words = f"+ {given.removeprefix('ARGS=')}"
  assert commands(words) == [flags]


def test_the_scripts_accept_the_commands_of_the_readme():
  text = (LAUNCH.parent / "README.md").read_text().replace("\\\n", " ")
  lines = [line.split() for line in text.splitlines() if "launch/" in line]
  (tpu,) = [line for line in lines if line[0] == "launch/tpu_vm.sh"]
  (slurm,) = [line for line in lines if line[0] == "sbatch"]
  done = run("tpu_vm.sh", *tpu[1:], "--dry-run")
  assert done.returncode == 0 and len(commands(done.stdout)) == 5, done.stderr
  assert slurm[1:4] == ["--nodes", "4", "launch/slurm.sbatch"]
  done = run("slurm.sbatch", *slurm[4:], DRY_RUN="1")
  assert done.returncode == 0 and len(commands(done.stdout)) == 2, done.stderr


def test_mistakes_end_with_one_line_and_run_nothing(subtests):
  for script, arguments, message in (
    ("tpu_vm.sh", TPU_VM[:-2], "--exp is missing"),
    ("tpu_vm.sh", (*TPU_VM[:-1], "nothing"), "there is no experiment nothing"),
    ("tpu_vm.sh", (*TPU_VM, "--zome", "x"), "--zome is not an option"),
    ("tpu_vm.sh", ("--name",), "--name needs a value"),
    ("slurm.sbatch", (), "which experiment?"),
    ("slurm.sbatch", ("nothing",), "there is no experiment nothing"),
    ("gke.sh", GKE[2:], "--name is missing"),
  ):
    with subtests.test(f"{script}: {message}"):
      done = run(script, *arguments, DRY_RUN="1")
      assert done.returncode == 2
      assert message in done.stderr and len(done.stderr.splitlines()) == 1
      assert not commands(done.stdout)
