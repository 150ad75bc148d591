#!/usr/bin/env bash
# Trains on a TPU VM with one or more hosts: creates or reuses the VM, copies this
# repository, installs it, runs `make train` on every host, and resumes after a
# preemption.
#
#   launch/tpu_vm.sh --name opo --zone us-east5-b --type v6e-64 \
#     --bucket my-bucket --exp opo_r1_distill_qwen_7b [--spot] [--dry-run] [-- ARGS]
#
# The run directory is in the bucket, mounted with gcsfuse, where all hosts share it and
# where it outlives the VM. Create the bucket with a hierarchical namespace (docs/scaling.md).
# --dry-run prints the commands without running them. Arguments after `--` are flags of
# the experiment: -- --steps 100 --seed 1
set -euo pipefail

name="" zone="" type="" bucket="" exp="" spot="" dry=""
version="" # of the TPU software; empty: chosen by the accelerator type
while [ $# -gt 0 ]; do
  case "$1" in
    --name | --zone | --type | --bucket | --exp | --version)
      [ $# -ge 2 ] || { echo "error: $1 needs a value." >&2; exit 2; }
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --spot) spot=1; shift ;;
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    *) echo "error: $1 is not an option; see the head of this file." >&2; exit 2 ;;
  esac
done
for option in name zone type bucket exp; do
  [ -n "${!option}" ] || { echo "error: --$option is missing." >&2; exit 2; }
done
repository="$(cd "$(dirname "$0")/.." && pwd)"
[ -f "$repository/experiments/$exp.py" ] \
  || { echo "error: there is no experiment $exp." >&2; exit 2; }
if [ -z "$version" ]; then
  case "$type" in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5e-* | v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi
type="${type/#v5e-/v5litepod-}" # gcloud's name
arguments="$(printf '%q ' "$@")"
[ $# -gt 0 ] || arguments=""

# Prints a command and, except in a dry run, runs it.
run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [ -n "$dry" ] || "$@"
}
on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
}
state() {
  [ -n "$dry" ] && { echo MISSING; return; }
  gcloud compute tpus tpu-vm describe "$name" --zone "$zone" --format 'value(state)' \
    2>/dev/null || echo MISSING
}

# Each function below returns at its first failing command, by &&: bash ignores `set -e`
# inside the condition of the loop at the end.
create() {
  failures=0 # a new machine
  run gcloud compute tpus tpu-vm create "$name" --zone "$zone" \
    --accelerator-type "$type" --version "$version" ${spot:+--spot}
}
make_machine() {
  case "$(state)" in
    READY) echo "$name already exists." ;;
    MISSING) create ;;
    *)
      run gcloud compute tpus tpu-vm delete "$name" --zone "$zone" --quiet && create
      ;;
  esac
}

# The setup script of every host, run before each start; the host expands the escaped
# variables. The images are Ubuntu 22.04 with Python 3.10, and hold the apt lock during
# their first minutes.
setup() {
  cat <<END
set -e
# A run that a dropped connection left behind still holds the TPU.
for signal in TERM KILL; do
  pkill -\$signal -f -- '-m [o]po_jax' || break
  sleep 10
done
mkdir -p opo_jax runs
tar xzf opo_jax.tar.gz -C opo_jax
install="sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -q -y"
has_python() {
  for python in python3 python3.13 python3.12 python3.11; do
    \$python -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && return
  done
  return 1
}
if ! has_python; then
  sudo add-apt-repository -y -n ppa:deadsnakes/ppa
  sudo apt-get -o DPkg::Lock::Timeout=600 update -q
  \$install python3.12 python3.12-venv
fi
command -v make >/dev/null && command -v git >/dev/null || \$install make git
if ! gcsfuse --help 2>&1 | grep -q metadata-cache-negative-ttl-secs; then # missing or too old
  key=/usr/share/keyrings/cloud.google.asc
  curl -s https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee \$key >/dev/null
  echo "deb [signed-by=\$key] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
  sudo apt-get -o DPkg::Lock::Timeout=600 update -q
  \$install gcsfuse
fi
# Orbax commits a checkpoint by renaming its directory; every host must see at once what
# the others have written.
mountpoint -q runs || gcsfuse --implicit-dirs --rename-dir-limit 200000 --metadata-cache-ttl-secs 0 --metadata-cache-negative-ttl-secs 0 $bucket runs
make -C opo_jax install JAX_EXTRA=tpu
END
}

prepare() {
  archive="$(mktemp -d)/opo_jax.tar.gz" \
    && run git -C "$repository" archive --format tar.gz --output "$archive" HEAD \
    && run gcloud compute tpus tpu-vm scp "$archive" "$name:opo_jax.tar.gz" \
      --zone "$zone" --worker=all \
    && on_all_hosts "$(setup)"
}

# All hosts start together: if one fails, all stop and start again.
train() {
  on_all_hosts "make -C opo_jax train EXP=$exp RUN=\$HOME/runs/$exp JAX_EXTRA=tpu \
ARGS=\"$arguments\""
}

[ -n "$dry" ] || command -v gcloud >/dev/null \
  || { echo "error: gcloud is not installed; this script calls it." >&2; exit 2; }
failures=0 # consecutive failures of prepare or train on the same machine
until make_machine && prepare && train; do
  case "$(state)" in
    READY)
      failures=$((failures + 1))
      if [ "$failures" -ge 3 ]; then
        echo "error: failed $failures times on a healthy machine; see above." >&2
        exit 1
      fi
      echo "Failed on a healthy machine; trying again in 60 s." >&2
      ;;
    MISSING) echo "No machine was available; requesting one again in 60 s." >&2 ;;
    *) echo "The machine was preempted; recreating it in 60 s." >&2 ;;
  esac
  sleep 60
done
echo "The run is in gs://$bucket/$exp. Delete the machine when it is no longer needed:"
echo "  gcloud compute tpus tpu-vm delete $name --zone $zone"
